"""Guidance on predictions of x, within an interval of noise levels.

    (1) x_hat = worse + scale (cond - worse) = cond + (scale - 1) (cond - worse)
    (2) x_hat <- m + (x_hat - m) (1 - r + r spread(cond) / spread(x_hat)),      m the image's mean

The worse prediction is that without the text (classifier-free guidance), or that of a weaker model of the same documents,
such as an earlier snapshot (autoguidance, which also works without text). (2) takes back, for r = 1, what (1) adds to the
contrast of the image. Outside the interval the prediction is used as it is (scale 1), which needs no other evaluation.

Shapes: predictions are [b, n, p]; sigma is the noise level sigma/alpha, a number or an array.
Sources: arXiv 2207.12598; autoguidance arXiv 2406.02507; interval arXiv 2404.07724; (2), there about 0, arXiv 2305.08891.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def guided(cond: jax.Array, worse: jax.Array, scale: ArrayLike) -> jax.Array:
    """The guided prediction, equation (1); exactly `cond` at scale 1."""
    return cond + (scale - 1) * (cond - worse)


def rescaled(x_hat: jax.Array, cond: jax.Array, amount: ArrayLike, real: jax.Array) -> jax.Array:
    """Equation (2) with r = `amount`; exactly `x_hat` for 0. `real`: bool [b, n], the patches that are not padding."""
    where = jnp.broadcast_to(real[..., None], x_hat.shape)
    mean = jnp.mean(x_hat, axis=(1, 2), keepdims=True, where=where)
    spread = lambda x: jnp.std(x, axis=(1, 2), keepdims=True, where=where)
    return x_hat + amount * (x_hat - mean) * (spread(cond) / jnp.maximum(spread(x_hat), 1e-6) - 1)


def inside(sigma, interval: tuple[ArrayLike, ArrayLike]):
    """Whether guidance acts at noise level sigma: lowest <= sigma <= highest, for numbers and arrays."""
    lowest, highest = interval
    return (sigma >= lowest) & (sigma <= highest)
