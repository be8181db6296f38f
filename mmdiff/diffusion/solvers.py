"""Solvers: from noise to data along the probability-flow ODE, or its stochastic twin.

All work on denoise(X, s) -> x_hat in the coordinate X = z / alpha = x + s eps with noise level s = sigma / alpha, where
every schedule is the same problem. From level s to t < s, with D = denoise(X, s), D' the evaluation before it,
h = log(s/t) and h' the h before it:

    (1) ddim        X <- (t/s) X + (1 - t/s) D                                    (= Euler steps of the flow)
    (2) ddpm        X <- (t/s)^2 X + (1 - (t/s)^2) D + t sqrt(1 - (t/s)^2) noise  (ancestral)
        ddpm_large  the same with noise of size sqrt((s^2 - t^2) (1 + t^2) / (1 + s^2)), the upper one of DDPM's two choices
    (3) dpmpp_2m    X <- (t/s) X + (1 - t/s) (D + h/(2h') (D - D'))               (first step: ddim)
    (4) unipc2      predict by (3); with M = denoise at the predicted X, which is also the next step's D, correct to
                    X <- (t/s) X - e (D + c1 (D' - D)/r + c2 (M - D)),   e = exp(-h) - 1,  r = -h'/h,
                    c1 + c2 = p/e,  r c1 + c2 = 2q/e,  p = -e/h - 1,  q = -p/h - 1/2   (first step: c1 = 0, c2 = 1/2)
    (5) heun        trapezoid in flow coordinates y = X/(1+s), u = s/(1+s), with dy/du = (y - D)/u
    (6) midpoint    midpoint rule in the same coordinates

Every solver ends with X <- x_hat of its last evaluation. All are linear in (X, D): a solver is a table of coefficients
with one row per evaluation, computed here in float64, and `integrate` runs any table as one scan around one copy of the
network. `base` is the state, `point` is where the network looks next:

    (7) base'  = correct . (base, point, D, D', D'')        D = denoise(point, level)
    (8) point' = predict . (base', D, D') + noise_scale noise

Shapes: X, x_hat, noise are [...], float32 or wider; n evaluations.
Sources: DDIM arXiv 2010.02502; DDPM 2006.11239; DPM-Solver++ 2211.01095; UniPC (bh2) 2302.04867; Heun in flow
coordinates: JiT 2511.13720.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.diffusion import grids

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Noise = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """A solver on a grid, equations (7) and (8): arrays over the n evaluations."""

    level: np.ndarray  # [n]
    correct: np.ndarray  # [n, 5]
    predict: np.ndarray  # [n, 3]
    noise_scale: np.ndarray  # [n]


def solve(denoise: Denoise, x_init: jax.Array, sigmas: np.ndarray, solver: str, noise: Noise | None = None) -> jax.Array:
    """Sample: integrate from `sigmas[0]` to 0.

    Args:
      denoise: (X, sigma) -> x_hat; sigma is a traced scalar. To clamp known values, clamp what it returns.
      x_init: sigmas[0] * standard normal noise.
      sigmas: concrete decreasing levels ending with 0 (`grids.make_grid`).
      solver: one of ddim, midpoint, heun, dpmpp_2m, unipc2, ddpm, ddpm_large.
      noise: step -> standard normal noise like x_init, different for every step (fold the traced step into a key);
        ddpm and ddpm_large need it, the others never call it.
    Returns:
      x_hat of the last evaluation, shape of x_init.
    Raises:
      ValueError: unknown solver, a grid that does not decrease to 0, or ddpm without noise.
    """
    random = solver in ("ddpm", "ddpm_large")
    if random and noise is None:
        raise ValueError(f"solver {solver!r} is stochastic: pass noise(step), for example by folding the step into a key.")
    return integrate(denoise, x_init, make_table(solver, sigmas), noise if random else None)


def integrate(denoise: Denoise, x_init: jax.Array, table: Table, noise: Noise | None = None) -> jax.Array:
    """Run a table, equations (7) and (8). Passed to a jitted function as an argument, new levels compile nothing."""
    dtype = jnp.promote_types(x_init.dtype, jnp.float32)
    x = x_init.astype(dtype)
    rows = jax.tree.map(lambda a: jnp.asarray(a, dtype), table)

    def evaluate(carry, step_and_row):
        step, row = step_and_row
        base, point, previous, before = carry
        x_hat = denoise(point, row.level).astype(dtype)
        base = _combine(row.correct, base, point, x_hat, previous, before)
        point = _combine(row.predict, base, x_hat, previous)
        if noise is not None:
            point = point + row.noise_scale * noise(step).astype(dtype)
        return (base, point, x_hat, previous), None

    start = (x, x, jnp.zeros_like(x), jnp.zeros_like(x))
    (_, _, x_hat, _), _ = jax.lax.scan(evaluate, start, (jnp.arange(len(table.level)), rows))
    return x_hat


def evaluations(solver: str, sigmas: np.ndarray) -> int:
    """Network evaluations (NFE) that `solver` spends on a grid."""
    count = len(sigmas) - 1
    return count if grids.evaluations_per_interval(solver) == 1 else 2 * count - 1


def make_table(solver: str, sigmas: np.ndarray) -> Table:
    """The coefficients of a solver on a grid, float64.

    Raises:
      ValueError: unknown solver, or a grid that does not decrease to 0.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or np.any(np.diff(sigmas) >= 0) or sigmas[-1] != 0:
        raise ValueError(f"sampling needs levels that decrease strictly and end with 0, got {sigmas}.")
    keep = sigmas[1:] / sigmas[:-1]
    match solver:
        case "ddim":
            return _one_stage(sigmas, _first_order(keep))
        case "ddpm":
            return _one_stage(sigmas, _first_order(keep**2), noise_scale=sigmas[1:] * np.sqrt(1 - keep**2))
        case "ddpm_large":
            s, t = sigmas[:-1], sigmas[1:]
            size = np.sqrt((s**2 - t**2) * (1 + t**2) / (1 + s**2))
            return _one_stage(sigmas, _first_order(keep**2), noise_scale=size)
        case "dpmpp_2m":
            return _one_stage(sigmas, _second_order(sigmas))
        case "unipc2":
            return _one_stage(sigmas, _second_order(sigmas), correct=_unipc_corrector(sigmas))
        case "heun":
            return _two_stage(sigmas, sigmas[1:-1], weights=(0.5, 0.5))
        case "midpoint":
            u = sigmas / (1 + sigmas)
            middle = (u[:-2] + u[1:-1]) / 2
            return _two_stage(sigmas, middle / (1 - middle), weights=(0.0, 1.0))
        case _:
            raise ValueError(f"unknown solver {solver!r}; known: {', '.join(grids.ONE_STAGE + grids.TWO_STAGE)}.")


