"""The plan of a sweep, `sweep.json` in its workdir: written once, before the first run, and read ever after.

What a step costs is measured once per arm, and a time budget becomes a number of steps. A sweep that was killed and
started again reads the number, so it ends with the same figures as one that never was. An arm that could not be measured
has no steps yet; it is tried again at the next start.
"""

import dataclasses
import datetime
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mmdiff
from mmdiff.config import Config, ConfigError
from mmdiff.document import DataError
from mmdiff.sweeps.budget import Budget, fitted
from mmdiff.sweeps.sweep import Sweep
from mmdiff.training.workdir import flat, write_whole

FILE = "sweep.json"
ENVIRONMENT = "environment"


class Unmeasured(Exception):
    """An arm could not take a step; the message is its last line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm as planned. `config` is the sweep's own; `Plan.run_config` is what is trained."""

    config: dict[str, Any]
    seeds: list[int]
    steps: int = 0
    step_seconds: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    flops_per_step: float = 0.0
    parameters: int = 0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # where it differs from the plan's
    failed: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """`code` has one entry per state of the code that worked on the sweep; more than one means: compare with care."""

    question: str
    file: str
    command: str
    overrides: list[str]
    budget: str
    metrics: list[str]
    options: dict[str, Any]
    created: str
    code: list[dict[str, str]]
    environment: dict[str, str]
    arms: dict[str, Arm]

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def run_config(self, arm: str) -> Config:
        """What the arm's first seed trains; the others differ in training.seed."""
        planned = self.arms[arm]
        cfg = Config.from_json(json.dumps(planned.config))
        return fitted(cfg, planned.steps, planned.step_seconds, planned.seeds[0])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def read_plan(workdir: Path) -> Plan | None:
    """The plan of a workdir, if it has one.

    Raises:
      DataError: the file is damaged.
    """
    path = workdir / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        arms = {name: Arm(**arm) for name, arm in values.pop("arms").items()}
        return Plan(**values, arms=arms)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not the plan of a sweep ({error}); restore it, or use another folder.") from error


def make_plan(
    workdir: Path,
    sweep: Sweep,
    budget: Budget,
    chosen: Sequence[str],
    measure: Callable[[str, Config], dict[str, Any]],
    *,
    file: str,
    command: str,
    overrides: Sequence[str],
    code: dict[str, str],
    strict: bool = False,
    say: Callable[[str], None] = print,
) -> Plan:
    """Read the workdir's plan, or make it; measure those of the `chosen` arms that it has no steps for.

    `measure(arm, config)` returns what mmdiff/sweeps/measure.py prints, or raises Unmeasured.

    Raises:
      ConfigError: the sweep is not the one that the workdir was started with, or (with `strict`: one of) the arms cannot
        be trained at all.
    """
    old = read_plan(workdir)
    plan = _empty(sweep, budget, file, command, overrides, code) if old is None else old
    if old is not None:
        check_same(workdir, old, _empty(sweep, budget, file, command, overrides, code))
        if code["fingerprint"] not in [c["fingerprint"] for c in old.code]:
            say("warning: the code has changed since this sweep was started; its runs may not compare.")
            plan = dataclasses.replace(plan, code=[*plan.code, code])
    for name in chosen:
        if plan.arms[name].steps:
            continue
        cfg = sweep.arms[name]
        try:
            measured = measure(name, cfg)
        except Unmeasured as error:
            if strict:
                raise ConfigError(f"arm {name!r}: {error}") from error
            say(f"{name}: failed: {error}")
            arm = dataclasses.replace(plan.arms[name], config=_plain(cfg), failed=str(error))
        else:
            plan, arm = _measured(plan, name, _plain(cfg), budget, measured)
            say(f"{name}: {describe(arm)}")
        plan = dataclasses.replace(plan, arms=plan.arms | {name: arm})
    failed = [name for name in chosen if not plan.arms[name].steps]
    if old is None and len(failed) == len(chosen):
        raise ConfigError(f"no arm can be trained; {failed[0]!r}: {plan.arms[failed[0]].failed}")
    write_whole(workdir / FILE, plan.to_json().encode())
    return plan


def _measured(plan: Plan, name: str, cfg: dict[str, Any], budget: Budget, measured: dict[str, Any]) -> tuple[Plan, Arm]:
    """The arm with what was measured; the first arm's environment becomes the plan's."""
    costs = {key: value for key, value in measured.items() if key != ENVIRONMENT}
    environment = measured[ENVIRONMENT]
    if not plan.environment:
        plan = dataclasses.replace(plan, environment=environment)
    steps = budget.steps(measured["step_seconds"], measured["flops_per_step"])
    elsewhere = environment if environment != plan.environment else {}
    return plan, Arm(config=cfg, seeds=plan.arms[name].seeds, steps=steps, environment=elsewhere, **costs)


def describe(arm: Arm) -> str:
    """What a run of the arm is, in words."""
    return (
        f"{arm.steps:,} steps of {1000 * arm.step_seconds:.4g} ms and {arm.flops_per_step / 1e9:.4g} GFLOP, "
        f"{arm.parameters:,} parameters"
    )


def check_same(workdir: Path, old: Plan, new: Plan) -> None:
    """Refuse to go on with another sweep than the workdir's; an arm that was never planned may change.

    Raises:
      ConfigError: names the first difference.
    """
    for field in ("question", "budget", "metrics", "options"):
        _same(workdir, field, getattr(old, field), getattr(new, field))
    _same(workdir, "arms", ", ".join(old.arms), ", ".join(new.arms))
    for name, arm in old.arms.items():
        _same(workdir, f"arm {name!r}: seeds", len(arm.seeds), len(new.arms[name].seeds))
        if not arm.steps:
            continue
        before = flat(_plain(Config.from_json(json.dumps(arm.config))))  # with the defaults of fields newer than the plan
        for field, value in flat(new.arms[name].config).items():
            _same(workdir, f"arm {name!r}: {field}", before.get(field), value)


def _same(workdir: Path, what: str, old: Any, new: Any) -> None:
    if old != new:
        raise ConfigError(f"{workdir} was started with {what}={old!r}, not {new!r}; use another --workdir, or the old value.")


def _plain(cfg: Config) -> dict[str, Any]:
    return json.loads(cfg.to_json())


def _empty(sweep: Sweep, budget: Budget, file: str, command: str, overrides: Sequence[str], code: dict[str, str]) -> Plan:
    arms = {name: Arm(config=_plain(cfg), seeds=list(sweep.seeds_of(name))) for name, cfg in sweep.arms.items()}
    return Plan(
        question=sweep.question.strip(),
        file=file,
        command=command,
        overrides=list(overrides),
        budget=budget.text,
        metrics=list(sweep.metrics),
        options=dict(sweep.options),
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        code=[code],
        environment={},
        arms=arms,
    )


def code_version(fingerprint: str) -> dict[str, str]:
    """The state of the code: the package's version, a hash of its source files, and the commit if it is a git checkout."""
    root = Path(mmdiff.__file__).parent
    version = {"version": mmdiff.__version__, "fingerprint": fingerprint}
    if not (root.parent / ".git").exists():
        return version
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return version
    return version | ({"commit": told.stdout.strip()} if told.returncode == 0 else {})
