"""Sampling grids made for one model: noise levels at which few evaluations come nearest to many.

    reference   the end of REFERENCE steps of unipc2 from the same noise
    (1) error(levels) = |x_hat(levels) - reference| / |reference - mean reference|      over some held-out documents

(1) is lowered level by level: each but the first moves up or down by a factor, as long as that helps, and the factor
shrinks. No derivatives, nothing but drawings; a grid is kept only if it is better on noise and documents not searched on.
The idea is that of Align Your Steps (arXiv 2404.14507), with the end point itself in place of a bound on it.

WORKDIR/grids.json keeps what was found, {"unipc2": {"10": {"sigmas": [...], ...}}}; loading the run finds it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from mmdiff.diffusion import grids, solvers
from mmdiff.document import DataError, Document
from mmdiff.sampling.image import denoised
from mmdiff.sampling.session import Session, fold
from mmdiff.training.workdir import write_whole

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model

FILE = "grids.json"
REFERENCE = 200
FIRST, LAST = 0.3, 0.02  # changes of log sigma, from the first to the smallest
APART = 0.02  # least distance of neighbours in log sigma
WORTH = 1e-3  # least relative gain of a change

Score = Callable[[np.ndarray], float]


class Tuned(NamedTuple):
    """Positive levels, decreasing; errors on what was not searched on, of them and of the grid it began with."""

    sigmas: list[float]
    error: float
    error_before: float
    begun: str  # the grid it began with, the best of those known


class Target:
    """Documents about to draw an image of one size, and what many steps draw."""

    def __init__(self, model: "Model", prompts: Sequence[Document], size: tuple[int, int], seed: int, guidance: float):
        options = model.options(image_size=size, max_tokens=0, guidance=guidance, solver="unipc2", grid="auto")
        keys = fold(jax.numpy.broadcast_to(jax.random.key(seed), len(prompts)), np.arange(len(prompts)))
        self._model = model
        self._drawing = Session(model, prompts, keys, options, None).first_drawing()
        self._run = jax.jit(denoised, static_argnums=(0, 1))
        self.reference = self.end("unipc2", self._levels("uniform_logsnr", REFERENCE))
        self._spread = float(np.std(self.reference))

    def _levels(self, grid: str, count: int) -> np.ndarray:
        sampling = self._model.cfg.sampling
        return grids.make_grid(grid, count, sampling.sigma_max, sampling.sigma_min, self._model.cfg.diffusion.shift)

    def known(self, count: int) -> dict[str, np.ndarray]:
        """The grids to begin with, of `count` intervals: positive levels."""
        return {name: self._levels(name, count)[:-1] for name in ("uniform_logsnr", "uniform_u")}

    def end(self, solver: str, levels: np.ndarray) -> np.ndarray:
        """x_hat of every patch value, float32 [values]. `levels` end with 0."""
        table = solvers.make_table(solver, levels)
        x_hat = np.asarray(self._run(self._model.network, self._model.cfg.diffusion, self._drawing, table))
        counts = np.asarray(self._drawing.canvas.counts)
        return np.concatenate([x[:count].ravel() for x, count in zip(x_hat, counts, strict=True)])

    def error(self, solver: str, sigmas: np.ndarray) -> float:
        """Equation (1) of positive levels."""
        end = self.end(solver, np.append(sigmas, 0.0))
        return float(np.sqrt(np.mean((end - self.reference) ** 2))) / self._spread


def tune(search: Target, check: Target, solver: str, steps: int) -> Tuned:
    """Levels for `steps` evaluations of a deterministic solver, found on `search`, judged on `check`."""
    known = search.known(grids.intervals(solver, steps))
    begun = min(known, key=lambda name: search.error(solver, known[name]))
    sigmas = descend(lambda levels: search.error(solver, levels), known[begun])
    before, after = check.error(solver, known[begun]), check.error(solver, sigmas)
    if after > before:
        return Tuned(known[begun].tolist(), before, before, begun)
    return Tuned(sigmas.tolist(), after, before, begun)


def descend(score: Score, sigmas: np.ndarray) -> np.ndarray:
    """Positive decreasing levels of lower score, by coordinate search in log sigma; the first level stays."""
    log, best, change = np.log(sigmas), score(sigmas), FIRST
    while change >= LAST:
        improved = False
        for i in range(1, len(log)):
            for moved in (change, -change):
                tried = log.copy()
                tried[i] += moved
                if np.max(np.diff(tried)) > -APART:
                    continue
                found = score(np.exp(tried))
                if found < best * (1 - WORTH):
                    log, best, improved = tried, found, True
                    break
        change = change if improved else change / 2
    return np.append(sigmas[:1], np.exp(log[1:]))


def read_tuned(workdir: Path) -> dict[tuple[str, int], list[float]]:
    """The levels that a run's grids.json holds, by solver and steps.

    Raises:
      DataError: the file is damaged.
    """
    return {(solver, int(steps)): entry["sigmas"] for solver, found in _read(workdir).items() for steps, entry in found.items()}


def write_tuned(workdir: Path, solver: str, steps: int, entry: dict[str, Any]) -> None:
    """Add what was found to the run's grids.json; `entry` has the levels as "sigmas"."""
    every = _read(workdir)
    every[solver] = every.get(solver, {}) | {str(steps): entry}
    every[solver] = dict(sorted(every[solver].items(), key=lambda item: int(item[0])))
    write_whole(workdir / FILE, json.dumps(every, indent=1).encode())


def _read(workdir: Path) -> dict[str, dict[str, Any]]:
    path = workdir / FILE
    if not path.is_file():
        return {}
    try:
        every = json.loads(path.read_text())
        for found in every.values():
            for steps, entry in found.items():
                solvers.make_table("ddim", np.append(entry["sigmas"], 0.0)), int(steps)
        return every
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, or make it again with mmdiff tune-grid.") from error
