"""Classifier-free guidance on predictions of x, within an interval of noise levels.

    (1) x_hat = uncond + scale (cond - uncond) = cond + (scale - 1) (cond - uncond)

Outside the interval the conditional prediction is used alone (scale 1), which needs no unconditional evaluation.

Shapes: predictions are [..., P]; sigma is the noise level sigma/alpha, a number or an array.
Sources: arXiv 2207.12598; interval arXiv 2404.07724.
"""

import jax


def guided(cond: jax.Array, uncond: jax.Array, scale: float | jax.Array) -> jax.Array:
    """The guided prediction, equation (1); exactly `cond` at scale 1."""
    return cond + (scale - 1) * (cond - uncond)


def inside(sigma, interval: tuple[float | jax.Array, float | jax.Array]):
    """Whether guidance acts at noise level sigma: lowest <= sigma <= highest, for numbers and arrays."""
    lowest, highest = interval
    return (sigma >= lowest) & (sigma <= highest)
