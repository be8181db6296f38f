"""What the tiled forms of attention share: the tiles that must be visited, and a backward pass that recomputes scores.

With s_tj = scale * q_t . k_j, and p_tj = 0 wherever the mask forbids (t, j):

    (1) lse_t = log sum_j exp(s_tj)         (2) p_tj = exp(s_tj - lse_t)         (3) out_t = sum_j p_tj v_j

and for a gradient g_t of out_t:

    (4) delta_t = g_t . out_t               (5) ds_tj = p_tj (g_t . v_j - delta_t)
    (6) dq_t = scale * sum_j ds_tj k_j      (7) dk_j = scale * sum_t ds_tj q_t      (8) dv_j = sum_t p_tj g_t

The forward pass keeps `out` and `lse` only, both under the name "attention" (`jax.checkpoint` with the policy
`save_only_these_names("attention")` then recomputes the projections around attention, but not attention itself); the
backward pass goes tile by tile through (2) and (5). A tile is a block of queries against a block of keys; tiles that
the mask forbids altogether are never computed. A query that may read nothing gets zeros.

Letters: b rows, t queries, s keys, h heads, c query/key width, e value width, i query blocks, j key blocks.
Sources: Rabe and Staats, arXiv 2112.05682; Dao et al., FlashAttention, arXiv 2205.14135; Dao, FlashAttention-2, 2307.08691.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmdiff.layout import IntervalMask

NEGATIVE = -1e30  # finite, so that a fully masked tile gives zeros and not NaN
SAVED = "attention"  # the name of `out` and `lse` for rematerialisation policies


class Passes(NamedTuple):
    """The two directions of one implementation, all sizes multiples of its blocks; static, so both must be hashable.

    forward(q, k, v, mask) -> out [b, h, t, e], lse float32 [b, h, t]
    backward(q, k, v, mask, lse, delta, g) -> dq, dk, dv, where `q` carries the scale and `dq` is the gradient of that q
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputing(passes: Passes, q, k, v, mask: IntervalMask) -> jax.Array:
    """`passes.forward` with `passes.backward` as its gradient."""
    return passes.forward(q, k, v, mask)[0]


def _forward(passes: Passes, q, k, v, mask):
    out, lse = (checkpoint_name(x, SAVED) for x in passes.forward(q, k, v, mask))
    return out, (q, k, v, mask, out, lse)


def _backward(passes: Passes, kept, g):
    q, k, v, mask, out, lse = kept
    delta = jnp.einsum("bhte,bhte->bht", g, out, preferred_element_type=jnp.float32)
    return *passes.backward(q, k, v, mask, lse, delta, g), None


recomputing.defvjp(_forward, _backward)


def tiled_attention(passes: Passes, q, k, v, mask: IntervalMask, *, scale: float, block: tuple[int, int]) -> jax.Array:
    """Attention [b, h, t, e] by `passes`, with queries and keys filled up to multiples of `block`."""
    length, keys = q.shape[2], k.shape[2]
    q = fill_up(q * jnp.asarray(scale, q.dtype), 2, block[0])
    k, v = fill_up(k, 2, block[1]), fill_up(v, 2, block[1])
    mask = IntervalMask(
        *(fill_up(jnp.minimum(m, keys), 1, block[0]) for m in mask)
    )  # what is filled in is not read and reads nothing
    return recomputing(passes, q, k, v, mask)[:, :, :length]


def fill_up(x, axis: int, multiple: int):
    """Zeros behind `x`, up to a multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)]) if missing else x


def needed_tiles(mask: IntervalMask, keys: int, block: tuple[int, int]) -> jax.Array:
    """bool [b, i, j]: whether any query of block i may read any key of block j."""
    start = jnp.arange(0, keys, block[1], dtype=jnp.int32)
    stop = jnp.minimum(start + block[1], keys)

    def touched(begin, end):
        begin, end = begin[..., None], end[..., None]
        return (begin < end) & (begin < stop) & (start < end)

    mask = IntervalMask(*(fill_up(m, 1, block[0]) for m in mask))
    any_key = touched(mask.context_start, mask.context_end) | touched(mask.block_start, mask.block_end)  # [b, t, j]
    return any_key.reshape(any_key.shape[0], -1, block[0], any_key.shape[-1]).any(axis=2)


def needed_first(needed) -> tuple[jax.Array, jax.Array]:
    """bool [..., n] to the indices int32 [..., n] of its true entries, in order, then the others; and their number [...]."""
    return jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32), needed.sum(axis=-1, dtype=jnp.int32)
