"""`mmdiff sweep`: train the arms of a sweep on equal budgets."""

import re
import shlex
import sys
from pathlib import Path

from mmdiff.cli.main import USAGE
from mmdiff.cli.train import override, take_option, unknown_field
from mmdiff.config import ConfigError

HELP = """usage: mmdiff sweep FILE.py --budget BUDGET --workdir DIR [--FIELD VALUE ...] [options]

Trains every arm of the Sweep that sweep() of FILE.py returns, each on the same budget and with its seeds, evaluates it,
and keeps what `mmdiff report DIR` needs. The same command again goes on where it was stopped or killed, to the same figures.

  --budget BUDGET     what each run gets: 5m-per-arm (or s, h; training steps alone, measured once per arm and fixed in
                      DIR/sweep.json), 2000steps-per-arm, or 1e15flops-per-arm
  --arms A,B          only these arms, for now
  --jobs N            runs at a time, each on its share of the cores (default: 1)
  --strict            stop at the first failed run
  --FIELD VALUE       a field of the configuration, changed in every arm

examples:
  mmdiff sweep experiments/ablations/block.py --budget 5m-per-arm --workdir runs/block
  mmdiff sweep experiments/ablations/block.py --budget 200steps-per-arm --workdir runs/glance --arms gau
  mmdiff sweep experiments/ablations/block.py --budget 10m-per-arm --workdir runs/block_faces --data.source documents
      --data.path data/faces_64
  mmdiff report runs/block

exit codes: 0 every run is finished, or failed for good (diverged, or bad data: the report says which), 1 a run crashed (run
it again), 2 usage, 65 bad sweep, configuration or data, 75 stopped by SIGTERM or Ctrl-C after a save (run it again to go on);
with --strict that of the failed run
"""


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0 if argv else USAGE
    file, rest = argv[0], argv[1:]
    workdir, rest = take_option(rest, "--workdir")
    amount, rest = take_option(rest, "--budget")
    arms, rest = take_option(rest, "--arms")
    jobs, rest = take_option(rest, "--jobs")
    strict, rest = "--strict" in rest, [a for a in rest if a != "--strict"]
    from mmdiff.sweeps import budget
    from mmdiff.sweeps.sweep import load_sweep

    problem = unknown_field(rest)
    if file.startswith("-"):
        problem = "the first argument is the sweep's file, for example experiments/ablations/block.py"
    elif problem is None and workdir is None:
        problem = f"give --workdir, for example --workdir runs/{Path(file).stem}"
    elif problem is None and amount is None:
        problem = "give --budget, for example --budget 5m-per-arm"
    elif problem is None and "://" in str(workdir):
        problem = f"--workdir {workdir}: give a path; mount the bucket (gcsfuse) or use a shared disk"
    if jobs is not None and re.fullmatch(r"[1-9]\d*", jobs) is None:
        problem = f"--jobs {jobs!r} is not a positive number"
    for field in budget.SET_HERE:
        if problem is None and any(a.split("=")[0].replace("-", "_") == f"__training.{field}" for a in rest):
            problem = f"training.{field} is set by the sweep, from --budget and its seeds; leave it out"
    if problem is None and amount is not None:
        try:
            spend = budget.parse(amount)
        except ConfigError as error:
            problem = str(error)
    if problem:
        print(f"mmdiff sweep: {problem}", file=sys.stderr)
        return USAGE
    sweep = load_sweep(file)
    if rest:
        sweep = sweep.changed(lambda cfg: override(cfg, rest, "sweep"))
    from mmdiff.sweeps.conduct import conduct

    return conduct(
        sweep,
        spend,
        Path(workdir or "."),
        file=file,
        command=shlex.join(["mmdiff", "sweep", *argv]),
        overrides=rest,
        arms=None if arms is None else [name.strip() for name in arms.split(",") if name.strip()],
        jobs=int(jobs or 1),
        strict=strict,
    )