def _combine(coefficients: jax.Array, *terms: jax.Array) -> jax.Array:
    return sum((c * term for c, term in zip(coefficients, terms, strict=True)), jnp.zeros_like(terms[0]))


def _one_stage(sigmas, predict, correct=None, noise_scale=None) -> Table:
    count = len(sigmas) - 1
    if correct is None:  # the predicted point is the new state
        correct = np.tile([0.0, 1.0, 0.0, 0.0, 0.0], (count, 1))
    return Table(sigmas[:-1], correct, predict, np.zeros(count) if noise_scale is None else noise_scale)


def _first_order(keep) -> np.ndarray:
    return np.stack([keep, 1 - keep, np.zeros_like(keep)], axis=-1)


def _second_order(sigmas) -> np.ndarray:
    """Equation (3); the first and the last step are of first order."""
    keep = sigmas[1:] / sigmas[:-1]
    h = -np.log(keep[:-1])
    slope = (1 - keep[1:-1]) * h[1:] / (2 * h[:-1])
    predict = _first_order(keep)
    predict[1:-1, 1] += slope
    predict[1:-1, 2] -= slope
    return predict


def _unipc_corrector(sigmas) -> np.ndarray:
    """Equation (4). Row i corrects the step that led to evaluation i: M is row i's D, D is its D', D' is its D''."""
    keep = sigmas[1:-1] / sigmas[:-2]
    h = -np.log(keep)
    e = np.expm1(-h)
    p = -e / h - 1
    q = -p / h - 0.5
    c_old, c_new = np.zeros_like(h), np.full_like(h, 0.5)  # c1 / r and c2
    r = -h[:-1] / h[1:]
    c1 = ((p - 2 * q) / e)[1:] / (1 - r)
    c_old[1:], c_new[1:] = c1 / r, (p / e)[1:] - c1
    steps = np.stack([keep, np.zeros_like(h), -e * c_new, -e * (1 - c_old - c_new), -e * c_old], axis=-1)
    return np.concatenate([[[0.0, 1.0, 0.0, 0.0, 0.0]], steps])


def _two_stage(sigmas, inner, weights) -> Table:
    """Equations (5), (6): y' = y + du (w1 v1 + w2 v2), v = (y - D)/u, v2 at the level `inner`, after an Euler step."""
    s, t = sigmas[:-2], sigmas[1:-1]
    u_s, u_inner, u_t = (level / (1 + level) for level in (s, inner, t))
    du1, du2 = (w * (1 + t) * (u_t - u_s) for w in weights)
    count = 2 * len(s) + 1
    level, correct, predict = np.empty(count), np.zeros((count, 5)), np.zeros((count, 3))
    level[::2], level[1::2] = sigmas[:-1], inner
    correct[::2] = [1.0, 0.0, 0.0, 0.0, 0.0]
    correct[1::2] = np.stack([(1 + t) / (1 + s) + du1 / s, du2 / inner, -du2 / u_inner, -du1 / u_s, 0 * s], axis=-1)
    predict[:-1:2] = _first_order(inner / s)
    predict[1::2] = [1.0, 0.0, 0.0]
    return Table(level, correct, predict, np.zeros(count))
