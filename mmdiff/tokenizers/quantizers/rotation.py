"""The rotation trick: a gradient for z that keeps its angle to the code.

With u = z/|z|, v = q/|q| and w = (u + v)/|u + v|, two reflections rotate u into v in the plane of the two:

    (1) R = (I - 2 w w^T) (I - 2 u u^T)         R u = v
    (2) q = |q|/|z| R z                         q/z held fixed, this is linear in z
    (3) dz = |q|/|z| R^T dq                     |dz| = |q|/|z| |dq|

The straight-through gradient dz = dq is the same wherever in its cell z lies; (3) depends on it. (1) is often expanded to
I - 2 w w^T + 2 v u^T; as a product it is orthogonal to a rounding even where u and v are nearly opposite and w mostly
rounding. Where they are exactly opposite w is 0, and the reflection that remains still maps u to v = -u.

Shapes: z, q [..., d], float32.
Source: Fifty et al., Restructuring vector quantization with the rotation trick, arXiv 2410.06424.
"""

import jax
import jax.numpy as jnp

from mmdiff.tokenizers.codebook import EPS, unit
from mmdiff.tokenizers.quantizers.base import straight_through


def rotate_to(z: jax.Array, q: jax.Array) -> jax.Array:
    """The value of q with the gradient (3) for z and none for q; finite also for z = -q and z = 0."""
    fixed, q = jax.lax.stop_gradient((z, q))
    u = unit(fixed)
    w = unit_or_zero(rounded(u) + rounded(unit(q)))
    reflected = z - 2 * (z * u).sum(-1, keepdims=True) * u
    rotated = reflected - 2 * (reflected * w).sum(-1, keepdims=True) * w
    return straight_through(rotated * length(q) / jnp.maximum(length(fixed), EPS), q)


def rounded(x: jax.Array) -> jax.Array:
    """x without its last bit. XLA may compute a value once for every use of it, and fuse the last product before a sum with
    that sum in one but not in another: nearly opposite vectors then had two different sums. Bits cannot be cut unrounded."""
    return jax.lax.reduce_precision(x, 8, 22)


def length(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=-1, keepdims=True)


def unit_or_zero(x: jax.Array) -> jax.Array:
    """x / |x| however short x is: a vector of rounding errors must become a unit vector, or (1) is no rotation."""
    size = length(x)
    return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), 0)
