"""LaVIT's dynamic tokenizer: of the features of an image's patches some are kept, and take up what the dropped ones held.

    keep    k = hard Gumbel-softmax(selector(f)), straight through                              float32 [b, n], 0 or 1
    merge   x = f;  in each layer  x += Self(norm x; k);  x += Cross(norm x, norm f; 1 - k);  x += MLP(norm x)
    decode  y = queries;  each layer  y += Self(norm y);  y += Cross(norm y, codes + place[rank]; k);  y += MLP(norm y)
    loss    mean_i (1 - cos(f_i, y_i)) + 2 (rho - mean k)^2        rho = tokenizer.keep, 1/3; mean k of the whole batch

Attention under a policy p is (1)  a_ij = (exp(s_ij - m_i) p_ij + e / n) / (sum_j exp(s_ij - m_i) p_ij + e), e = 1e-6: it has a
gradient in p, by which the selector learns what is worth keeping. Self is causal and reads what is kept (a dropped position
reads itself), Cross reads what is dropped; if that is nothing, it takes the mean of all. So all positions are worked through
while training; `packed` works through at most so many as are asked for, the kept ones, to the same result.

Selector, policies, causal order, decoding by rank and the loss' first term are those of Jin et al., arXiv 2309.04669, and of
their code. Ours, since no training code of theirs is published: the decoder, too, reads its codes under the policy, so that the
selector also learns what is worth saying; the selector learns nothing from Cross, where keeping a patch takes it from what the
others read, and a gradient, which sees one thing at a time, does not see that its own code says it then; the ratio loss is of
the batch's mean share, where the published formula, 2 (rho - mean of one image's choices)^2, reads as if of each image: here
images may differ in length for free, so that their lengths can follow what they say; the codebook's own loss is that of
mmdiff/tokenizers/quantizers/vq.py; queries and places begin as waves of row and column, for decoders that learn in a thousand
steps where they stand.

Letters: b images, n patches, d width, h heads, m kept patches at most.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.layout import patch_cells
from mmdiff.models.patches import sincos

EPSILON = 1e-6
RATIO_WEIGHT = 2.0


def policy_attention(scores: jax.Array, policy: jax.Array) -> jax.Array:
    """Equation (1): float32 [b, h, i, j] of scores [b, h, i, j] and a policy [b, i, j] or [b, 1, j].

    m_i is the largest score that may be read. LaVIT takes the largest of all, and where a dropped one is far above them, e
    outweighs what may be read. Those above m_i count as m_i, which only their gradient in p sees.
    """
    scores, policy = scores.astype(jnp.float32), policy[:, None]
    top = jnp.where(policy > 0, scores, -jnp.inf).max(-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    # not minimum(), whose gradient is halved where the two are equal: at the largest score of all
    shifted = jnp.exp(jnp.where(scores > top, 0.0, scores - top)) * policy
    return (shifted + EPSILON / scores.shape[-1]) / (shifted.sum(-1, keepdims=True) + EPSILON)


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.q, self.k, self.v, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, x: jax.Array, read: jax.Array, policy: jax.Array) -> jax.Array:
        """x [b, i, d] reads [b, j, d] under a policy [b, i, j] or [b, 1, j]."""
        split = lambda a: a.reshape(*a.shape[:2], self.heads, -1)
        q, k, v = split(self.q(x)), split(self.k(read)), split(self.v(read))
        weights = policy_attention(jnp.einsum("bihc,bjhc->bhij", q, k) * q.shape[-1] ** -0.5, policy)
        return self.out(jnp.einsum("bhij,bjhc->bihc", weights.astype(v.dtype), v).reshape(x.shape))


class Layer(nnx.Module):
    """Reads its own stream, then another one."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.own, self.other = (Attention(width, heads, rngs) for _ in range(2))
        self.norm_own, self.norm_other, self.norm_mlp = (nnx.LayerNorm(width, rngs=rngs) for _ in range(3))
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, own: jax.Array, read: jax.Array, other: jax.Array) -> jax.Array:
        """x [b, i, d]; own: its policy [b, i, i]; read [b, j, d] and the policy `other` for it."""
        y = self.norm_own(x)
        x = x + self.own(y, y, own)
        x = x + self.other(self.norm_other(x), read, other)
        return x + self.down(jax.nn.gelu(self.up(self.norm_mlp(x)), approximate=False))


