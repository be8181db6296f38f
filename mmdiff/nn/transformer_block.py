"""The classic pair: multi-head attention, then SwiGLU.

    x <- x + softmax(q k^T / sqrt(c)) v W_o                  q, k, v = RMSNorm(x) W_qkv, RoPE on q and k
    x <- x + (swish(h W_gate) * (h W_up)) W_down             h = RMSNorm(x), inner width 8/3 of the model's

Source: Vaswani et al., arXiv 1706.03762; Shazeer, GLU variants, arXiv 2002.05202.
"""

import jax
from flax import nnx

from mmdiff import config
from mmdiff.layout import IntervalMask
from mmdiff.nn.attention import Growing, KeyValue, attention, join
from mmdiff.nn.layers import Linear, RMSNorm, parts, swiglu
from mmdiff.nn.rope import Rotation, rotate
from mmdiff.parallel.sharding import NOWHERE, Placement


class TransformerBlock(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE):
        width, self.head_width = cfg.width, cfg.head_width
        self.impl, self.qk_norm, self.place = cfg.attention, cfg.qk_norm, place
        inner = -(-8 * width // 3 // 64) * 64  # a multiple of 64 for the sake of matrix units
        gain = (2 * cfg.depth) ** -0.5
        self.norm_attention = RMSNorm(width)
        self.qkv = Linear(width, (3, width), rngs, axes=("width", None, "heads"), place=place)
        self.attention_out = Linear(width, width, rngs, axes=("heads", "width"), gain=gain, place=place)
        self.norm_mlp = RMSNorm(width)
        self.gate_up = Linear(width, (2, inner), rngs, axes=("width", None, "expansion"), place=place)
        self.down = Linear(inner, width, rngs, axes=("expansion", "width"), gain=gain, place=place)
        if cfg.qk_norm:
            self.norm_q, self.norm_k = RMSNorm(self.head_width), RMSNorm(self.head_width)

    def __call__(self, x: jax.Array, angles: Rotation, mask: IntervalMask, context: KeyValue | Growing | None):
        """x [b, t, d] to (x [b, t, d], this layer's KeyValue, see attention.join)."""
        rows, length, width = x.shape
        heads_first = lambda part: part.reshape(rows, length, -1, self.head_width).swapaxes(1, 2)  # [b, h, t, c]
        qkv = parts(self.qkv(self.norm_attention(x)))
        q, k, v = (self.place(heads_first(part), "rows", "heads", None, None) for part in qkv)
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        keys, kept = join(context, KeyValue(rotate(k, angles), v))
        mixed = attention(rotate(q, angles), keys, mask, scale=self.head_width**-0.5, impl=self.impl, place=self.place)
        x = x + self.attention_out(mixed.swapaxes(1, 2).reshape(rows, length, width))
        gated = self.place(swiglu(self.gate_up(self.norm_mlp(x))), "rows", None, "expansion")
        return x + self.down(gated), kept
