"""The runs of a sweep: arm by seed, each an ordinary `mmdiff train` and its evaluation, in processes of their own.

    DIR/sweep.json                    the plan
    DIR/arms/NAME/config.json         what the arm trains; its seeds differ in training.seed alone
    DIR/arms/NAME/seed-K/             a run's workdir, as `mmdiff train` leaves it, with
        log.txt                       what it said
        evaluation.json               its final metrics: the run is finished
        failed.json                   or: exit code and last line

The first seeds of all arms come first, so that a sweep cut short can be read. A run that diverged (70) or whose data was
bad (65) is over; it does not stop the others. A diverged run would diverge again and is not repeated; any other failed run
is tried again at the next start.
"""

import dataclasses
import json
import math
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdiff.sweeps.children import STOPPED, Children, last_line
from mmdiff.sweeps.plan import Plan
from mmdiff.sweeps.progress import Progress
from mmdiff.sweeps.sweep import FROM_VALIDATION
from mmdiff.training.metrics import read_metrics
from mmdiff.training.workdir import write_whole

CONFIG, LOG, EVALUATION, FAILED = "config.json", "log.txt", "evaluation.json", "failed.json"
BAD_DATA, DIVERGED, PREEMPTED = 65, 70, 75
PAUSE = 0.1  # seconds between looks at the processes


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    workdir: Path
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm} seed-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.workdir / "arms" / self.arm / f"seed-{self.seed}"

    @property
    def config(self) -> Path:
        return self.workdir / "arms" / self.arm / CONFIG

    def evaluation(self) -> dict[str, float | None] | None:
        """Its final metrics, or None while there are none."""
        path = self.folder / EVALUATION
        return json.loads(path.read_text()) if path.is_file() else None

    def failure(self) -> dict[str, Any] | None:
        """{"code": exit code, "reason": last line}, or None."""
        path = self.folder / FAILED
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def over(self) -> bool:
        """Whether nothing is left to do: it is finished, or would fail again."""
        failure = self.failure()
        return self.evaluation() is not None or (failure is not None and failure["code"] == DIVERGED)

    def train_command(self) -> list[str]:
        return ["mmdiff", "train", str(self.config), "--workdir", str(self.folder), "--training.seed", str(self.seed)]

    def evaluate_command(self, plan: Plan) -> list[str]:
        """Empty when the last validation has all the numbers that are wanted."""
        wanted = [name for name in plan.metrics if name not in FROM_VALIDATION]
        options = [text for name, value in plan.options.items() for text in (f"--{name}", str(value))]
        return ["mmdiff", "evaluate", str(self.folder), "--metrics", ",".join(wanted), *options, "--json"] if wanted else []


def planned_runs(plan: Plan, workdir: Path, arms: Sequence[str] | None = None) -> list[Run]:
    """All runs of the arms that have steps, first seeds first."""
    names = [name for name in (plan.arms if arms is None else arms) if plan.arms[name].steps]
    most = max((len(plan.arms[name].seeds) for name in names), default=0)
    return [
        Run(workdir, name, plan.arms[name].seeds[turn])
        for turn in range(most)
        for name in names
        if turn < len(plan.arms[name].seeds)
    ]


@dataclasses.dataclass
class _Active:
    run: Run
    process: subprocess.Popen
    out: Path
    training: bool
    began: float


class Runner:
    """Works through the runs, `jobs` at a time."""

    def __init__(self, plan: Plan, children: Children, progress: Progress, *, jobs: int = 1, strict: bool = False):
        self._plan, self._children, self._progress = plan, children, progress
        self._jobs, self._strict = jobs, strict
        self._active: list[_Active] = []
        self._strict_code, self._crashed = 0, False

    def go(self, runs: Sequence[Run]) -> int:
        """Returns the exit code: 0 all are over, 1 some crashed and may be tried again, 75 stopped, or a strict failure's."""
        for run in runs:
            write_whole_in(run.config, self._plan.run_config(run.arm).to_json())
        waiting = [run for run in runs if not run.over]
        while self._active or (waiting and not self._children.stopping):
            while waiting and len(self._active) < self._jobs and not self._children.stopping:
                self._train(waiting.pop(0))
            for active in list(self._active):
                code = active.process.poll()
                if code is not None:
                    self._active.remove(active)
                    self._ended(active, code)
            self._progress.show([active.run for active in self._active], waiting)
            time.sleep(PAUSE)
        return self._strict_code or (PREEMPTED if self._children.stopping else int(self._crashed))

    def _train(self, run: Run) -> None:
        (run.folder / FAILED).unlink(missing_ok=True)
        self._start(run, run.train_command(), run.folder / LOG, training=True)

    def _start(self, run: Run, command: list[str], out: Path, *, training: bool) -> None:
        log = run.folder / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            print(f"$ {shlex.join(command)}", file=file)
        process = self._children.start(command, out, log)
        self._active.append(_Active(run, process, out, training, time.monotonic()))

    def _ended(self, active: _Active, code: int) -> None:
        run = active.run
        if code in STOPPED or (code != 0 and self._children.stopping):
            self._children.terminate()  # one that was preempted: so will be the rest
            return
        if code != 0:
            self._failed(run, code, last_line(run.folder / LOG))
        elif active.training and (command := run.evaluate_command(self._plan)):
            if self._children.stopping:
                return
            out = run.folder / "evaluation.out"
            out.unlink(missing_ok=True)
            self._start(run, command, out, training=False)
        else:
            self._finished(run, {} if active.training else json.loads(active.out.read_text()))

    def _finished(self, run: Run, measured: dict[str, float | None]) -> None:
        last: dict[str, Any] = next((r for r in reversed(read_metrics(run.folder)) if "x_error" in r), {})
        metrics = {name: last.get(name) for name in self._plan.metrics if name in FROM_VALIDATION} | measured
        absent = [name for name in metrics if name in FROM_VALIDATION and name not in last]
        if absent:
            self._failed(run, BAD_DATA, f"{absent[0]} was not measured: the data has no held-out documents for it.")
            return
        plain = {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}
        write_whole_in(run.folder / EVALUATION, json.dumps(plain))
        self._progress.finished(run, plain)

    def _failed(self, run: Run, code: int, reason: str) -> None:
        if code < 0:
            reason = f"killed by signal {-code} (out of memory?); the last it said: {reason}"
        write_whole_in(run.folder / FAILED, json.dumps({"code": code, "reason": reason}))
        self._progress.failed(run, code, reason)
        if self._strict:
            self._strict_code = code if code > 0 else 1
            self._children.terminate()
        self._crashed |= code not in (BAD_DATA, DIVERGED)


def write_whole_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
