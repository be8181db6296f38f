"""Softmax attention under an IntervalMask.

    out_t = sum_s softmax_s(scale * q_t . k_s  where the mask allows s) v_s

Letters: b rows, t queries, s keys, h heads, c query/key width, e value width; heads stand before positions, so that a
cache is read without a transposed copy. Softmax in float32.

Keys come in parts, one behind the other (a cache, then the row's own); the mask counts through all of them. Scores are
computed part by part and joined before the softmax, so no part is copied either.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mmdiff.layout import IntervalMask

NEGATIVE = -1e30  # finite, so that a fully masked tile gives zeros and not NaN
BLOCK = 256
DENSE_LIMIT = 1024 * 1024  # queries times keys up to which `auto` takes the dense form


class KeyValue(NamedTuple):
    """Keys [b, h, s, c] and values [b, h, s, e] of one layer."""

    k: jax.Array
    v: jax.Array


class Growing(NamedTuple):
    """Context of one layer while text is written: a finished cache, and a buffer with a column for each new token."""

    cache: KeyValue
    fresh: KeyValue  # [b, h, m, .], as `squeezed`
    column: jax.Array  # int32 []; where the next token goes, in every row


def join(context: KeyValue | Growing | None, own: KeyValue) -> tuple[list[KeyValue], KeyValue]:
    """The parts a layer attends to, and what the caller keeps: `own`, or the buffer with `own` in it."""
    if context is None:
        return [own], own
    if isinstance(context, Growing):
        # written first and read afterwards, so that a loop needs no second copy
        at = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, squeezed(new), context.column, axis=-2)
        fresh = jax.tree.map(at, context.fresh, own)
        heads_first = jax.tree.map(lambda new, buffer: buffer.reshape(*new.shape[:2], *buffer.shape[-2:]), own, fresh)
        return [context.cache, heads_first], fresh
    return [context, own], own


def squeezed(x: jax.Array) -> jax.Array:
    """[b, h, ...], without its head axis if that has length 1: XLA's CPU backend then updates buffers in place."""
    return x[:, 0] if x.shape[1] == 1 else x


def attention(
    q: jax.Array,
    parts: Sequence[KeyValue],
    mask: IntervalMask,
    *,
    scale: float,
    impl: Literal["auto", "dense", "blockwise", "pallas"] = "auto",
) -> jax.Array:
    """Attend under `mask`.

    Args:
      q: [b, h, t, c]; parts: keys and values, s positions in all.
      mask: vectors [b, t] over the s positions.
      impl: `dense` materialises the scores; `blockwise` needs O(t) memory; `auto` is dense up to DENSE_LIMIT scores.
    Returns:
      [b, h, t, e]
    """
    keys = sum(part.k.shape[2] for part in parts)
    if impl == "auto":
        impl = "dense" if q.shape[2] * keys <= DENSE_LIMIT else "blockwise"
    if impl == "dense":
        return dense_attention(q, parts, mask, scale=scale)
    if impl == "blockwise":
        k, v = (jnp.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True))
        return blockwise_attention(q, k, v, mask, scale=scale)
    raise ValueError(f"unknown attention implementation {impl!r}; use 'auto', 'dense' or 'blockwise'.")


def dense_attention(q, parts: Sequence[KeyValue], mask: IntervalMask, *, scale: float) -> jax.Array:
    """The reference: all scores at once. Weights are divided by their sum after the product with v, the smaller array."""
    q = q * jnp.asarray(scale, q.dtype)  # on q, the smaller array
    scores = jnp.concatenate([_scores(q, part.k) for part in parts], axis=-1)
    allowed = mask.dense(scores.shape[-1])[:, None]
    scores = jnp.where(allowed, scores, NEGATIVE)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(q.dtype)
    mixed, start = [], 0
    for part in parts:
        stop = start + part.v.shape[2]
        mixed.append(jnp.einsum("bhts,bhse->bhte", weights[..., start:stop], part.v))
        start = stop
    return (sum(mixed[1:], mixed[0]) / total).astype(q.dtype)


def _scores(q, k) -> jax.Array:
    """float32 [b, h, t, s]."""
    return jnp.einsum("bhtc,bhsc->bhts", q, k, preferred_element_type=jnp.float32)


def blockwise_attention(q, k, v, mask: IntervalMask, *, scale: float, block: int = BLOCK) -> jax.Array:
    """The same result in O(t) memory: running softmax over key blocks, recomputed in the backward pass.

    Source: Rabe and Staats, self-attention does not need O(n^2) memory, arXiv 2112.05682.
    """
    queries, keys = q.shape[2], k.shape[2]
    q = _pad_axis(q * jnp.asarray(scale, q.dtype), block, 2)
    k, v = _pad_axis(k, block, 2), _pad_axis(v, block, 2)
    mask_blocks = IntervalMask(*(_blocks(_pad_axis(m, block, 1), block, 1) for m in mask))  # padding: empty intervals
    k_blocks, v_blocks = _blocks(k, block, 2), _blocks(v, block, 2)
    starts = jnp.arange(0, k.shape[2], block, dtype=jnp.int32)

    @jax.checkpoint
    def one_query_block(inputs):
        q_block, mask_block = inputs

        def step(carry, key_block):
            best, total, mixed = carry
            k_block, v_block, start = key_block
            here = IntervalMask(*(m - start for m in mask_block)).dense(block)
            allowed = (here & (start + jnp.arange(block) < keys))[:, None]
            scores = jnp.where(allowed, _scores(q_block, k_block), NEGATIVE)
            new_best = jnp.maximum(best, scores.max(axis=-1))
            weights = jnp.where(allowed, jnp.exp(scores - new_best[..., None]), 0.0)
            shrink = jnp.exp(best - new_best)
            total = total * shrink + weights.sum(axis=-1)
            part = jnp.einsum("bhts,bhse->bhte", weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32)
            return (new_best, total, mixed * shrink[..., None] + part), None

        rows, heads = q.shape[:2]
        carry = (
            jnp.full((rows, heads, block), NEGATIVE, jnp.float32),
            jnp.zeros((rows, heads, block), jnp.float32),
            jnp.zeros((rows, heads, block, v.shape[-1]), jnp.float32),
        )
        (_, total, mixed), _ = jax.lax.scan(jax.checkpoint(step), carry, (k_blocks, v_blocks, starts))
        return (mixed / jnp.maximum(total, 1e-30)[..., None]).astype(v.dtype)

    out = jax.lax.map(one_query_block, (_blocks(q, block, 2), mask_blocks))  # [blocks, b, h, block, e]
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :queries]


def _pad_axis(x, block: int, axis: int):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, pad)


def _blocks(x, block: int, axis: int):
    """Cut an axis into blocks and move their number to the front."""
    cut = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)
