"""Prediction spaces: from what the network predicts to what is wanted.

With z = alpha x + sigma eps and v = eps - x, any one of x, eps, v gives the others. Dividing z by alpha + sigma turns
every schedule into the flow, with the same x, eps, v and noise time:

    (1) y = z / (alpha + sigma) = (1 - u) x + u eps,     u = sigma / (alpha + sigma)

so that the conversions are those of the flow:

    from \\ to   x                        eps                      v
    x           x                        (y - (1-u) x) / [u]      (y - x) / [u]
    eps         (y - u eps) / [1-u]      eps                      (eps - y) / [1-u]
    v           y - u v                  y + (1-u) v              v

[d] = max(d, clip) bounds the divisors. For the flow, y = z, and x -> v is JiT's v_hat = (z - x_hat) / max(u, clip).
Each entry is affine in the prediction, so the error of a prediction is only multiplied by the slope of its entry:

    (2) convert(output) - convert(truth) = gain (output - truth)

Clipping biases a conversion where it acts, on both sides of a loss alike: a perfect prediction still has no error. A
sampler that turns eps into x at noise level s therefore needs a clip below 1 / (1 + s); x from x or v is never clipped.

Shapes: output and z are [..., P]; alpha and sigma broadcast against them (usually [..., 1]).
Source: JiT, arXiv 2511.13720, Table 1 (there t = 1 - u and v has the opposite sign).
"""

from typing import Literal

import jax
import jax.numpy as jnp

Space = Literal["x", "eps", "v"]


def convert(
    output: jax.Array, z: jax.Array, alpha: jax.Array, sigma: jax.Array, *, source: Space, target: Space, clip: float
) -> jax.Array:
    """A prediction of `source`, as a prediction of `target`; shape of output."""
    total = alpha + sigma
    y, data, noise = z / total, alpha / total, sigma / total
    match source, target:
        case "x", "eps":
            return (y - data * output) / jnp.maximum(noise, clip)
        case "x", "v":
            return (y - output) / jnp.maximum(noise, clip)
        case "eps", "x":
            return (y - noise * output) / jnp.maximum(data, clip)
        case "eps", "v":
            return (output - y) / jnp.maximum(data, clip)
        case "v", "x":
            return y - noise * output
        case "v", "eps":
            return y + data * output
        case _:
            return output


def gain(alpha: jax.Array, sigma: jax.Array, *, source: Space, target: Space, clip: float) -> jax.Array:
    """By how much `convert` multiplies an error, up to its sign, equation (2); shape of alpha."""
    total = alpha + sigma
    data, noise = alpha / total, sigma / total
    match source, target:
        case "x", "eps":
            return data / jnp.maximum(noise, clip)
        case "x", "v":
            return 1 / jnp.maximum(noise, clip)
        case "eps", "x":
            return noise / jnp.maximum(data, clip)
        case "eps", "v":
            return 1 / jnp.maximum(data, clip)
        case "v", "x":
            return noise
        case "v", "eps":
            return data
        case _:
            return jnp.ones_like(total)


def truth(x: jax.Array, eps: jax.Array, space: Space) -> jax.Array:
    """What a perfect prediction of `space` is: x, eps or v = eps - x."""
    return {"x": x, "eps": eps, "v": eps - x}[space]
