"""Solvers: from noise to data along the probability-flow ODE, or its stochastic twin.

All work on denoise(X, s) -> x_hat in the coordinate X = z / alpha = x + s eps with noise level s = sigma / alpha, where
every schedule is the same problem. From level s to t < s, with D = denoise(X, s), D' the evaluation before it,
h = log(s/t) and h' the h before it:

    (1) ddim        X <- (t/s) X + (1 - t/s) D                                    (= Euler steps of the flow)
    (2) ddpm        X <- (t/s)^2 X + (1 - (t/s)^2) D + t sqrt(1 - (t/s)^2) noise  (ancestral)
        ddpm_large  the same with noise of size sqrt((s^2 - t^2) (1 + t^2) / (1 + s^2)), the upper one of DDPM's two choices
    (3) dpmpp_2m    X <- (t/s) X - e (D + h/(2h') (D - D')),   e = exp(-h) - 1 = t/s - 1      (first step: ddim)
        dpmpp_2m_sde   X <- (t/s)^2 X + (1 - (t/s)^2) (D + h/(2h') (D - D')) + t sqrt(1 - (t/s)^2) noise
        dpmpp_3m    X <- (t/s) X - e D + p A - q' B from the third step on (second: 2m), with slopes of the last three D in
                    units of h:  a = (D - D') h/h',  b = (D' - D'') h/h'',  B = (a - b) h/(h' + h''),  A = a + B h'/h,
                    p = e/h + 1,  q' = (e + h)/h^2 - 1/2
    (4) unipc2, 3   predict X from the last 2 (3) evaluations; with M = denoise at the predicted X, which is also the next
                    step's D, correct with M among them. Both with weights c that fit polynomials in the time:
                    X <- (t/s) X - e (D + sum_k c_k (D_k - D)/r_k),   r_k = (log s - log level_k)/h,
                    sum_k c_k r_k^(j-1) = j! p_j / e,   p_1 = -e/h - 1,   p_j = -p_(j-1)/h - 1/j!,   j = 1, 2, ...;
                    a single k takes c = 1/2. Of order 2 the prediction is (3).
    (5) heun        trapezoid in flow coordinates y = X/(1+s), u = s/(1+s), with dy/du = (y - D)/u
    (6) midpoint    midpoint rule in the same coordinates
        few_step    (1), the network being told the length u(s) - u(t) of the step: it gives the x_hat that makes (1) exact

Every solver ends with X <- x_hat of its last evaluation. All are linear in (X, D): a solver is a table of coefficients
with one row per evaluation, computed here in float64, and `integrate` runs any table as one scan around one copy of the
network. `base` is the state, `point` is where the network looks next:

    (7) base'  = correct . (base, point, D, D', D'', D''')        D = denoise(point, level)
    (8) point' = predict . (base', D, D', D'') + noise_scale noise

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

Denoise = Callable[..., jax.Array]
Noise = Callable[[jax.Array], jax.Array]

STOCHASTIC = ("ddpm", "ddpm_large", "dpmpp_2m_sde")
HISTORY = 3  # evaluations that a step may need beside the newest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """A solver on a grid, equations (7) and (8): arrays over the n evaluations."""

    level: np.ndarray  # [n]
    correct: np.ndarray  # [n, 6]
    predict: np.ndarray  # [n, 4]
    noise_scale: np.ndarray  # [n]
    length: np.ndarray | None = None  # [n]; of each step in noise time, for solvers that tell the network


def solve(denoise: Denoise, x_init: jax.Array, sigmas: np.ndarray, solver: str, noise: Noise | None = None) -> jax.Array:
    """Sample: integrate from `sigmas[0]` to 0.

    Args:
      denoise: (X, sigma) -> x_hat, or (X, sigma, length) -> x_hat for few_step; sigma and length are traced scalars. To
        clamp known values, clamp what it returns.
      x_init: sigmas[0] * standard normal noise.
      sigmas: concrete decreasing levels ending with 0 (`grids.make_grid`).
      solver: one of grids.ONE_STAGE and grids.TWO_STAGE.
      noise: step -> standard normal noise like x_init, different for every step (fold the traced step into a key);
        ddpm, ddpm_large and dpmpp_2m_sde need it, the others never call it.
    Returns:
      x_hat of the last evaluation, shape of x_init.
    Raises:
      ValueError: unknown solver, a grid that does not decrease to 0, or a stochastic solver without noise.
    """
    random = solver in STOCHASTIC
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
        base, point, before = carry
        x_hat = denoise(point, row.level, *([] if row.length is None else [row.length])).astype(dtype)
        base = _combine(row.correct, base, point, x_hat, *before)
        point = _combine(row.predict, base, x_hat, *before[:-1])
        if noise is not None:
            point = point + row.noise_scale * noise(step).astype(dtype)
        return (base, point, (x_hat, *before[:-1])), None

    start = (x, x, (jnp.zeros_like(x),) * HISTORY)
    (_, _, (x_hat, *_)), _ = jax.lax.scan(evaluate, start, (jnp.arange(len(table.level)), rows))
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
        case "few_step":
            length = -np.diff(sigmas / (1 + sigmas))
            return dataclasses.replace(_one_stage(sigmas, _first_order(keep)), length=length)
        case "ddpm":
            return _one_stage(sigmas, _first_order(keep**2), noise_scale=sigmas[1:] * np.sqrt(1 - keep**2))
        case "ddpm_large":
            s, t = sigmas[:-1], sigmas[1:]
            size = np.sqrt((s**2 - t**2) * (1 + t**2) / (1 + s**2))
            return _one_stage(sigmas, _first_order(keep**2), noise_scale=size)
        case "dpmpp_2m":
            return _one_stage(sigmas, _second_order(keep, sigmas))
        case "dpmpp_2m_sde":
            return _one_stage(sigmas, _second_order(keep**2, sigmas), noise_scale=sigmas[1:] * np.sqrt(1 - keep**2))
        case "dpmpp_3m":
            return _one_stage(sigmas, _third_order(sigmas))
        case "unipc2" | "unipc3":
            return _one_stage(sigmas, *_unipc(sigmas, order=int(solver[-1])))
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
        correct = np.tile([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], (count, 1))
    return Table(sigmas[:-1], correct, predict, np.zeros(count) if noise_scale is None else noise_scale)


def _first_order(keep) -> np.ndarray:
    return np.stack([keep, 1 - keep, np.zeros_like(keep), np.zeros_like(keep)], axis=-1)


def _second_order(keep, sigmas) -> np.ndarray:
    """Equation (3), `keep` being what is left of X; the first and the last step are of first order."""
    h = -np.log(sigmas[1:-1] / sigmas[:-2])
    slope = (1 - keep[1:-1]) * h[1:] / (2 * h[:-1])
    predict = _first_order(keep)
    predict[1:-1, 1] += slope
    predict[1:-1, 2] -= slope
    return predict


def _third_order(sigmas) -> np.ndarray:
    """Equation (3), dpmpp_3m: the orders are 1, 2, 3, 3, ... and at last 1."""
    keep = sigmas[1:] / sigmas[:-1]
    predict = _second_order(keep, sigmas)
    steps = -np.log(keep[:-1])
    for i in range(2, len(steps)):
        h, r0, r1 = steps[i], steps[i - 1] / steps[i], steps[i - 2] / steps[i]
        e = np.expm1(-h)
        newer, older = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1  # slopes, over (D, D', D'')
        curve = (newer - older) / (r0 + r1)
        predict[i, 1:] = (e / h + 1) * (newer + r0 * curve) - ((e + h) / h**2 - 0.5) * curve
        predict[i, 1] -= e
    return predict


def _unipc(sigmas, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Equation (4): (predict, correct). Row i + 1 of `correct` mends the step from level i, with M as its D."""
    keep = sigmas[1:] / sigmas[:-1]
    predict = _first_order(keep)
    correct = np.tile([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], (len(keep), 1))
    log = np.log(sigmas[:-1])
    for i in range(len(keep) - 1):
        h, e = log[i] - log[i + 1], keep[i] - 1
        known = min(order, i + 1)
        past = (log[i] - log[i - np.arange(1, known)]) / h  # r of the evaluations before level i
        c = _fit(past, h) / past
        predict[i, 1 : 1 + known] = [-e * (1 - c.sum()), *(-e * c)]
        c = _fit(np.append(past, 1.0), h) / np.append(past, 1.0)
        correct[i + 1, : 3 + known] = [keep[i], 0.0, -e * c[-1], -e * (1 - c.sum()), *(-e * c[:-1])]
    return predict, correct


