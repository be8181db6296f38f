"""Training times: uniform numbers r in (0, 1) become noise times u.

    (1) logit_normal   1 - u = sigmoid(time_mean + time_std Phi^-1(r))
    (2) uniform        what the schedule calls uniform: u (flow), the angle (cosine), the table index (ddpm)
    (3) then           u <- shift u / (1 + (shift - 1) u)

The caller draws r and so chooses how evenly a batch covers the times (independent, stratified, low discrepancy).

Shapes: r and u have any one shape.
Sources: logit-normal times arXiv 2403.03206 (SD3), with JiT's numbers, arXiv 2511.13720.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from mmdiff import config
from mmdiff.diffusion import schedule


def stratified(there: jax.Array, key: jax.Array) -> jax.Array:
    """A number r from (0, 1) for each of the n entries of `there` that count, one from each of n equal parts, in their order;
    for the others any. float32, of the shape of `there`, which holds what is true or not zero."""
    counts = (there > 0).reshape(-1)
    rank, count = jnp.cumsum(counts) - 1, jnp.maximum(counts.sum(), 1)
    r = (jnp.maximum(rank, 0) + jax.random.uniform(key, counts.shape)) / count
    return jnp.clip(r, 1e-6, 1 - 1e-6).reshape(there.shape)


def sample_times(diffusion: config.Diffusion, r: jax.Array) -> jax.Array:
    """Noise times u in [0, 1] for uniform numbers r in (0, 1), of the same shape.

    `logit_normal` decreases in r and `uniform` increases; u may round to 0 or 1, where losses are finite.
    """
    match diffusion.time_sampling:
        case "logit_normal":
            u = jax.nn.sigmoid(-(diffusion.time_mean + diffusion.time_std * ndtri(r)))
        case "uniform":
            u = schedule.make_schedule(diffusion).uniform(r)
    return jnp.clip(schedule.shift_time(u, diffusion.shift), 0, 1)  # rounding may leave [0, 1] by one unit
