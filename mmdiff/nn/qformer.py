"""The Q-Former: learned queries that read an image, and texts that read along, through the same attention.

    x = [queries, text]
    x_i += self(norm x)_i                    who reads whom: a mask, `reading` makes those in use
    q_i += cross(norm q, features)_i         queries alone, in every second layer, from the first on
    x_i += mlp(norm x)_i                     one for queries, another for text

A query that reads earlier queries only makes an order of them (`causal`): the first say what the later ones can build on.
Differences from BERT, of which it was made: norms stand before what they norm, and nothing is pretrained.

Shapes: features [n, f, c], queries [n, k, d], text [n, t, d], masks bool [n, k + t, k + t].
Sources: Li et al., BLIP-2, arXiv 2301.12597; causal queries: Ge et al., SEED, arXiv 2307.08041.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

Reading = Literal["apart", "together", "caption"]


class Attention(nnx.Module):
    def __init__(self, width: int, context: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.q, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(2))
        self.k, self.v = (nnx.Linear(context, width, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array, read: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [n, i, d] reads [n, j, c] where mask [n, i, j] says so."""
        split = lambda a: a.reshape(*a.shape[:2], self.heads, -1)
        mask = mask if mask is None else mask[:, None]
        mixed = jax.nn.dot_product_attention(split(self.q(x)), split(self.k(read)), split(self.v(read)), mask=mask)
        return self.out(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """With the norm before it: [n, i, d] to what is added."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(self.norm(x))))


class Layer(nnx.Module):
    def __init__(self, width: int, context: int, heads: int, crossing: bool, rngs: nnx.Rngs):
        normed = functools.partial(nnx.LayerNorm, width, rngs=rngs)
        self.norm, self.own, self.mlp = normed(), Attention(width, width, heads, rngs), MLP(width, rngs)
        self.norm_cross = normed() if crossing else None
        self.cross = Attention(width, context, heads, rngs) if crossing else None


class QFormer(nnx.Module):
    def __init__(self, width: int, context: int, depth: int, heads: int, queries: int, rngs: nnx.Rngs):
        """context: width of the features."""
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (queries, width)) * 0.02)
        self.norm_features = nnx.LayerNorm(context, rngs=rngs)
        self.layers = nnx.List([Layer(width, context, heads, number % 2 == 0, rngs) for number in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(
        self, features: jax.Array, mask: jax.Array, text: jax.Array | None = None, mlps: Sequence[MLP] = ()
    ) -> tuple[jax.Array, jax.Array]:
        """Queries [n, k, d] and text [n, t, d] after all layers.

        Args:
          mask: see `reading`. text: embedded, with `mlps`, one for each layer, of its own.
        """
        count, read = len(self.queries), self.norm_features(features)
        x = jnp.broadcast_to(self.queries[...], (len(features), *self.queries.shape))
        if text is not None:
            x = jnp.concatenate([x, text], axis=1)
        for number, layer in enumerate(self.layers):
            y = layer.norm(x)
            x = x + layer.own(y, y, mask)
            q, t = x[:, :count], x[:, count:]
            if layer.cross is not None and layer.norm_cross is not None:
                q = q + layer.cross(layer.norm_cross(q), read)
            q = q + layer.mlp(q)
            x = q if text is None else jnp.concatenate([q, t + mlps[number](t)], axis=1)
        x = self.norm(x)
        return x[:, :count], x[:, count:]


def reading(queries: int, real: jax.Array, kind: Reading, causal: bool) -> jax.Array:
    """Who reads whom, bool [n, k + t, k + t].

    Args:
      real: bool [n, t], which text positions are no padding.
      kind: `apart`: queries and text each among themselves; `together`: all text is read by both; `caption`: text reads the
        queries and the text before it, queries no text.
      causal: a query reads no later query.
    """
    count, length = real.shape
    among = jnp.ones((queries, queries), bool)
    among = jnp.broadcast_to(jnp.tril(among) if causal else among, (count, queries, queries))
    words = jnp.broadcast_to(real[:, None], (count, length, length)) | jnp.eye(length, dtype=bool)
    told = jnp.broadcast_to(real[:, None] & (kind == "together"), (count, queries, length))
    if kind == "caption":
        words = words & jnp.tril(jnp.ones((length, length), bool))
    asking = jnp.full((count, length, queries), kind != "apart")
    return jnp.concatenate([jnp.concatenate([among, told], 2), jnp.concatenate([asking, words], 2)], 1)
