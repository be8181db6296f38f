"""Rotary positions in two dimensions.

Half of the rotary pairs turn with the row coordinate, half with the column coordinate; a text token stands at (p, p),
so a text-only row is ordinary 1-D RoPE. Source: Su et al., RoFormer, arXiv 2104.09864; 2-D form, kexue.fm/archives/8397.

Letters: b rows, t positions, h heads, c query/key width (a multiple of 4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Of the angles, float32 [b, 1, t, c]: computed once, used by every layer.

    Both halves of `cos` are alike, the first half of `sin` is negated: a rotation is then two products and one swap of
    halves, which XLA's CPU backend computes several times faster than four products of halves.
    """

    cos: jax.Array
    sin: jax.Array


def rotation(position: jax.Array, width: int, base: float) -> Rotation:
    """Angles of positions [b, t, 2] for queries and keys of `width`."""
    frequencies = base ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    angles = jnp.concatenate([position[..., :1] * frequencies, position[..., 1:] * frequencies], axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return Rotation(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))


def rotate(x: jax.Array, angles: Rotation) -> jax.Array:
    """Turn x [b, h, t, c]; pair i is (x[i], x[i + c / 2]). Dot products then depend on position differences only."""
    first, second = jnp.split(x, 2, axis=-1)
    swapped = jnp.concatenate([second, first], axis=-1)
    return x * angles.cos.astype(x.dtype) + swapped * angles.sin.astype(x.dtype)
