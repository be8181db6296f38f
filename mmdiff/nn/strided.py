"""Strided attention: a position of an image reads what stands before the image and, inside it, a part of what came before.

    even layers    its own column, down to itself
    odd layers     the positions before it back to the one above it, a row's length

Two layers on, everything before it has reached it, for n sqrt(n) pairs of an image's n positions in place of n^2 / 2. Both
parts are one interval of keys: even layers work on images column by column (`View.order`), and text reads whole images, whose
order is nothing to it. Source: Child et al., sparse transformers, arXiv 1904.10509, section 4.2.

It is for images that are read in order (layout.images="next_..."). Letters: b rows, t positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmdiff.layout import IntervalMask


class View(NamedTuple):
    """How a layer sees a row."""

    mask: IntervalMask  # of queries in the layer's order
    order: jax.Array | None = None  # int32 [b, t]; which position stands where; None: as in the row
    back: jax.Array | None = None  # its inverse


def views(mask: IntervalMask, cell: jax.Array, whole: bool) -> tuple[View, View]:
    """Of even and of odd layers.

    Args:
      mask: [b, t], by which a position of an image reads all keys up to its own; where a cache stands before the row, an
        image must begin the row, or all of the row but one position be in the cache.
      cell: int32 [b, t, 4], see layout.Rows.
      whole: every image is here from its first position to its last; else there is one position, whose keys stand where
        `by_column` says.
    """
    row, col, rows, cols = jnp.moveaxis(cell, -1, 0)
    inside, index = rows > 0, row * cols + col
    own = jnp.maximum(mask.context_end, mask.block_end) - 1  # the key of the query itself
    first = own - index
    before = jnp.where(inside, jnp.minimum(mask.context_end, first), mask.context_end)

    def block(start, end) -> IntervalMask:
        start, end = jnp.where(inside, start, mask.block_start), jnp.where(inside, end, mask.block_end)
        return IntervalMask(mask.context_start, before, start, end)

    down, along = block(first + col * rows, first + by_column(cell) + 1), block(jnp.maximum(first, own - cols), own + 1)
    if not whole:
        return View(down), View(along)
    here = jnp.broadcast_to(jnp.arange(cell.shape[1], dtype=jnp.int32), inside.shape)
    at_top = here - index
    below = index % jnp.maximum(rows, 1) * cols + index // jnp.maximum(rows, 1)  # who stands at this place, column by column
    order = jnp.where(inside, at_top + below, here)
    back = jnp.where(inside, at_top + by_column(cell), here)
    return View(IntervalMask(*(taken(part, order) for part in down)), order, back), View(along)


def by_column(cell: jax.Array) -> jax.Array:
    """The place of cells [..., 4] in their image, column by column, int32 [...]; 0 at text."""
    return cell[..., 1] * cell[..., 2] + cell[..., 0]


def taken(x: jax.Array, order: jax.Array) -> jax.Array:
    """x [b, t, ...] in another order [b, t]."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
