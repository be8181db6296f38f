"""Bilinear resizing as two matrix products, so that what a feature extractor sees does not depend on a library's version.

    (1) out = A_rows x A_cols^T        for every channel
    (2) A[i, j] ~ max(0, 1 - |(i + 1/2) n_in / n_out - 1/2 - j| / s),   rows normalised to sum 1

s = 1 is plain bilinear interpolation (half-pixel centres, "align_corners=False"), whose coordinates beyond the edge are
clamped to it; s = max(1, n_in / n_out) widens the triangle to the size of an output pixel ("antialias"). Sampling without
it aliases on the way down, which FID does by convention.

Shapes: images [n, h, w, 3]; matrices [out, in].
Source: Parmar et al., On Aliased Resizing and Surprising Subtleties in GAN Evaluation, arXiv 2104.11222.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=64)
def bilinear_matrix(size: int, out: int, antialias: bool) -> np.ndarray:
    """Equation (2), float32 [out, size]; the identity where the sizes are equal."""
    centres = (np.arange(out) + 0.5) * size / out - 0.5
    support = max(1.0, size / out) if antialias else 1.0
    if not antialias:
        centres = np.clip(centres, 0, size - 1)
    weights = np.clip(1 - np.abs(centres[:, None] - np.arange(size)) / support, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize(images: jax.Array, height: int, width: int, antialias: bool) -> jax.Array:
    """Equation (1): float32 [n, h, w, 3] to float32 [n, height, width, 3]."""
    rows = bilinear_matrix(images.shape[1], height, antialias)
    cols = bilinear_matrix(images.shape[2], width, antialias)
    exact = jax.lax.Precision.HIGHEST  # an accelerator would round pixels to eight bits on the way
    return jnp.einsum("ih,nhwc,jw->nijc", rows, images, cols, precision=exact)