class Selector(nnx.Module):
    """Log-probabilities float32 [b, n, 2] that a patch is kept (first) or dropped."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        linear = lambda a, b: nnx.Linear(a, b, rngs=rngs)
        self.norm, self.enter = nnx.LayerNorm(width, rngs=rngs), linear(width, width)
        self.layers = nnx.List([linear(width, width // 2), linear(width // 2, width // 4)])
        self.choice = linear(width // 4, 2)

    def __call__(self, features: jax.Array) -> jax.Array:
        gelu = lambda a: jax.nn.gelu(a, approximate=False)
        x = gelu(self.enter(self.norm(features)))
        own, rest = jnp.split(x, 2, axis=-1)
        x = jnp.concatenate([own, jnp.broadcast_to(rest.mean(1, keepdims=True), rest.shape)], axis=-1)  # what all others say
        for layer in self.layers:
            x = gelu(layer(x))
        return jax.nn.log_softmax(self.choice(x).astype(jnp.float32))


def kept(choice: jax.Array, key: jax.Array | None) -> jax.Array:
    """0 or 1 for each patch, float32 [b, n], of `Selector`'s log-probabilities, with their gradient.

    Args:
      key: of the Gumbel noise, as LaVIT has it in use, too; None: the likelier choice.
    """
    noisy = choice if key is None else choice + jax.random.gumbel(key, choice.shape)
    soft = jax.nn.softmax(noisy)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).astype(jnp.float32)
    return soft + jax.lax.stop_gradient(hard - soft)


def at_least_one(keep: jax.Array, choice: jax.Array) -> jax.Array:
    """`keep` [b, n], with the patch of the best chance where an image would keep none."""
    best = jax.nn.one_hot(choice[..., 0].argmax(-1), choice.shape[1])
    return keep + jax.lax.stop_gradient(best * (keep.sum(-1, keepdims=True) < 0.5))


class Packed(NamedTuple):
    """The kept patches of each image, in order, before what only fills up."""

    x: jax.Array  # [b, m, d]
    filled: jax.Array  # bool [b, m]
    places: jax.Array  # int32 [b, m]; which patch


class Merger(nnx.Module):
    def __init__(self, width: int, depth: int, heads: int, rngs: nnx.Rngs, *, causal: bool = True):
        """`causal`: a kept patch reads those before it, as published; else all that are kept."""
        self.causal = causal
        self.norm_read, self.norm = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.layers = nnx.List([Layer(width, heads, rngs) for _ in range(depth)])

    def __call__(self, features: jax.Array, keep: jax.Array) -> jax.Array:
        """Features [b, n, d] and what is kept of them [b, n] to [b, n, d], of which only kept positions mean something."""
        count = features.shape[1]
        own = jnp.where(jnp.eye(count, dtype=bool), 1.0, keep[:, None]) * self._order(count)
        read, x, dropped = self.norm_read(features), features, 1 - jax.lax.stop_gradient(keep)
        for layer in self.layers:
            x = layer(x, own, read, dropped[:, None])
        return self.norm(x)

    def packed(self, features: jax.Array, keep: jax.Array, most: int) -> Packed:
        """The same at the kept positions alone, of which at most `most` are taken: without gradient in `keep`."""
        index = jnp.argsort(1 - keep, axis=-1, stable=True)[:, :most]
        filled = jnp.take_along_axis(keep, index, axis=1) > 0
        x = jnp.take_along_axis(features, index[..., None], axis=1)
        own = self._order(index.shape[1]) * filled[:, None]
        read = self.norm_read(features)
        for layer in self.layers:
            x = layer(x, own, read, 1 - keep[:, None])
        return Packed(self.norm(x), filled, index)

    def _order(self, count: int) -> jax.Array:
        """1 where a patch may read another one: [count, count]."""
        every = jnp.ones((count, count))
        return jnp.tril(every) if self.causal else every


class Decoder(nnx.Module):
    """Codes at the kept positions to a feature for every patch of a square of `count`."""

    def __init__(self, count: int, width: int, code_width: int, depth: int, heads: int, rngs: nnx.Rngs):
        side = math.isqrt(count)
        table = lambda: nnx.Param(sincos(jnp.asarray(patch_cells(side, side)[:, :2]), width))
        self.enter, self.place, self.queries = nnx.Linear(code_width, width, rngs=rngs), table(), table()
        self.layers = nnx.List([Layer(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.first, self.second = (nnx.Linear(width, width, rngs=rngs) for _ in range(2))

    def __call__(self, codes: jax.Array, keep: jax.Array) -> jax.Array:
        """Codes [b, m, c], of which those with keep [b, m] = 1 stand in order, to features [b, n, d]."""
        rank = jnp.cumsum(jax.lax.stop_gradient(keep), axis=-1).astype(jnp.int32) - 1
        read = self.enter(codes) + self.place[...][jnp.maximum(rank, 0)]
        y = jnp.broadcast_to(self.queries[...], (len(codes), *self.queries.shape))
        everywhere = jnp.ones((len(codes), 1, y.shape[1]))
        for layer in self.layers:
            y = layer(y, everywhere, read, keep[:, None])
        return self.second(jnp.tanh(self.first(self.norm(y))))


def feature_loss(features: jax.Array, decoded: jax.Array) -> jax.Array:
    """Mean of 1 - cosine over the patches of each image: float32 [b]."""
    unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a.astype(jnp.float32), axis=-1, keepdims=True), 1e-6)
    return (1 - (unit(features) * unit(decoded)).sum(-1)).mean(-1)
