"""A sweep from start to end: lock the workdir, read or make the plan, work through the runs."""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdiff.config import Config
from mmdiff.sweeps.budget import Budget
from mmdiff.sweeps.children import STOPPED, Children, last_line
from mmdiff.sweeps.lock import Lock
from mmdiff.sweeps.plan import Plan, Unmeasured, code_version, make_plan
from mmdiff.sweeps.progress import Progress
from mmdiff.sweeps.runs import PAUSE, PREEMPTED, Run, Runner, planned_runs
from mmdiff.sweeps.sweep import Sweep


class Interrupted(Exception):
    """A signal came while an arm was measured."""


def conduct(
    sweep: Sweep,
    budget: Budget,
    workdir: Path,
    *,
    file: str,
    command: str,
    overrides: Sequence[str] = (),
    arms: Sequence[str] | None = None,
    jobs: int = 1,
    strict: bool = False,
) -> int:
    """Do what is left of the sweep in `workdir`; the exit code.

    Raises:
      ConfigError, DataError: with the one line to show; nothing was started.
    """
    from mmdiff.parallel.distributed import code_fingerprint

    chosen = sweep.chosen(arms)
    with Lock(workdir, say) as lock, Children(lock.descriptor, jobs=jobs) as children:
        try:
            plan = make_plan(
                workdir,
                sweep,
                budget,
                chosen,
                lambda name, cfg: measured_apart(cfg, children, name, sweep.metrics),
                file=file,
                command=command,
                overrides=overrides,
                code=code_version(code_fingerprint()),
                strict=strict,
                say=say,
            )
        except Interrupted:
            say("stopped while measuring; nothing was started")
            return PREEMPTED
        runs = planned_runs(plan, workdir, chosen)
        progress = Progress(plan, runs, jobs)
        say(progress.outlook())
        code = Runner(plan, children, progress, jobs=jobs, strict=strict).go(runs)
        say(ending(plan, runs, workdir, code))
        return code


def measured_apart(cfg: Config, children: Children, name: str, metrics: Sequence[str]) -> dict[str, Any]:
    """What mmdiff/sweeps/measure.py says of a configuration, in a process of its own."""
    say(f"{name}: measuring a step ...", live=True)
    with tempfile.TemporaryDirectory() as folder:
        path, out, log = (Path(folder) / each for each in ("config.json", "out", "log"))
        path.write_text(cfg.to_json())
        process = children.start(["mmdiff.sweeps.measure", str(path), *metrics], out, log)
        while process.poll() is None:
            time.sleep(PAUSE)
        if children.stopping or process.returncode in STOPPED:
            raise Interrupted
        if process.returncode != 0:
            raise Unmeasured(last_line(log))
        return json.loads(out.read_text().splitlines()[-1])


def ending(plan: Plan, runs: Sequence[Run], workdir: Path, code: int) -> str:
    """What is there now, and what to do next."""
    finished = sum(run.evaluation() is not None for run in runs)
    failed = [run.name for run in runs if run.evaluation() is None and run.failure() is not None]
    failed += [name for name, arm in plan.arms.items() if arm.failed and not arm.steps]
    told = f"{finished} of {len(runs)} runs finished" + (f", failed: {', '.join(failed)}" if failed else "")
    again = "; the same command goes on from here" if code in (1, PREEMPTED) else ""
    return f"{told}{again}. For a report: mmdiff report {workdir}"


def say(line: str, live: bool = False) -> None:
    """A line for people; a `live` one only on a terminal, where the next line takes its place."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="" if live else "\n", flush=True)
    elif not live:
        print(line, flush=True)
