"""Softmax attention under an IntervalMask.

    out_t = sum_s softmax_s(scale * q_t . k_s  where the mask allows s) v_s

Letters: b rows, t queries, s keys, h heads, c query/key width, e value width; heads stand before positions, so that a
cache is read without a transposed copy. Softmax in float32.

Keys come in parts, one behind the other (a cache, then the row's own); the mask counts through all of them. Scores are
computed part by part and joined before the softmax, so no part is copied either.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mmdiff.config_model import DENSE_LIMIT
from mmdiff.layout import IntervalMask
from mmdiff.nn import attention_blockwise, attention_pallas
from mmdiff.nn.attention_tiled import NEGATIVE, Passes, tiled_attention
from mmdiff.parallel.sharding import NOWHERE, Placement


class KeyValue(NamedTuple):
    """Keys [b, h, s, c] and values [b, h, s, e] of one layer."""

    k: jax.Array
    v: jax.Array


class Growing(NamedTuple):
    """Context of one layer while text is written: a finished cache, and a buffer with a column for each new token."""

    cache: KeyValue
    fresh: KeyValue  # [b, h, m, .], as `squeezed`
    column: jax.Array  # int32 [], or [b]; where the next token goes, in every row or in each


def join(context: KeyValue | Growing | None, own: KeyValue) -> tuple[list[KeyValue], KeyValue]:
    """The parts a layer attends to, and what the caller keeps: `own`, or the buffer with `own` in it."""
    if context is None:
        return [own], own
    if isinstance(context, Growing):
        # written first and read afterwards, so that a loop needs no second copy
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)
        update = jax.vmap(update) if context.column.ndim else update
        at = lambda old, new: update(old, squeezed(new), context.column)
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
    place: Placement = NOWHERE,
) -> jax.Array:
    """Attend under `mask`.

    Args:
      q: [b, h, t, c]; parts: keys and values, s positions in all.
      mask: vectors [b, t] over the s positions.
      impl: `dense` materialises the scores; `blockwise` needs O(t) memory and skips what the mask forbids; `pallas` does
        the same in TPU kernels; `auto` is dense up to DENSE_LIMIT scores, then the kernels where the program is compiled
        for a TPU (also ahead of time, on a machine without one) and blockwise elsewhere.
      place: the mesh, if rows, heads or values are split over one.
    Returns:
      [b, h, t, e]
    Raises:
      ValueError: `impl` is unknown, or cannot do this.
    """
    keys = sum(part.k.shape[2] for part in parts)
    if impl == "dense" or (impl == "auto" and q.shape[2] * keys <= DENSE_LIMIT):
        return dense_attention(q, parts, mask, scale=scale)
    k, v = (arrays[0] if len(parts) == 1 else jnp.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True))
    tiled = {
        "auto": automatic,
        "blockwise": attention_blockwise.blockwise_attention,
        "pallas": attention_pallas.pallas_attention,
    }
    if impl not in tiled:
        raise ValueError(f"unknown attention implementation {impl!r}; use 'auto', 'dense', 'blockwise' or 'pallas'.")
    return on_each_device(functools.partial(tiled[impl], scale=scale), q, k, v, mask, place)


def automatic(q, k, v, mask: IntervalMask, *, scale: float) -> jax.Array:
    """The kernels where the program is compiled for a TPU and they can take these arrays, else blockwise."""
    if attention_pallas.unsupported(q, k, v):
        return attention_blockwise.blockwise_attention(q, k, v, mask, scale=scale)
    block = attention_pallas.BLOCK  # a multiple of the other's
    return tiled_attention(by_platform(), q, k, v, mask, scale=scale, block=(block, block))


def on_each_device(tiled: Callable[..., jax.Array], q, k, v, mask: IntervalMask, place: Placement) -> jax.Array:
    """`tiled(q, k, v, mask)`, each device with its own rows, and heads or (of one wide head) slice of the values.

    XLA cannot cut kernels by itself, and loops over rows of different devices would wait for each other. The gradients
    of q and k are linear in the slices of v, so that their sum over devices, which shard_map takes, is exact.
    """
    if not place.split:
        return tiled(q, k, v, mask)
    spec = lambda x: place.spec(x.shape, ("rows", "heads", None, None))
    values = place.spec(v.shape, ("rows", None, None, "expansion")) if v.shape[1] == 1 else spec(v)
    by_row = place.spec(mask.context_start.shape, ("rows", None))
    specs = (spec(q), spec(k), values, IntervalMask(by_row, by_row, by_row, by_row))
    return jax.shard_map(tiled, mesh=place.mesh, in_specs=specs, out_specs=values, check_vma=False)(q, k, v, mask)


@functools.cache
def by_platform() -> Passes:
    """The kernels where the program is lowered for a TPU, else the plain form."""
    kernels = attention_pallas.passes(attention_pallas.BLOCK, interpret=False)
    plain = attention_blockwise.passes(attention_blockwise.BLOCK)
    choose = lambda tpu, default: lambda *arrays: jax.lax.platform_dependent(*arrays, tpu=tpu, default=default)
    return Passes(*map(choose, kernels, plain))


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
