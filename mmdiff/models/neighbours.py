"""Patches and the pixels around them: what an operation over a whole image needs, in a row of patches.

The patches of an image stand in raster order without gaps, so the patch above patch t stands at t - columns, the one to
its left at t - 1; `cell` (Rows.cell) says whether there is one. Letters: b rows, t positions, s side of a patch, o pixels
beyond its edge, c channels.
"""

import jax
import jax.numpy as jnp


def with_margin(patches: jax.Array, cell: jax.Array, margin: int) -> jax.Array:
    """Each patch [b, t, s, s, c] with `margin` pixels of its neighbours on all sides: [b, t, s + 2o, s + 2o, c].

    Zero beyond the edges of the image, and everywhere around positions that hold no patch.
    """
    above, below = _neighbours(patches, cell, vertical=True)
    tall = jnp.concatenate([above[:, :, -margin:], patches, below[:, :, :margin]], axis=2)
    left, right = _neighbours(tall, cell, vertical=False)
    return jnp.concatenate([left[:, :, :, -margin:], tall, right[:, :, :, :margin]], axis=3)


def overlap_add(windows: jax.Array, cell: jax.Array, margin: int) -> jax.Array:
    """Windows [b, t, s + 2o, s + 2o, c] that overlap by 2o pixels, faded into one another: patches [b, t, s, s, c].

    Weights rise and fall linearly over the overlap, and are normalised where an image ends.
    """
    side = windows.shape[2] - 2 * margin
    rise = (jnp.arange(2 * margin) + 0.5) / (2 * margin)
    weight = jnp.concatenate([rise, jnp.ones(side - 2 * margin), rise[::-1]])
    weight = jnp.broadcast_to((weight[:, None] * weight)[..., None], (*windows.shape[:4], 1))
    total = jnp.concatenate([windows * weight, weight], axis=-1)
    for axis, vertical in ((2, True), (3, False)):
        before, after = _neighbours(total, cell, vertical)
        take = lambda a, start, stop, axis=axis: jax.lax.slice_in_dim(a, start, stop, axis=axis)
        own = take(total, margin, margin + side)
        from_before = take(before, margin + side, side + 2 * margin)
        from_after = take(after, 0, margin)
        middle = take(own, margin, side - margin)
        total = jnp.concatenate(
            [take(own, 0, margin) + from_before, middle, take(own, side - margin, side) + from_after], axis=axis
        )
    return total[..., :-1] / total[..., -1:]


def _neighbours(patches: jax.Array, cell: jax.Array, vertical: bool) -> tuple[jax.Array, jax.Array]:
    """The patches above and below (or left and right) of each [b, t, ...]; zeros where there is none."""
    here = jnp.arange(cell.shape[1])
    step = cell[..., 3] if vertical else 1
    place, count = (cell[..., 0], cell[..., 2]) if vertical else (cell[..., 1], cell[..., 3])
    return _taken(patches, here - step, place > 0), _taken(patches, here + step, place + 1 < count)


def _taken(patches: jax.Array, index: jax.Array, exists: jax.Array) -> jax.Array:
    tail = (1,) * (patches.ndim - 2)
    index = jnp.where(exists, index, 0).reshape(*exists.shape, *tail)
    return jnp.where(exists.reshape(*exists.shape, *tail), jnp.take_along_axis(patches, index, axis=1), 0)
