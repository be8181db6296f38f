"""The classic pair: multi-head attention, then SwiGLU.

    x <- x + softmax(q k^T / sqrt(c)) v W_o                  q, k, v = RMSNorm(x) W_qkv, RoPE on q and k
    x <- x + (swish(h W_gate) * (h W_up)) W_down             h = RMSNorm(x), inner width 8/3 of the model's

With time="adaln" both lines as in nn/around.py.

Source: Vaswani et al., arXiv 1706.03762; Shazeer, GLU variants, arXiv 2002.05202.
"""

import functools

import jax
from flax import nnx

from mmdiff import config
from mmdiff.nn.around import Around, Modulation, Turn
from mmdiff.nn.attention import Growing, KeyValue, attention, join
from mmdiff.nn.layers import Linear, RMSNorm, parts, swiglu
from mmdiff.parallel.sharding import NOWHERE, Placement


class TransformerBlock(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE):
        width, self.head_width = cfg.width, cfg.head_width
        self.impl, self.qk_norm, self.place = cfg.attention, cfg.qk_norm, place
        inner = -(-8 * width // 3 // 64) * 64  # a multiple of 64 for the sake of matrix units
        gain = (2 * cfg.depth) ** -0.5
        self.norm_attention = RMSNorm(width)
        linear = functools.partial(Linear, rngs=rngs, bias=cfg.bias, place=place)
        self.qkv = linear(width, (3, width), axes=("width", None, "heads"))
        self.attention_out = linear(width, width, axes=("heads", "width"), gain=gain)
        self.norm_mlp = RMSNorm(width)
        self.gate_up = linear(width, (2, inner), axes=("width", None, "expansion"))
        self.down = linear(inner, width, axes=("expansion", "width"), gain=gain)
        if cfg.qk_norm:
            self.norm_q, self.norm_k = RMSNorm(self.head_width), RMSNorm(self.head_width)
        self.turn = Turn(cfg, width // self.head_width, self.head_width, rngs)
        self.modulated = cfg.time == "adaln"
        if self.modulated:
            self.modulation = Modulation(cfg, 2, rngs, place)

    def __call__(self, x: jax.Array, around: Around, context: KeyValue | Growing | None):
        """x [b, t, d] to (x [b, t, d], this layer's KeyValue, see attention.join)."""
        rows, length, width = x.shape
        heads_first = lambda part: part.reshape(rows, length, -1, self.head_width).swapaxes(1, 2)  # [b, h, t, c]
        h = self.norm_attention(x)
        if self.modulated:
            scale_before, shift_before, gate_attention, scale, shift, gate_mlp = self.modulation(around.time)
            h = h * (1 + scale_before) + shift_before
        qkv = parts(self.qkv(h))
        q, k, v = (self.place(heads_first(part), "rows", "heads", None, None) for part in qkv)
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = self.turn(around, q, k)
        keys, kept = join(context, KeyValue(k, v))
        mixed = attention(q, keys, around.mask, scale=self.head_width**-0.5, impl=self.impl, place=self.place)
        out = self.attention_out(mixed.swapaxes(1, 2).reshape(rows, length, width))
        x = x + (gate_attention * out if self.modulated else out)
        h = self.norm_mlp(x)
        if self.modulated:
            h = h * (1 + scale) + shift
        gated = self.place(swiglu(self.gate_up(h)), "rows", None, "expansion")
        out = self.down(gated)
        return x + (gate_mlp * out if self.modulated else out), kept
