"""The classic pair: multi-head attention, then SwiGLU.

    x <- x + softmax(q k^T / sqrt(c)) v W_o                  q, k, v = RMSNorm(x) W_qkv, RoPE on q and k
    x <- x + (swish(h W_gate) * (h W_up)) W_down             h = RMSNorm(x), inner width 8/3 of the model's

Source: Vaswani et al., arXiv 1706.03762; Shazeer, GLU variants, arXiv 2002.05202.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.layout import IntervalMask
from mmdiff.nn.attention import Growing, KeyValue, attention, join
from mmdiff.nn.layers import Linear, RMSNorm, swiglu
from mmdiff.nn.rope import Rotation, rotate


class TransformerBlock(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs):
        width, self.head_width = cfg.width, cfg.head_width
        self.impl, self.qk_norm = cfg.attention, cfg.qk_norm
        inner = -(-8 * width // 3 // 64) * 64  # a multiple of 64 for the sake of matrix units
        gain = (2 * cfg.depth) ** -0.5
        self.norm_attention = RMSNorm(width)
        self.qkv = Linear(width, 3 * width, rngs)
        self.attention_out = Linear(width, width, rngs, gain=gain)
        self.norm_mlp = RMSNorm(width)
        self.gate_up = Linear(width, 2 * inner, rngs)
        self.down = Linear(inner, width, rngs, gain=gain)
        if cfg.qk_norm:
            self.norm_q, self.norm_k = RMSNorm(self.head_width), RMSNorm(self.head_width)

    def __call__(self, x: jax.Array, angles: Rotation, mask: IntervalMask, context: KeyValue | Growing | None):
        """x [b, t, d] to (x [b, t, d], this layer's KeyValue, see attention.join)."""
        rows, length, width = x.shape
        qkv = jnp.split(self.qkv(self.norm_attention(x)), 3, axis=-1)
        q, k, v = (part.reshape(rows, length, -1, self.head_width).swapaxes(1, 2) for part in qkv)  # [b, h, t, c] each
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        parts, kept = join(context, KeyValue(rotate(k, angles), v))
        mixed = attention(rotate(q, angles), parts, mask, scale=self.head_width**-0.5, impl=self.impl)
        x = x + self.attention_out(mixed.swapaxes(1, 2).reshape(rows, length, width))
        return x + self.down(swiglu(self.gate_up(self.norm_mlp(x)))), kept
