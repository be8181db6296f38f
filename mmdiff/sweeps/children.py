"""The processes of a sweep, and what becomes of them when it is told to stop.

SIGTERM and SIGINT to the sweep reach every child as one SIGTERM, at which a run saves and leaves. Children stay in the
sweep's process group, so that killing the group kills all of it; a Ctrl-C, which a terminal sends to the whole group, is
blocked in them, because a run that dies of it does not save. Runs at the same time divide the cores among themselves: two that
share them all are slower than two that own half each, and their step times mean less.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

PYTHON = (sys.executable, "-m")
STOPPED = (75, -signal.SIGTERM)
"""Exit codes of a child that was asked to stop: the trainer's own, and that of one that had not yet begun to listen."""


class Children:
    """Starts them and passes signals on. A context manager, for the main thread."""

    def __init__(self, *descriptors: int, jobs: int = 1):
        """`descriptors` are inherited by every child; `jobs` of them run at a time."""
        self.stopping = False
        self._descriptors = descriptors
        self._shares = core_shares(jobs)
        self._living: list[tuple[subprocess.Popen, int]] = []  # and the number of its share

    def __enter__(self) -> "Children":
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for child, _share in self._living:  # only after an error of our own
            if child.poll() is None:
                child.terminate()
                child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, module: Sequence[str], out: Path, log: Path) -> subprocess.Popen:
        """`python -m MODULE ARGUMENTS`, its output to the file `out`, its complaints appended to `log`."""
        for path in (out, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._living = [(child, share) for child, share in self._living if child.poll() is None]
        taken = [share for _, share in self._living]
        share = min(range(len(self._shares)), key=taken.count)
        with out.open("ab") as to, log.open("ab") as complaints:
            child = self._start([*PYTHON, *module], to, complaints, self._shares[share])
        self._living.append((child, share))
        if self.stopping:  # the signal came while it was being started
            child.terminate()
        return child

    def _start(self, command: list[str], out: IO[bytes], log: IO[bytes], cores: set[int]) -> subprocess.Popen:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the child, as the cores are
        own = available_cores()
        if cores:
            os.sched_setaffinity(0, cores)
        try:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, pass_fds=self._descriptors, env=os.environ
            )
        finally:
            if cores:
                os.sched_setaffinity(0, own)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def terminate(self) -> None:
        """Tell all of them to stop."""
        self.stopping = True
        for child, _share in self._living:
            if child.poll() is None:
                child.terminate()

    def _stop(self, *_) -> None:
        self.terminate()


def available_cores() -> set[int]:
    """Those that this process may use; empty where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def core_shares(jobs: int) -> list[set[int]]:
    """The cores divided into `jobs` equal parts; a single empty part, all cores for everyone, where there are fewer cores."""
    cores = sorted(available_cores())
    each = len(cores) // jobs
    return [set(cores[n * each : (n + 1) * each]) for n in range(jobs)] if jobs > 1 and each else [set()]


def last_line(log: Path) -> str:
    """The last thing a child said, and so why it failed."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "it said nothing"
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else "it said nothing"
