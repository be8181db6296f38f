"""The bodies of the TPU kernels of attention_pallas.py: forward, dq, and dk with dv. Equations: attention_tiled.py.

A tile of scores is [keys, queries], so all that belongs to a query (mask, `lse`, `delta`, the running softmax) is a row
[1, queries]: nothing is padded to 128 lanes in memory, reductions and broadcasts go along sublanes.

One grid step is one visit of a tile and one slice of the values. `Visits` says where this step is:

    staying block   the one whose result is being made: queries (forward, dq) or keys (dkv)
    passing block   the other one

Letters: q, k, v, g blocks without their row and head axes; x is the number of the slice of e.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mmdiff.nn.attention_tiled import NEGATIVE

HIGH = 16  # a visit is `staying << HIGH | passing`
LOW = (1 << HIGH) - 1


class Visits(NamedTuple):
    """The list of visits of every row, in scalar memory: int32 [b, n] and [b]."""

    listed: Any
    count: Any

    def staying(self, row, n):
        return self.listed[row, n] >> HIGH

    def passing(self, row, n):
        return self.listed[row, n] & LOW

    def here(self, row, n):
        """(the staying block begins, there is a tile to compute, the staying block ends)."""
        count, block = self.count[row], self.staying(row, n)
        begins = (n == 0) | (self.staying(row, jnp.maximum(n - 1, 0)) != block)
        last = self.listed.shape[1] - 1
        ends = (n == count - 1) | ((n < count) & (self.staying(row, jnp.minimum(n + 1, last)) != block))
        return begins, n < count, ends


def forward_kernel(listed, count, q, k, v, mask, out, lse, best, total, mixed):
    """Grid (b, h, x, n). Scratch: best, total [1, queries], mixed [values, queries]."""
    visits, row, n = Visits(listed, count), pl.program_id(0), pl.program_id(3)
    begins, inside, ends = visits.here(row, n)

    @pl.when(begins)
    def begin():
        best[...] = jnp.full_like(best, NEGATIVE)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(inside)
    def visit():
        scores, allowed = _scores(k[...], q[...], mask[...], visits.passing(row, n))
        new_best = jnp.maximum(best[...], scores.max(axis=0, keepdims=True))
        weights = jnp.where(allowed, jnp.exp(scores - new_best), 0)
        shrink = jnp.exp(best[...] - new_best)
        best[...] = new_best
        total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
        mixed[...] = mixed[...] * shrink + _product(v[...], weights.astype(v.dtype), 0, 0)

    @pl.when(ends)
    def end():
        sums = jnp.where(total[...] > 0, total[...], 1)  # nothing to read: `mixed` is 0
        out[...] = (mixed[...] / sums).T.astype(out.dtype)
        lse[...] = best[...] + jnp.log(sums)


def dq_kernel(listed, count, q, k, v, mask, lse, delta, g, dq, p, gv, total):
    """Grid (b, h, n, x). Scratch: p, gv [keys, queries], total [c, queries]."""
    visits, row, n, x = Visits(listed, count), pl.program_id(0), pl.program_id(2), pl.program_id(3)
    begins, inside, ends = visits.here(row, n)
    last = pl.num_programs(3) - 1

    @pl.when(begins & (x == 0))
    def begin():
        total[...] = jnp.zeros_like(total)

    @pl.when(inside)
    def visit():
        _add_slice(x, p, gv, q, k, v, mask, lse, g, visits.passing(row, n))

    @pl.when(inside & (x == last))
    def complete():
        ds = (p[...] * (gv[...] - delta[...])).astype(k.dtype)
        total[...] += _product(k[...], ds, 0, 0)

    @pl.when(ends & (x == last))
    def end():
        dq[...] = total[...].T.astype(dq.dtype)


def dkv_kernel(listed, count, q, k, v, mask, lse, delta, g, dk, dv, p, gv, dk_total, dv_total):
    """Grid (b, h, n, x). Scratch: p, gv [keys, queries], dk_total [keys, c], dv_total [slices, keys, values]."""
    visits, row, n, x = Visits(listed, count), pl.program_id(0), pl.program_id(2), pl.program_id(3)
    begins, inside, ends = visits.here(row, n)
    slices, _, values = dv_total.shape

    @pl.when(begins & (x == 0))
    def begin():
        dk_total[...] = jnp.zeros_like(dk_total)
        dv_total[...] = jnp.zeros_like(dv_total)

    @pl.when(inside)
    def visit():
        _add_slice(x, p, gv, q, k, v, mask, lse, g, visits.staying(row, n))
        dv_total[x] += _product(p[...].astype(g.dtype), g[...], 1, 0)

    @pl.when(inside & (x == slices - 1))
    def complete():
        ds = (p[...] * (gv[...] - delta[...])).astype(q.dtype)
        dk_total[...] += _product(ds, q[...], 1, 0)

    @pl.when(ends & (x == slices - 1))
    def end():
        dk[...] = dk_total[...].astype(dk.dtype)
        for i in range(slices):
            dv[:, i * values : (i + 1) * values] = dv_total[i].astype(dv.dtype)


def _add_slice(x, p, gv, q, k, v, mask, lse, g, key_block):
    """p of (2) with the first slice of the values; g . v of (5), slice by slice."""

    @pl.when(x == 0)
    def first():
        scores, allowed = _scores(k[...], q[...], mask[...], key_block)
        p[...] = jnp.where(allowed, jnp.exp(scores - lse[...]), 0)
        gv[...] = jnp.zeros_like(gv)

    gv[...] += _product(v[...], g[...], 1, 1)


def _scores(k, q, mask, key_block):
    """Scores [keys, queries] in float32, NEGATIVE where not allowed; and what is allowed."""
    scores = _product(k, q, 1, 1)
    key = key_block * k.shape[0] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    context_start, context_end, block_start, block_end = (mask[i : i + 1] for i in range(4))
    allowed = ((context_start <= key) & (key < context_end)) | ((block_start <= key) & (key < block_end))
    return jnp.where(allowed, scores, NEGATIVE), allowed


def _product(a, b, axis_a: int, axis_b: int):
    """The product of two matrices over one axis of each, in float32."""
    # bfloat16 has one precision; the kernels' compiler rejects others, which jax_default_matmul_precision may ask for
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)
