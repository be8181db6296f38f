"""A tiny sweep, and a trainer and evaluator that only pretend, so that the sweep's own logic is tested in no time."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Training
from mmdiff.sweeps import children
from mmdiff.sweeps.budget import parse
from mmdiff.sweeps.plan import make_plan
from mmdiff.sweeps.progress import Progress
from mmdiff.sweeps.runs import Runner, planned_runs
from mmdiff.sweeps.sweep import Sweep

PRETENDER = Path(__file__).parent / "pretender.py"
CODE = {"version": "0", "fingerprint": "f"}


def tiny_config(name: str = "good", depth: int = 1) -> Config:
    return Config(
        name=name,
        model=Model(width=48, depth=depth, patch=8, key_width=16, lossless=False),
        layout=Layout(row_length=96, max_grid=4),
        data=Data(
            source="shapes", size=24, generator_image_size=24, max_objects=1, vocabulary="bytes", generator=(("draw", 1.0),)
        ),
        optimizer=Optimizer(warmup=50),
        training=Training(batch_size=2, sample_every=0, validation_rows=2),
    )


def tiny_sweep(**changes) -> Sweep:
    arms = {"one": tiny_config(), "two": tiny_config(depth=2)}
    return Sweep(**{"question": "Does a second layer help?", "arms": arms, "seeds": 1, "baseline_seeds": 2} | changes)


def measured(name, cfg) -> dict:
    """What a measurement would give."""
    seconds = 0.1 * cfg.model.depth
    environment = {"processor": "abacus", "python": "3"}
    costs = {"step_seconds": seconds, "times": [seconds], "flops_per_step": 1e6, "parameters": 1000 * cfg.model.depth}
    return costs | {"environment": environment}


def plan_for(workdir: Path, sweep: Sweep, budget: str = "2s-per-arm", arms=None, measure=measured, **options):
    how = {"file": "s.py", "command": "mmdiff sweep s.py", "overrides": [], "code": CODE, "say": lambda line: None}
    return make_plan(workdir, sweep, parse(budget), sweep.chosen(arms), measure, **how | options)


def pretend(monkeypatch, workdir: Path, sweep: Sweep, **options) -> tuple[int, str]:
    """Conduct a sweep whose runs are the pretender's: (exit code, what was said)."""
    monkeypatch.setattr(children, "PYTHON", (sys.executable, str(PRETENDER)))
    plan = plan_for(workdir, sweep)
    runs, said = planned_runs(plan, workdir), io.StringIO()
    with children.Children() as processes:
        progress = Progress(plan, runs, options.get("jobs", 1), said)
        return Runner(plan, processes, progress, **options).go(runs), said.getvalue()


@pytest.fixture
def conduct(monkeypatch, tmp_path):
    return lambda sweep, **options: pretend(monkeypatch, tmp_path, sweep, **options)


def named(**arms: str) -> Sweep:
    """A sweep whose arms make the pretender behave as the names of their configurations say."""
    return tiny_sweep(arms={arm: tiny_config(name) for arm, name in arms.items()}, baseline_seeds=1)


def fake_run(folder: Path, curve, evaluation=None, seconds_per_step: float = 0.1, **more) -> None:
    """What a run leaves behind, by hand."""
    folder.mkdir(parents=True)
    lines = [{"step": step, "x_error": error, "seconds": 1.0} for step, error in curve]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in more.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        account = {"init": 3.0, "compile": 4.0, "step": seconds_per_step * curve[-1][0], "lost": 1.0}
        (folder / "goodput.json").write_text(json.dumps({"now": account, "saves": {}}))


def with_metrics(sweep: Sweep, *metrics: str) -> Sweep:
    return dataclasses.replace(sweep, metrics=metrics)
