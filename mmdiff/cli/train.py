"""`mmdiff train`: an experiment file, a workdir, and any field of its configuration."""

import contextlib
import io
import itertools
import re
import sys
from pathlib import Path

import tyro

from mmdiff import config, config_files
from mmdiff.cli.main import DIVERGED, NOT_SAVED, PREEMPTED, USAGE

HELP = """usage: mmdiff train EXPERIMENT.py[:FUNCTION] --workdir DIR [--FIELD VALUE ...] [options]
       mmdiff train --init RUN [--few-step] --workdir DIR [--FIELD VALUE ...] [options]

Trains the configuration that config() (or FUNCTION()) of EXPERIMENT.py returns, or resumes DIR if it holds a run. In place
of EXPERIMENT.py stands a configuration as JSON just as well, such as another run's config.json.

  --init RUN              start from the averaged parameters of another run (and, without EXPERIMENT.py, its configuration)
  --few-step              learn to draw in 1 to 8 evaluations (few_step.objective: how); RUN stays the model for 10 and more
  --fields                list every field
  --strict                stop at a damaged checkpoint instead of going back to an older one
  --profile FIRST:LAST    write a profiler trace of the steps FIRST to LAST - 1 to DIR/profile
  --coordinator HOST:PORT --processes N --process I
                          be process I of N; on TPU pods and under Slurm the processes find each other without this

examples:
  mmdiff train experiments/quickstart.py --workdir runs/quickstart
  mmdiff train experiments/quickstart.py --workdir runs/deep --model.depth 8 --training.steps 5000
  mmdiff train --init runs/quickstart --few-step --workdir runs/quickstart_few --training.steps 500
  mmdiff train experiments/own_data.py --workdir runs/mine --data.path data/mine

exit codes: 0 done, 2 usage, 65 bad configuration or data, 70 diverged, 74 a checkpoint could not be written, 75 stopped by
SIGTERM after a save (run it again to go on), 1 a crash, or the watchdog (training.watchdog)
"""

FEW_STEP = {
    "model.step_input": True,
    "few_step.objective": "meanflow",
    "sampling.solver": "few_step",
    "sampling.grid": "auto",
    "sampling.steps": 4,
    "sampling.guidance": 1.0,
}
"""What --few-step changes."""


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0 if argv else USAGE
    init, rest = take_option(argv, "--init")
    if rest and not rest[0].startswith("-"):
        experiment, *rest = rest
    elif init is not None:
        experiment = str(Path(init) / "config.json")
        if not Path(experiment).is_file():
            raise config.ConfigError(f"--init {init} holds no run: config.json not found.")
    else:
        print("mmdiff train: the first argument is the experiment file, for example experiments/quickstart.py", file=sys.stderr)
        return USAGE
    few_step, rest = "--few-step" in rest, [a for a in rest if a != "--few-step"]
    workdir, rest = take_option(rest, "--workdir")
    traced, rest = take_option(rest, "--profile")
    coordinator, rest = take_option(rest, "--coordinator")
    processes, rest = take_option(rest, "--processes")
    process, rest = take_option(rest, "--process")
    strict = "--strict" in rest
    rest = [a for a in rest if a != "--strict"]
    cfg = config_files.load_experiment(experiment)
    if workdir is not None and "://" in workdir:
        raise config.ConfigError(f"--workdir {workdir}: give a path; mount the bucket (gcsfuse) or use a shared disk.")
    problem = None if "--fields" in rest else unknown_field(rest)
    if problem is None and workdir is None and "--fields" not in rest:
        problem = f"give --workdir, for example --workdir runs/{Path(experiment).stem}"
    for name, value in (("--processes", processes), ("--process", process)):
        if value is not None and not value.isdecimal():
            problem = f"{name} {value!r} is not a number"
    steps = re.fullmatch(r"(\d+):(\d+)", traced or "0:1")
    if steps is None or int(steps[1]) >= int(steps[2]):
        problem = f"--profile {traced!r} is no range of steps; write it as 10:15"
    if problem or steps is None:
        print(f"mmdiff train: {problem}", file=sys.stderr)
        return USAGE
    if init is not None:
        cfg = config_files.replaced(cfg, {"training.init": init})
    if few_step:
        cfg = config_files.replaced(cfg, FEW_STEP)
    cfg = override(cfg, ["--help" if a == "--fields" else a for a in rest])
    from mmdiff.parallel.distributed import initialize

    initialize(coordinator, *(None if number is None else int(number) for number in (processes, process)))
    profile = (int(steps[1]), int(steps[2])) if traced else None
    return run(cfg, workdir or ".", strict, profile)


def run(cfg: config.Config, workdir: str, strict: bool, profile: tuple[int, int] | None) -> int:
    """Train; what happened as an exit code."""
    from mmdiff.parallel import distributed
    from mmdiff.training.checkpoint import SaveError
    from mmdiff.training.guard import Diverged
    from mmdiff.training.loop import train
    from mmdiff.training.survival import Preempted

    try:
        metrics = train(cfg, workdir, strict=strict, profile=profile)
    except SaveError as error:
        print(f"mmdiff train: {error}", file=sys.stderr)
        return NOT_SAVED
    except (Diverged, Preempted) as stop:  # in all processes alike, so they can leave together
        if distributed.is_first():
            print(f"mmdiff train: {stop}", file=sys.stderr)
        distributed.shutdown()
        return DIVERGED if isinstance(stop, Diverged) else PREEMPTED
    except distributed.Disagreement:
        distributed.shutdown()
        raise
    for name, value in metrics.items() if distributed.is_first() else ():
        print(f"{name:<24} {value:.4f}")
    distributed.shutdown()
    return 0


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """Remove `name VALUE` or `name=VALUE`; returns (VALUE or None, the rest)."""
    value, rest, skip = None, [], False
    for index, argument in enumerate(arguments):
        if skip:
            skip = False
        elif argument == name and index + 1 < len(arguments):
            value, skip = arguments[index + 1], True
        elif argument.startswith(name + "="):
            value = argument[len(name) + 1 :]
        else:
            rest.append(argument)
    return value, rest


def unknown_field(arguments: list[str]) -> str | None:
    """A one-line complaint about the first option that names no field, or None."""
    known = config_files.field_names(config.Config)
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            plain = name.replace(".no_", ".")
            if name not in known and plain not in known:
                return f"unknown field '{name}'{config.suggest(name, known)}"
    return None


def override(cfg: config.Config, arguments: list[str], command: str = "train") -> config.Config:
    """Apply `--model.width 512` and the like; a value that does not parse ends with one line and exit code 2."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(config.Config, default=cfg, args=arguments, prog=f"mmdiff {command} FILE.py --workdir DIR")
    except SystemExit as stop:
        if stop.code:
            print(f"mmdiff {command}: {first_sentence(told.getvalue())}; see --fields", file=sys.stderr)
        raise


def first_sentence(boxed: str) -> str:
    """What tyro's box says above its first rule, on one line."""
    lines = [line.strip(" │").rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", boxed).splitlines()[1:]]
    said = itertools.takewhile(lambda line: line and not line.startswith(("─", "╰")), lines)
    return " ".join(said).rstrip(".") or "the arguments do not fit"