def _fit(r: np.ndarray, h: float) -> np.ndarray:
    """The weights c of equation (4) for evaluations at r."""
    if len(r) < 2:
        return np.full(len(r), 0.5)
    e, p, factorial, right = np.expm1(-h), np.expm1(-h) / -h - 1, 1, []
    for j in range(1, len(r) + 1):
        right.append(factorial * p / e)
        factorial *= j + 1
        p = -p / h - 1 / factorial
    return np.linalg.solve(r ** np.arange(len(r))[:, None], right)


def _two_stage(sigmas, inner, weights) -> Table:
    """Equations (5), (6): y' = y + du (w1 v1 + w2 v2), v = (y - D)/u, v2 at the level `inner`, after an Euler step."""
    s, t = sigmas[:-2], sigmas[1:-1]
    u_s, u_inner, u_t = (level / (1 + level) for level in (s, inner, t))
    du1, du2 = (w * (1 + t) * (u_t - u_s) for w in weights)
    count = 2 * len(s) + 1
    level, correct, predict = np.empty(count), np.zeros((count, 6)), np.zeros((count, 4))
    level[::2], level[1::2] = sigmas[:-1], inner
    correct[::2, 0] = 1.0
    correct[1::2, :4] = np.stack([(1 + t) / (1 + s) + du1 / s, du2 / inner, -du2 / u_inner, -du1 / u_s], axis=-1)
    predict[:-1:2] = _first_order(inner / s)
    predict[1::2, 0] = 1.0
    return Table(level, correct, predict, np.zeros(count))
