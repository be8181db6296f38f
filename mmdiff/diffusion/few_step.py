"""Objectives that teach a network whole steps, for drawing in one to eight evaluations.

An x-prediction network that is also told the length h = u - r of a step holds the mean velocity of the path from u to r:

    (1) U(z, u, h) = (z - net(z, u, h)) / [u],   [u] = max(u, clip);       U(z, u, 0) = v, the velocity at u itself
        z_r = z_u - h U(z_u, u, h),   which needs one evaluation, and is x_hat exactly when it ends at r = 0

With dU the change of U along the path while r stays, h U = int_r^u v gives U + h dU = v, which (2) and (3) make a
regression on the velocity of one document, sg stopping the gradient:

    (2) meanflow     | U + h sg(dU) - (z - x)/[u] |^2,   dU = the derivative of U in the direction (U(z, u, 0), 1, 1)
    (3) difference   the same, dU = (U(z, u, h) - U(z - d v, u - d, h - d)) / d,   d = min(0.01, h), v = sg(U(z, u, 0))
    (4) shortcut     | U - sg(two steps of h/2, averaged) |^2 where h > 0,   | U - (z - x)/[u] |^2 where h = 0

(2) needs forward-mode differentiation of the network; (3) and (4) need one more evaluation instead. Only z, u and h of
noised patches move: what they read, clean images and text, is the same for all of them, since nothing reads a noised patch.

Shapes: z, x [b, t, p]; u, h [b, t]; errors [b, t] float32.
Sources: MeanFlow arXiv 2505.13447; as a regression: improved MeanFlow 2512.02012; on pixels: pMF 2601.22158; shortcut
models 2410.12557.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

DIFFERENCE = 0.01  # of u; smaller ones lose digits in float32, larger ones bias the derivative

Average = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def step_errors(
    objective: str, average: Average, z: jax.Array, u: jax.Array, h: jax.Array, truth: jax.Array, moving: jax.Array
) -> tuple[jax.Array, Any]:
    """Squared errors of one batch, equations (2) to (4), averaged over the values of each patch.

    Args:
      objective: "meanflow", "difference" or "shortcut".
      average: (z, u, h) -> (U, anything else that the network gives; returned for the arguments z, u, h themselves).
      truth: (z - x) / [u].
      moving: bool [b, t], the noised patches.
    Raises:
      ValueError: unknown objective.
    """
    moves = moving.astype(z.dtype)
    column = lambda a: (a * moves)[..., None]
    if objective == "shortcut":
        mean, rest = average(z, u, h)
        half = h / 2
        first = average(z, u, half)[0]
        second = average(z - column(half) * first, u - half * moves, half)[0]
        halves = jax.lax.stop_gradient((first + second) / 2)
        wrong = mean - jnp.where((h > 0)[..., None], halves, truth)
    elif objective in ("meanflow", "difference"):
        velocity = jax.lax.stop_gradient(average(z, u, jnp.zeros_like(h))[0])
        if objective == "meanflow":
            mean, slope, rest = jax.jvp(average, (z, u, h), (column(jnp.ones_like(u)) * velocity, moves, moves), has_aux=True)
        else:
            mean, rest = average(z, u, h)
            d = jnp.where(h > 0, jnp.minimum(DIFFERENCE, h), DIFFERENCE)
            before = average(z - column(d) * velocity, u - d * moves, jnp.maximum(h - d, 0))[0]
            slope = (mean - before) / d[..., None]
        wrong = mean + h[..., None] * jax.lax.stop_gradient(slope) - truth
    else:
        raise ValueError(f"unknown few-step objective {objective!r}; known: meanflow, difference, shortcut.")
    return jnp.mean(jnp.square(wrong), axis=-1), rest
