"""The gated attention unit: attention and gated MLP in one layer, about half the cost of the pair.

    u, v, z = split(swish(RMSNorm(x) W_in))          widths e, e, c
    q, k    = rope(z * scale_q + shift_q), rope(z * scale_k + shift_k)      one shared head
    x      <- x + (u * softmax(q k^T / sqrt(c)) v) W_out

Source: Hua et al., FLASH, arXiv 2202.10447; softmax form, kexue.fm/archives/8990.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.layout import IntervalMask
from mmdiff.nn.attention import Growing, KeyValue, attention, join
from mmdiff.nn.layers import Linear, RMSNorm, silu
from mmdiff.nn.rope import Rotation, rotate


class GatedAttentionUnit(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs):
        self.gated, self.key_width = cfg.expansion * cfg.width, cfg.key_width
        self.impl, self.qk_norm = cfg.attention, cfg.qk_norm
        self.norm = RMSNorm(cfg.width)
        self.project = Linear(cfg.width, 2 * self.gated + self.key_width, rngs)
        self.scale_qk = nnx.Param(jnp.ones((2, self.key_width), jnp.float32))
        self.shift_qk = nnx.Param(jnp.zeros((2, self.key_width), jnp.float32))
        self.out = Linear(self.gated, cfg.width, rngs, gain=cfg.depth**-0.5)
        if cfg.qk_norm:
            self.norm_q, self.norm_k = RMSNorm(self.key_width), RMSNorm(self.key_width)

    def __call__(self, x: jax.Array, angles: Rotation, mask: IntervalMask, context: KeyValue | Growing | None):
        """x [b, t, d] to (x [b, t, d], this layer's KeyValue with one head, see attention.join)."""
        wide = silu(self.project(self.norm(x)))
        u, v, z = jnp.split(wide, (self.gated, 2 * self.gated), axis=-1)
        scale, shift = self.scale_qk[...].astype(x.dtype), self.shift_qk[...].astype(x.dtype)
        q, k = z * scale[0] + shift[0], z * scale[1] + shift[1]
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = rotate(q[:, None], angles), rotate(k[:, None], angles)
        parts, kept = join(context, KeyValue(k, v[:, None]))
        mixed = attention(q, parts, mask, scale=self.key_width**-0.5, impl=self.impl)
        return x + self.out(u * mixed[:, 0]), kept
