"""Flamingo's gated cross-attention: layers between those of the model in which every position reads the images before it.

    x <- x + tanh(a) softmax(q k^T / sqrt(c)) v W_o          q = norm(x) W_q;  k, v = vectors W_k, vectors W_v
    x <- x + tanh(b) gelu(norm(x) W_1) W_2                   a = b = 0 at the start: the model is what it was

Keys and values stand at the positions of an image, where the row carries its pixels, so that mask, packing and cache are
those of every other layer: a position reads all images of its document that stand before it (the paper: the last of them
alone). The last number of queries and keys is no feature: it keeps positions without an image from being read, and where
there is none before it a position reads zeros.

Letters: b rows, t positions, h heads, c width of a key, e of a value, d width. Source: Alayrac et al., arXiv 2204.14198,
section 3.1.2.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.layout import IntervalMask
from mmdiff.nn.attention import Growing, KeyValue, attention, join
from mmdiff.nn.layers import Linear, RMSNorm, parameter
from mmdiff.parallel.sharding import NOWHERE, Placement

NEVER = 1e9


class GatedCrossAttention(nnx.Module):
    def __init__(self, cfg: config.Model, head: tuple[int, int, int], rngs: nnx.Rngs, place: Placement = NOWHERE):
        """`head`: heads, key width and value width of the model's own layers, which the cache is made for."""
        heads, self.key_width, value_width = head
        width, self.impl, self.heads, self.place = cfg.width, cfg.attention, heads, place
        linear = functools.partial(Linear, rngs=rngs, axes=("width", "heads"), place=place)
        self.norm, self.norm_mlp = RMSNorm(width), RMSNorm(width)
        self.q, self.k = (linear(width, heads * self.key_width) for _ in range(2))
        self.v = linear(width, heads * value_width)
        self.attention_out = Linear(heads * value_width, width, rngs, axes=("heads", "width"), place=place)
        self.up = Linear(width, 4 * width, rngs, axes=("width", "expansion"), place=place)
        self.down = Linear(4 * width, width, rngs, axes=("expansion", "width"), place=place)
        self.gate_attention, self.gate_mlp = (parameter(jnp.zeros((), jnp.float32), ()) for _ in range(2))

    def __call__(
        self, x: jax.Array, vectors: jax.Array, shown: jax.Array, mask: IntervalMask, context: KeyValue | Growing | None
    ) -> tuple[jax.Array, KeyValue]:
        """x [b, t, d], vectors [b, t, d] of images where `shown` [b, t], to (x, this layer's KeyValue, see attention.join)."""
        heads_first = lambda a: a.reshape(*a.shape[:2], self.heads, -1).swapaxes(1, 2)  # [b, h, t, .]
        last = lambda a, value: a.at[..., -1].set(jnp.broadcast_to(value, a.shape[:-1]).astype(a.dtype))
        here = shown[:, None]
        q = last(heads_first(self.q(self.norm(x))), jnp.ones(()))
        k = last(heads_first(self.k(vectors)), jnp.where(here, 0.0, -NEVER))
        v = jnp.where(here[..., None], heads_first(self.v(vectors)), 0)
        keys, kept = join(context, KeyValue(k, v))
        mixed = attention(q, keys, mask, scale=self.key_width**-0.5, impl=self.impl, place=self.place)
        read = self.attention_out(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1))
        gate = lambda parameter: jnp.tanh(parameter[...]).astype(x.dtype)
        x = x + gate(self.gate_attention) * read
        made = self.down(jax.nn.gelu(self.up(self.norm_mlp(x)), approximate=True))
        return x + gate(self.gate_mlp) * made, kept
