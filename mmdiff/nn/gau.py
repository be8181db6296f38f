"""The gated attention unit: attention and gated MLP in one layer, about half the cost of the pair.

    u, v = swish(h W_gates), z = swish(h W_shared)        h = RMSNorm(x); widths e, e, c
    q, k = rope(z * scale_q + shift_q), rope(z * scale_k + shift_k)         one shared head
    x      <- x + (u * softmax(q k^T / sqrt(c)) v) W_out                    with time="adaln" as in nn/around.py

Over several devices the expansion e is split (axis `tensor`); the shared head is small and computed by each of them.

Source: Hua et al., FLASH, arXiv 2202.10447; softmax form, kexue.fm/archives/8990.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.nn.around import Around, Modulation, Turn
from mmdiff.nn.attention import Growing, KeyValue, attention, join
from mmdiff.nn.layers import Linear, RMSNorm, parameter, parts, silu
from mmdiff.parallel.sharding import NOWHERE, Placement


class GatedAttentionUnit(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE):
        gated, self.key_width = cfg.expansion * cfg.width, cfg.key_width
        self.impl, self.qk_norm, self.place = cfg.attention, cfg.qk_norm, place
        self.norm = RMSNorm(cfg.width)
        self.gates = Linear(cfg.width, (2, gated), rngs, axes=("width", None, "expansion"), bias=cfg.bias, place=place)
        self.shared = Linear(cfg.width, self.key_width, rngs, axes=("width", None), bias=cfg.bias, place=place)
        self.scale_qk = parameter(jnp.ones((2, self.key_width), jnp.float32), (None, None))
        self.shift_qk = parameter(jnp.zeros((2, self.key_width), jnp.float32), (None, None))
        gain = cfg.depth**-0.5
        self.out = Linear(gated, cfg.width, rngs, axes=("expansion", "width"), gain=gain, bias=cfg.bias, place=place)
        if cfg.qk_norm:
            self.norm_q, self.norm_k = RMSNorm(self.key_width), RMSNorm(self.key_width)
        self.turn = Turn(cfg, 1, self.key_width, rngs)
        self.modulated = cfg.time == "adaln"
        if self.modulated:
            self.modulation = Modulation(cfg, 1, rngs, place)

    def __call__(self, x: jax.Array, around: Around, context: KeyValue | Growing | None):
        """x [b, t, d] to (x [b, t, d], this layer's KeyValue with one head, see attention.join)."""
        h, gate = self.norm(x), None
        if self.modulated:
            scale, shift, gate = self.modulation(around.time)
            h = h * (1 + scale) + shift
        u, v = (self.place(half, "rows", None, "expansion") for half in parts(silu(self.gates(h))))
        z = silu(self.shared(h))
        scale, shift = self.scale_qk[...].astype(x.dtype), self.shift_qk[...].astype(x.dtype)
        q, k = z * scale[0] + shift[0], z * scale[1] + shift[1]
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = self.turn(around, q[:, None], k[:, None])
        keys, kept = join(context, KeyValue(k, v[:, None]))
        mixed = attention(q, keys, around.mask, scale=self.key_width**-0.5, impl=self.impl, place=self.place)
        out = self.out(u * mixed[:, 0])
        return x + (out if gate is None else gate * out), kept
