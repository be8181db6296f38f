"""Attention in O(t) memory, in plain JAX: runs on every backend, visits only the tiles that the mask needs.

Forward, for each block of queries: a running softmax over the key blocks it needs. Backward, for each block of keys:
dk and dv of the block while it stands still, dq added up in a buffer. Equations and letters: attention_tiled.py.

The rows of a batch go in lockstep: a tile is visited if one of them needs it. So a loop's length depends on all rows,
and where the batch is sharded, this one table of needed tiles is all that devices exchange; inside `jax.shard_map` over
rows and heads they exchange nothing.
"""

import functools

import jax
import jax.numpy as jnp

from mmdiff.layout import IntervalMask
from mmdiff.nn.attention_tiled import NEGATIVE, Passes, needed_first, needed_tiles, tiled_attention

BLOCK = 256


def blockwise_attention(q, k, v, mask: IntervalMask, *, scale: float, block: int = BLOCK) -> jax.Array:
    """Attend under `mask`: q [b, h, t, c], k [b, h, s, c], v [b, h, s, e], mask vectors [b, t], to [b, h, t, e]."""
    return tiled_attention(passes(block), q, k, v, mask, scale=scale, block=(block, block))


@functools.cache
def passes(block: int) -> Passes:
    return Passes(functools.partial(forward, block=block), functools.partial(backward, block=block))


def forward(q, k, v, mask: IntervalMask, *, block: int):
    """Out [b, h, t, e] and lse [b, h, t]: equations (1) and (3)."""
    rows, heads, length, _ = q.shape
    order, count = needed_first(needed_tiles(mask, k.shape[2], (block, block)).any(axis=0))

    def query_block(i, results):
        out, lse = results
        q_i, mask_i = _cut(q, i, block), _cut_mask(mask, i, block)

        def key_block(n, state):
            best, total, mixed = state
            j = order[i, n]
            scores, allowed = _scores(q_i, _cut(k, j, block), mask_i, j * block)
            new_best = jnp.maximum(best, scores.max(axis=-1))
            weights = jnp.where(allowed, jnp.exp(scores - new_best[..., None]), 0)
            shrink = jnp.exp(best - new_best)
            total = total * shrink + weights.sum(axis=-1)
            part = _product("bhts,bhse->bhte", weights.astype(v.dtype), _cut(v, j, block))
            return new_best, total, mixed * shrink[..., None] + part

        state = (
            _full(q, (rows, heads, block), NEGATIVE),
            _full(q, (rows, heads, block), 0),
            _full(q, (rows, heads, block, v.shape[-1]), 0),
        )
        best, total, mixed = jax.lax.fori_loop(0, count[i], key_block, state)
        total = jnp.where(total > 0, total, 1)  # nothing to read: `mixed` is 0
        return _paste(out, mixed / total[..., None], i), _paste(lse, best + jnp.log(total), i)

    results = _full(v, (rows, heads, length, v.shape[-1]), 0, v.dtype), _full(q, (rows, heads, length), 0)
    return jax.lax.fori_loop(0, length // block, query_block, results)


def backward(q, k, v, mask: IntervalMask, lse, delta, g, *, block: int):
    """Dq, dk, dv: equations (2) and (5) to (8), without the scale that `q` carries."""
    order, count = needed_first(needed_tiles(mask, k.shape[2], (block, block)).any(axis=0).T)

    def key_block(j, results):
        dq, dk, dv = results
        k_j, v_j = _cut(k, j, block), _cut(v, j, block)

        def query_block(n, state):
            dq, dk_j, dv_j = state
            i = order[j, n]
            q_i, g_i = _cut(q, i, block), _cut(g, i, block)
            scores, allowed = _scores(q_i, k_j, _cut_mask(mask, i, block), j * block)
            p = jnp.where(allowed, jnp.exp(scores - _cut(lse, i, block)[..., None]), 0)
            ds = p * (_product("bhte,bhse->bhts", g_i, v_j) - _cut(delta, i, block)[..., None])
            ds = ds.astype(q.dtype)
            dq = _paste(dq, _cut(dq, i, block) + _product("bhts,bhsc->bhtc", ds, k_j), i)
            dk_j += _product("bhts,bhtc->bhsc", ds, q_i)
            dv_j += _product("bhts,bhte->bhse", p.astype(g.dtype), g_i)
            return dq, dk_j, dv_j

        state = dq, _full(k, k_j.shape, 0), _full(v, v_j.shape, 0)
        dq, dk_j, dv_j = jax.lax.fori_loop(0, count[j], query_block, state)
        return dq, _paste(dk, dk_j, j), _paste(dv, dv_j, j)

    results = _full(q, q.shape, 0), _full(k, k.shape, 0, k.dtype), _full(v, v.shape, 0, v.dtype)
    dq, dk, dv = jax.lax.fori_loop(0, k.shape[2] // block, key_block, results)
    return dq.astype(q.dtype), dk, dv


def _scores(q_i, k_j, mask_i: IntervalMask, start):
    """Scores float32 of one tile whose first key is `start`, NEGATIVE where not allowed; and what is allowed."""
    allowed = IntervalMask(*(m - start for m in mask_i)).dense(k_j.shape[2])[:, None]
    return jnp.where(allowed, _product("bhtc,bhsc->bhts", q_i, k_j), NEGATIVE), allowed


def _product(equation: str, *arrays):
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _cut(x, i, block: int):
    """Block i along the positions of [b, h, t, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=2)


def _cut_mask(mask: IntervalMask, i, block: int) -> IntervalMask:
    return IntervalMask(*(jax.lax.dynamic_slice_in_dim(m, i * block, block, axis=1) for m in mask))


def _paste(x, new, i):
    return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), i * new.shape[2], axis=2)


def _full(like, shape, value, dtype=jnp.float32):
    """A constant that varies over the mesh axes over which `like` does, as a loop inside `jax.shard_map` wants it."""
    return jnp.full_like(like, value, dtype, shape=shape)
