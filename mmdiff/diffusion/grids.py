"""Sampling grids: the noise levels sigma (= sigma/alpha of the schedule) that a solver visits.

A grid of n intervals has n + 1 decreasing levels, the last one 0:

    (1) uniform_logsnr   sigma_i = sigma_max (sigma_min / sigma_max)^(i / (n-1)), i < n; then 0
    (2) uniform_u        sigma_i = u_i / (1 - u_i), u_i = u_0 (1 - i/n), u_0 = sigma_max / (1 + sigma_max)
    (3) ddpm_table       sigma_i = entry 1000 - floor(1000 i / n) of the table of the DDPM schedule (schedule.py)

(2) does not use sigma_min, (3) neither of the two: with n = 1000 it is the whole table. (1) suits solvers that remember
earlier evaluations, (2) the others and very few steps.

The user's `steps` is a budget of network evaluations (NFE). A solver with one evaluation per interval gets as many
intervals; midpoint and heun spend two on every interval but the last, 2n - 1 on n intervals. A shift multiplies every
level.

Grids are host data: NumPy, float64.
"""

import numpy as np

from mmdiff.diffusion.schedule import DDPM_LEVELS

ONE_STAGE = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc2", "unipc3", "dpmpp_2m_sde", "ddpm", "ddpm_large", "few_step")
TWO_STAGE = ("midpoint", "heun")


def intervals(solver: str, nfe: int) -> int:
    """The most intervals that `solver` can do with `nfe` network evaluations, at least one.

    Raises:
      ValueError: unknown solver, or no evaluation allowed.
    """
    if nfe < 1:
        raise ValueError(f"sampling steps={nfe} must be at least 1.")
    return (nfe + 1) // 2 if evaluations_per_interval(solver) == 2 else nfe


def evaluations_per_interval(solver: str) -> int:
    """1 or 2; the last interval always costs one.

    Raises:
      ValueError: unknown solver.
    """
    if solver not in ONE_STAGE + TWO_STAGE:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(ONE_STAGE + TWO_STAGE)}.")
    return 2 if solver in TWO_STAGE else 1


def usual(solver: str) -> str:
    """The grid that suits a solver when none is asked for."""
    return "uniform_u" if solver in ("ddim", "few_step", *TWO_STAGE) else "uniform_logsnr"


def make_grid(kind: str, steps: int, sigma_max: float, sigma_min: float, shift: float = 1.0) -> np.ndarray:
    """Noise levels of `steps` intervals, from `shift * sigma_max` to 0.

    Args:
      kind: "uniform_logsnr", "uniform_u" or "ddpm_table".
      steps: number of intervals (see `intervals`).
      sigma_max, sigma_min: largest and smallest positive level before the shift.
      shift: multiplies every level.
    Returns:
      float64 [steps + 1], strictly decreasing, ending with 0.
    Raises:
      ValueError: an argument that gives no such grid.
    """
    if steps < 1:
        raise ValueError(f"a sampling grid needs at least 1 interval, got {steps}.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min={sigma_min} must be positive and below sigma_max={sigma_max}.")
    if shift <= 0:
        raise ValueError(f"shift={shift} must be positive.")
    match kind:
        case "uniform_logsnr":
            levels = np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), steps))
        case "uniform_u":
            u = np.linspace(sigma_max / (1 + sigma_max), 0, steps + 1)[:-1]
            levels = u / (1 - u)
        case "ddpm_table":
            count = len(DDPM_LEVELS)
            if steps > count:
                raise ValueError(f"grid 'ddpm_table' has {count} levels, which {steps} steps exceed.")
            levels = DDPM_LEVELS[count - 1 - np.arange(steps) * count // steps]
        case _:
            raise ValueError(f"unknown grid {kind!r}; known: uniform_logsnr, uniform_u, ddpm_table.")
    return np.append(shift * levels, 0.0)
