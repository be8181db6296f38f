"""Where a run's time goes: every second belongs to one of PHASES.

    goodput = step / (all of them)

`step` is training proper; `lost` is what earlier sessions did after the checkpoint that this one resumed from. The
account of a run outlives its sessions in `goodput.json`; the time between sessions is nobody's.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "goodput.json"
PHASES = ("init", "compile", "data", "step", "evaluation", "checkpoint", "lost")
NAMES = {"data": "data wait"}


class Goodput:
    """The account of one session, and of the sessions before it."""

    def __init__(self, workdir: str | Path, *, write: bool = True, clock: Callable[[], float] = time.monotonic):
        """The phase is `init` until another one begins."""
        self._path = Path(workdir) / FILE if write else None
        self._clock = clock
        self._phase, self._since = "init", clock()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._saves: dict[int, dict[str, float]] = {}

    def resume(self, step: int) -> None:
        """Take over the account of the sessions before; what they did after `step` is lost."""
        if self._path is None or not self._path.is_file():
            return
        record = json.loads(self._path.read_text())
        saves = {int(saved): seconds for saved, seconds in record["saves"].items()}
        kept = saves.get(step) or dict.fromkeys(PHASES, 0.0)
        for phase in PHASES:
            self.seconds[phase] += kept[phase]
        self.seconds["lost"] += sum(record["now"].values()) - sum(kept.values())
        self._saves = {saved: seconds for saved, seconds in saves.items() if saved <= step}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside belongs to `name`; phases nest."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> str:
        """From now on time belongs to `name`; returns the phase before."""
        now = self._clock()
        self.seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, name, now
        return before

    def saved(self, step: int) -> None:
        """A checkpoint of `step` was written."""
        self.enter(self._phase)
        self._saves[step] = dict(self.seconds)
        self._saves = dict(sorted(self._saves.items())[-10:])
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        self.enter(self._phase)
        if self._path is not None:
            part = self._path.with_suffix(".part")  # replaced in one move: a kill leaves the old file or the new one
            part.write_text(json.dumps({"now": self.seconds, "saves": self._saves}))
            part.replace(self._path)

    def summary(self) -> str:
        """One line for people."""
        self.enter(self._phase)
        total = sum(self.seconds.values())
        parts = [f"{NAMES.get(name, name)} {seconds:.1f} s" for name, seconds in self.seconds.items() if seconds >= 0.05]
        return f"goodput {100 * self.seconds['step'] / max(total, 1e-9):.1f}% of {total:.1f} s: {', '.join(parts)}"
