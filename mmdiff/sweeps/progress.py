"""What a sweep says while it works: a line per run that ends, and on a terminal what is running and how long it will take."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from mmdiff.sweeps.plan import Plan
from mmdiff.training import metrics

if TYPE_CHECKING:
    from mmdiff.sweeps.runs import Run

EVERY = 1.0  # seconds between changes of the live line
TAIL = 8192  # bytes at the end of metrics.jsonl


class Progress:
    """For one sweep, or what is left of it."""

    def __init__(
        self,
        plan: Plan,
        runs: "Sequence[Run]",
        jobs: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._plan, self._jobs, self._clock = plan, jobs, clock
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._total, self._over = len(runs), sum(run.over for run in runs)
        self._begin: dict[Run, tuple[float, int]] = {}  # when each run began here, and at which step
        self._spent, self._worth = 0.0, 0.0  # seconds that finished runs took, and what the plan had said
        self._shown = 0.0
        self._running: list[Run] = []
        self._waiting: list[Run] = list(runs)

    def outlook(self) -> str:
        """What is left to do, before it begins."""
        left = [run for run in self._waiting if not run.over]
        arms = self._plan.arms
        seconds = sum((arms[run.arm].steps - last_step(run)) * arms[run.arm].step_seconds for run in left) / self._jobs
        known = f", {self._over} of them over" if self._over else ""
        return f"{self._total} runs{known}; about {clock_time(seconds)} of training left"

    def show(self, running: "Sequence[Run]", waiting: "Sequence[Run]") -> None:
        """Called all the time."""
        now = self._clock()
        for run in running:
            self._begin.setdefault(run, (now, last_step(run)))
        self._running, self._waiting = list(running), list(waiting)
        if self._live and running and now - self._shown >= EVERY:
            self._shown = now
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + self._status()[:width], end="", file=self._stream, flush=True)

    def finished(self, run: "Run", values: Mapping[str, float | None]) -> None:
        began, step = self._begin.get(run, (self._clock(), 0))
        seconds, steps = self._clock() - began, self._plan.arms[run.arm].steps
        if steps > step:
            self._spent += seconds
            self._worth += (steps - step) * self._plan.arms[run.arm].step_seconds
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None and _headline(name))
        self._line(run, f"{told or 'nothing measured'} ({steps:,} steps, {clock_time(seconds)})")

    def failed(self, run: "Run", code: int, reason: str) -> None:
        self._line(run, f"FAILED with exit code {code}: {reason}")

    def _line(self, run: "Run", told: str) -> None:
        self._over += 1
        self._running = [other for other in self._running if other != run]
        if self._live:
            print("\r\x1b[K", end="", file=self._stream)
        rest = self._status()
        line = f"{self._over}/{self._total} {run.name}: {told}"
        print(line + (f"; {rest}" if rest and not self._live else ""), file=self._stream, flush=True)

    def _status(self) -> str:
        """What is running, and the ETA."""
        parts = []
        if self._running:
            told = [f"{run.name} (step {last_step(run):,} of {self._plan.arms[run.arm].steps:,})" for run in self._running]
            parts.append("running " + ", ".join(told))
        if left := self._left():
            parts.append(f"ETA {clock_time(left)}")
        return "; ".join(parts)

    def _left(self) -> float:
        """Seconds until all runs are over, in the measure of the runs that finished so far."""
        runs = [*self._running, *self._waiting]
        arms = self._plan.arms
        planned = sum(max(0, arms[run.arm].steps - last_step(run)) * arms[run.arm].step_seconds for run in runs)
        slower = self._spent / self._worth if self._worth else 1.0
        return planned * slower / min(self._jobs, max(1, len(runs)))


def last_step(run: "Run") -> int:
    """How far a run is, by the end of its metrics.jsonl."""
    path = run.folder / metrics.FILE
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines[:-1]):
        if line.startswith(b'{"step": '):
            return int(line[len(b'{"step": ') :].split(b",")[0].rstrip(b"}"))
    return 0


def clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _headline(name: str) -> bool:
    return not name.endswith("_stderr")
