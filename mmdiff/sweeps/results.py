"""What the runs of a sweep came to, and what can be said of it.

With n seeds of mean m and standard deviation s (n - 1 in the divisor), t the quantile of Student's distribution:

    (1) 95% interval of an arm         m +- t(n - 1) s / sqrt(n)                              none for one seed
    (2) within the noise               |m - m_0| <= t(n_0 - 1) s_0 sqrt(1/n + 1/n_0)          0: the baseline

(2) lends the baseline's spread to every arm, so that one seed of an arm is enough to see a large difference; it is what a
baseline run n more times would stay within, 95 times in 100.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from mmdiff.document import DataError
from mmdiff.sweeps.plan import FILE, Arm, Plan, read_plan
from mmdiff.sweeps.progress import last_step
from mmdiff.sweeps.runs import Run
from mmdiff.training import goodput
from mmdiff.training.metrics import read_metrics

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One run. `evaluation` is None unless it is finished; a value of None in it was not finite."""

    run: Run
    step: int
    evaluation: dict[str, float | None] | None
    failure: str
    curve: Points  # (step, x_error) of each validation
    step_seconds: float | None  # of training alone, over a finished run
    seconds: float | None  # from start to end, with what kills have lost

    @property
    def sheet(self) -> Path | None:
        """Its newest sample sheet."""
        found = sorted((self.run.folder / "samples").glob("*.png"))
        return found[-1] if found else None


@dataclasses.dataclass(frozen=True)
class ArmResult:
    name: str
    planned: Arm
    runs: list[RunResult]

    @property
    def finished(self) -> list[RunResult]:
        return [run for run in self.runs if run.evaluation is not None]

    def values(self, metric: str) -> list[float | None]:
        """Of every finished run that has it."""
        return [run.evaluation[metric] for run in self.finished if run.evaluation and metric in run.evaluation]

    def average(self, name: str) -> float | None:
        """Mean of `step_seconds` or `seconds` over the finished runs."""
        known = [value for run in self.finished if (value := getattr(run, name)) is not None]
        return sum(known) / len(known) if known else None


@dataclasses.dataclass(frozen=True)
class Results:
    plan: Plan
    workdir: Path
    arms: list[ArmResult]

    @property
    def baseline(self) -> ArmResult:
        return self.arms[0]

    @property
    def metrics(self) -> list[str]:
        """Every number that an evaluation has, standard errors over documents left out; what is planned, if there is none."""
        named = [name for arm in self.arms for run in arm.finished for name in run.evaluation or ()]
        return list(dict.fromkeys(name for name in named if not name.endswith("_stderr"))) or self.plan.metrics

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(what, why)."""
        told = []
        for arm in self.arms:
            if arm.planned.failed and not arm.planned.steps:
                told.append((arm.name, arm.planned.failed))
            told += [(run.run.name, run.failure) for run in arm.runs if run.failure]
        return told

    @property
    def missing(self) -> list[tuple[str, str]]:
        """(run, how far it is) of the runs that are not over."""
        told = []
        for arm in self.arms:
            if not arm.planned.steps and not arm.planned.failed:
                told.append((arm.name, "not started"))
            for run in arm.runs:
                if run.evaluation is None and not run.failure:
                    far = f"step {run.step:,} of {arm.planned.steps:,}" if run.step else "not started"
                    told.append((run.run.name, far))
        return told


def read_results(workdir: Path) -> Results:
    """Everything a report needs of a sweep, finished or not.

    Raises:
      DataError: there is no sweep in this folder.
    """
    plan = read_plan(workdir)
    if plan is None:
        raise DataError(f"{workdir / FILE} not found; give the --workdir of `mmdiff sweep`, once it has measured its arms.")
    arms = []
    for name, arm in plan.arms.items():
        runs = [_read_run(Run(workdir, name, seed), arm) for seed in arm.seeds] if arm.steps else []
        arms.append(ArmResult(name, arm, runs))
    return Results(plan, workdir, arms)


def _read_run(run: Run, arm: Arm) -> RunResult:
    evaluation, failure = run.evaluation(), run.failure()
    records = read_metrics(run.folder) if (run.folder / "metrics.jsonl").is_file() else []
    curve = [(float(r["step"]), float(r["x_error"])) for r in records if "x_error" in r]
    account = run.folder / goodput.FILE
    spent = json.loads(account.read_text())["now"] if evaluation is not None and account.is_file() else None
    return RunResult(
        run,
        last_step(run),
        evaluation,
        f"exit code {failure['code']}: {failure['reason']}" if failure is not None and evaluation is None else "",
        [(step, error) for step, error in curve if math.isfinite(error)],
        spent["step"] / arm.steps if spent else None,
        sum(spent.values()) if spent else None,
    )


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Equation (1): the mean and half the width of its 95% interval, None for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    return mean, float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values)))


def within_noise(values: Sequence[float], baseline: Sequence[float]) -> bool | None:
    """Equation (2); None when the baseline's noise is not known, for it has one seed."""
    if len(baseline) < 2:
        return None
    n, n_0 = len(values), len(baseline)
    allowed = stdtrit(n_0 - 1, 0.975) * np.std(baseline, ddof=1) * math.sqrt(1 / n + 1 / n_0)
    return bool(abs(np.mean(values) - np.mean(baseline)) <= allowed)


def mean_curve(runs: Sequence[RunResult]) -> Points:
    """The mean over seeds, at the steps that all runs which have begun have in common."""
    curves = [dict(run.curve) for run in runs if run.curve]
    if not curves:
        return []
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in common]
