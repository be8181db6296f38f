"""Softmax attention under an IntervalMask.

    out_t = sum_s softmax_s(scale * q_t . k_s  where the mask allows s) v_s

Letters: b rows, t queries, s keys, h heads, c query/key width, e value width. Softmax in float32.

With a cache the keys are `cache` followed by `k`: the mask counts cached slots first. Scores are computed for the two
parts apart and joined before the softmax, so the cache is never copied.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mmdiff.layout import IntervalMask

NEGATIVE = -1e30  # finite, so that a fully masked tile gives zeros and not NaN
BLOCK = 256
DENSE_LIMIT = 1024 * 1024  # queries times keys up to which `auto` takes the dense form


class KeyValue(NamedTuple):
    """Keys and values of one layer: [b, s, h, c] and [b, s, h, e] as made, [b, h, s, c] and [b, h, s, e] in a cache."""

    k: jax.Array
    v: jax.Array


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: IntervalMask,
    *,
    scale: float,
    cache: KeyValue | None = None,
    impl: Literal["auto", "dense", "blockwise"] = "auto",
) -> jax.Array:
    """Attend under `mask`.

    Args:
      q: [b, t, h, c]; k: [b, s, h, c]; v: [b, s, h, e].
      mask: vectors [b, t] over keys numbered cache first, then `k`.
      cache: keys and values that stand before `k`, heads first: reading them then needs no transposed copy.
      impl: `dense` materialises the scores; `blockwise` needs O(t) memory; `auto` is dense up to DENSE_LIMIT scores.
    Returns:
      [b, t, h, e]
    """
    keys = k.shape[1] + (cache.k.shape[2] if cache is not None else 0)
    if impl == "auto":
        impl = "dense" if q.shape[1] * keys <= DENSE_LIMIT else "blockwise"
    if impl == "dense":
        return dense_attention(q, k, v, mask, scale=scale, cache=cache)
    if impl == "blockwise":
        if cache is not None:
            k = jnp.concatenate([cache.k.swapaxes(1, 2), k], axis=1)
            v = jnp.concatenate([cache.v.swapaxes(1, 2), v], axis=1)
        return blockwise_attention(q, k, v, mask, scale=scale)
    raise ValueError(f"unknown attention implementation {impl!r}; use 'auto', 'dense' or 'blockwise'.")


def dense_attention(q, k, v, mask: IntervalMask, *, scale: float, cache: KeyValue | None = None) -> jax.Array:
    """The reference: all scores at once."""
    q = q * jnp.asarray(scale, q.dtype)  # on q, the smaller array
    scores = _scores(q, k)
    if cache is not None:
        cached = jnp.einsum("bthc,bhsc->bhts", q, cache.k, preferred_element_type=jnp.float32)
        scores = jnp.concatenate([cached, scores], axis=-1)
    allowed = mask.dense(scores.shape[-1])[:, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, NEGATIVE), axis=-1).astype(v.dtype)
    if cache is None:
        return _mix(weights, v)
    split = cache.k.shape[2]
    return jnp.einsum("bhts,bhse->bthe", weights[..., :split], cache.v) + _mix(weights[..., split:], v)


def _scores(q, k) -> jax.Array:
    """float32 [b, h, t, s]."""
    if q.shape[2] == 1:  # one head: no transposes
        return jnp.einsum("btc,bsc->bts", q[:, :, 0], k[:, :, 0], preferred_element_type=jnp.float32)[:, None]
    return jnp.einsum("bthc,bshc->bhts", q, k, preferred_element_type=jnp.float32)


def _mix(weights, v) -> jax.Array:
    """[b, t, h, e]."""
    if v.shape[2] == 1:
        return jnp.einsum("bts,bse->bte", weights[:, 0], v[:, :, 0])[:, :, None]
    return jnp.einsum("bhts,bshe->bthe", weights, v)


def blockwise_attention(q, k, v, mask: IntervalMask, *, scale: float, block: int = BLOCK) -> jax.Array:
    """The same result in O(t) memory: running softmax over key blocks, recomputed in the backward pass.

    Source: Rabe and Staats, self-attention does not need O(n^2) memory, arXiv 2112.05682.
    """
    queries, keys = q.shape[1], k.shape[1]
    q = _pad_axis(q * jnp.asarray(scale, q.dtype), block)
    k, v = _pad_axis(k, block), _pad_axis(v, block)
    padded = IntervalMask(*(_pad_axis(m, block) for m in mask))  # padded queries: empty intervals
    k_blocks, v_blocks = _blocks(k, block), _blocks(v, block)
    starts = jnp.arange(0, k.shape[1], block, dtype=jnp.int32)

    @jax.checkpoint
    def one_query_block(inputs):
        q_block, mask_block = inputs

        def step(carry, key_block):
            best, total, mixed = carry
            k_block, v_block, start = key_block
            here = IntervalMask(*(m - start for m in mask_block)).dense(block)
            allowed = here & (start + jnp.arange(block) < keys)
            scores = jnp.where(allowed[:, None], _scores(q_block, k_block), NEGATIVE)
            new_best = jnp.maximum(best, scores.max(axis=-1))
            weights = jnp.where(allowed[:, None], jnp.exp(scores - new_best[..., None]), 0.0)
            shrink = jnp.exp(best - new_best)
            total = total * shrink + weights.sum(axis=-1)
            part = jnp.einsum("bhts,bshe->bhte", weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32)
            return (new_best, total, mixed * shrink[..., None] + part), None

        rows, heads = q.shape[0], q.shape[2]
        carry = (
            jnp.full((rows, heads, block), NEGATIVE, jnp.float32),
            jnp.zeros((rows, heads, block), jnp.float32),
            jnp.zeros((rows, heads, block, v.shape[-1]), jnp.float32),
        )
        (_, total, mixed), _ = jax.lax.scan(jax.checkpoint(step), carry, (k_blocks, v_blocks, starts))
        return (mixed / jnp.maximum(total, 1e-30)[..., None]).swapaxes(1, 2).astype(v.dtype)

    mask_blocks = IntervalMask(*(_blocks(m, block) for m in padded))
    out = jax.lax.map(one_query_block, (_blocks(q, block), mask_blocks))
    return out.swapaxes(0, 1).reshape(q.shape[0], -1, *out.shape[3:])[:, :queries]


def _pad_axis(x, block: int):
    extra = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))


def _blocks(x, block: int):
    """[b, t, ...] to [t / block, b, block, ...]."""
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)
