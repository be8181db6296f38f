"""Rotary positions in two dimensions.

axial   half of the rotary pairs turn with the row coordinate, half with the column coordinate; a text token stands at
        (p, p), so a text-only row is ordinary 1-D RoPE
mixed   every pair turns with the product of the position and a direction of its own, learned, by layer and head; it
        starts in pairs of orthogonal directions, turned at random

Sources: Su et al., RoFormer, arXiv 2104.09864; 2-D form, kexue.fm/archives/8397; mixed, Heo et al., arXiv 2403.13298.

Letters: b rows, t positions, h heads, c query/key width (a multiple of 4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Of the angles, float32 [b, 1 or h, t, c]: axial ones are computed once and used by every layer.

    Both halves of `cos` are alike, the first half of `sin` is negated: a rotation is then two products and one swap of
    halves, which XLA's CPU backend computes several times faster than four products of halves.
    """

    cos: jax.Array
    sin: jax.Array


def rotation(position: jax.Array, width: int, base: float) -> Rotation:
    """Angles of positions [b, t, 2] for queries and keys of `width`."""
    frequencies = base ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    angles = jnp.concatenate([position[..., :1] * frequencies, position[..., 1:] * frequencies], axis=-1)
    return _both_halves(angles[:, None])


def mixed_rotation(position: jax.Array, frequencies: jax.Array) -> Rotation:
    """Angles of positions [b, t, 2] under `frequencies` [h, c / 2, 2]."""
    return _both_halves(jnp.einsum("btx,hcx->bhtc", position, frequencies))


def mixed_frequencies(key: jax.Array, heads: int, width: int, base: float) -> jax.Array:
    """Where learned frequencies [h, c / 2, 2] start."""
    magnitude = base ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    turn = jax.random.uniform(key, (heads, 1), maxval=2 * jnp.pi)
    axes = [jnp.stack([jnp.cos(a), jnp.sin(a)], axis=-1) for a in (turn, turn + jnp.pi / 2)]
    return jnp.concatenate([magnitude[:, None] * axis for axis in axes], axis=1)


def _both_halves(angles: jax.Array) -> Rotation:
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotation(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))


def rotate(x: jax.Array, angles: Rotation) -> jax.Array:
    """Turn x [b, h, t, c]; pair i is (x[i], x[i + c / 2]). Dot products then depend on position differences only."""
    first, second = jnp.split(x, 2, axis=-1)
    swapped = jnp.concatenate([second, first], axis=-1)
    return x * angles.cos.astype(x.dtype) + swapped * angles.sin.astype(x.dtype)
