"""Noise schedules: what a noise time u in [0, 1] means.

A noised patch is z = alpha x + sigma eps, and the noise time is the same for every schedule:

    (1) u = sigma / (alpha + sigma),     sigma / alpha = u / (1 - u)          u = 0 is data, u = 1 is noise

so schedules differ only in the scale of z and in how training times are spread when they are drawn uniformly:

    (2) flow     alpha = 1 - u,     sigma = u                                 uniform in u
    (3) cosine   alpha = cos theta, sigma = sin theta, tan theta = u/(1-u)    uniform in the angle theta
    (4) ddpm     the same alpha and sigma as (3)                              uniform in the index of a 1000-entry table

(3) and (4) are both variance preserving: alpha^2 + sigma^2 = 1 at the ratio u/(1-u) leaves no freedom. The table of (4)
is alpha_t = prod_{k<=t} sqrt(1 - 0.02 k/1000), sigma_t = sqrt(1 - alpha_t^2), t = 1..1000.

A shift multiplies the noise level sigma/alpha by a constant, which is a map of times:

    (5) u' = shift u / (1 + (shift - 1) u)

Shapes: u has any shape; alpha and sigma have the shape of u. All is finite, with finite gradients, on all of [0, 1].
Sources: DDPM arXiv 2006.11239; the table is Su Jianlin's, kexue.fm/archives/9984; shift arXiv 2403.03206 (SD3).
"""

import dataclasses
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config


def _ddpm_levels(steps: int = 1000) -> np.ndarray:
    alpha = np.cumprod(np.sqrt(1 - 0.02 * np.arange(1, steps + 1) / steps))
    return np.sqrt(1 - alpha**2) / alpha


DDPM_LEVELS = _ddpm_levels()
"""float64 [1000], increasing: sigma/alpha of the DDPM table, 0.0045 to 154.27."""


Level = TypeVar("Level", jax.Array, np.ndarray, float)


class Schedule(Protocol):
    """A map from noise time to (alpha, sigma)."""

    def __call__(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(alpha, sigma) at noise time u, both of u's shape."""
        ...

    def uniform(self, r: jax.Array) -> jax.Array:
        """The noise times that this schedule calls uniform, from uniform numbers r in (0, 1)."""
        ...


@dataclasses.dataclass(frozen=True)
class Flow:
    """Straight path from data to noise, equation (2)."""

    def __call__(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 1 - u, u

    def uniform(self, r: jax.Array) -> jax.Array:
        return r


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Variance preserving, uniform in angle, equation (3)."""

    def __call__(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _variance_preserving(u)

    def uniform(self, r: jax.Array) -> jax.Array:
        theta = r * (np.pi / 2)
        return jnp.sin(theta) / (jnp.sin(theta) + jnp.cos(theta))


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Variance preserving, uniform in the index of the DDPM table, equation (4)."""

    def __call__(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _variance_preserving(u)

    def uniform(self, r: jax.Array) -> jax.Array:
        index = jnp.clip(jnp.floor(r * len(DDPM_LEVELS)).astype(jnp.int32), 0, len(DDPM_LEVELS) - 1)
        return jnp.asarray(time_of(DDPM_LEVELS), jnp.result_type(r, jnp.float32))[index]

    def index_of(self, u: jax.Array) -> jax.Array:
        """Fractional table index of u in [0, 999], linear in log noise level; times outside the table get its ends.

        Round it for the nearest entry. At the table's own times it is a whole number up to rounding.
        """
        ends = time_of(DDPM_LEVELS[[0, -1]])
        u = jnp.clip(u, ends[0], ends[1])
        log_level = jnp.log(u) - jnp.log1p(-u)
        return jnp.interp(log_level, np.log(DDPM_LEVELS), np.arange(len(DDPM_LEVELS), dtype=np.float64))


def make_schedule(diffusion: config.Diffusion) -> Schedule:
    """The schedule a configuration names."""
    match diffusion.schedule:
        case "flow":
            return Flow()
        case "cosine":
            return Cosine()
        case "ddpm":
            return DDPM()


def time_of(level: Level) -> Level:
    """Noise time of a noise level sigma/alpha, equation (1); samplers call the level sigma."""
    return level / (1 + level)


def shift_time(u: jax.Array, shift: float) -> jax.Array:
    """Noise time after multiplying the noise level by `shift`, equation (5)."""
    return shift * u / (1 + (shift - 1) * u)


def _variance_preserving(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    norm = jnp.sqrt((1 - u) ** 2 + u**2)  # between 0.7 and 1: safe to divide by, and to differentiate
    return (1 - u) / norm, u / norm
