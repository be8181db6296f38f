"""Digits in few network evaluations: what a tuned grid and few-step training keep of the quality of 50.

The model and the training of digits.py; then, from its averaged weights, few-step training with each objective. Means
over SETS sets of 200 drawn digits, without guidance:

    class_accuracy      drawn digits that a classifier takes for what they should be
    frechet_distance    of their 64 pixels to the held-out ones; 200 real training images score 0.234
    caption_accuracy    greedy captions that are exactly right, before and after few-step training
"""

import argparse
import json
import sys
from collections.abc import Iterator

import common
import digits
import digits_data as data
import numpy as np
from common import say

from mmdiff import IMG, Document, config_files
from mmdiff.cli.train import FEW_STEP
from mmdiff.config import Config
from mmdiff.sampling import tuning
from mmdiff.sampling.generate import Model

SETS = 5
SOLVER, STEPS = "unipc2", (4, 6, 10, 50)
TUNED = (4, 6, 10)
PROMPTS = 50  # digits drawn while a grid is searched
FEW_EVALUATIONS = (1, 2, 4, 8)
OBJECTIVES = ("meanflow", "difference", "shortcut")
EXAMPLES = """examples:
  python benchmarks/few_steps.py                               all objectives, a table
  python benchmarks/few_steps.py --objectives meanflow --json  one of them, one JSON object
"""


def few_config(cfg: Config, objective: str, steps: int) -> Config:
    changes = {"few_step.objective": objective, "training.steps": steps, "optimizer.learning_rate": 1e-3}
    return config_files.replaced(cfg, FEW_STEP | changes)


def tune(model: Model, seed: int) -> None:
    """Adds the tuned grids to the model, as loading a run with a grids.json does."""
    labels = data.LABELS[:: len(data.LABELS) // PROMPTS]
    prompts = [Document(data.NAMES[label], IMG) for label in labels]
    search, check = (tuning.Target(model, prompts, (data.SIDE, data.SIDE), seed + n, guidance=1.0) for n in range(2))
    for steps in TUNED:
        found = tuning.tune(search, check, SOLVER, steps)
        say(f"{SOLVER}, {steps} steps: error {found.error:.3f}, {found.error_before:.3f} before")
        model.tuned[SOLVER, steps] = found.sigmas


def settings(model: Model) -> Iterator[dict]:
    """The drawings of one model: solver, grid and steps (one evaluation each)."""
    if model.cfg.model.step_input:
        yield from ({"solver": "few_step", "grid": "uniform_u", "steps": steps} for steps in FEW_EVALUATIONS)
        return
    yield from ({"solver": SOLVER, "grid": "uniform_logsnr", "steps": steps} for steps in STEPS)
    yield from ({"solver": SOLVER, "grid": "tuned", "steps": steps} for steps in TUNED)


def measure(model: Model, name: str, set_: data.Digits, judge: data.Judge, seed: int) -> dict:
    say(f"drawings and captions: {name}")
    rungs = []
    for setting in settings(model):
        scores = [judge.score(digits.draw(model, seed=seed + 1 + n, guidance=1.0, **setting)) for n in range(SETS)]
        rungs.append(setting | {key: float(np.mean([score[key] for score in scores])) for key in scores[0]})
        say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in rungs[-1].items()))
    captions = data.caption_accuracy(digits.caption(model, set_), set_.held_out_labels)
    return {"model": name, "caption_accuracy": captions, "drawings": rungs}


def table(figures: dict) -> str:
    lines = [f"{'model':12} {'grid':15} {'evaluations':>11} {'class':>7} {'Frechet':>8}"]
    for model in figures["models"]:
        for rung in model["drawings"]:
            scores = f"{rung['class_accuracy']:7.3f} {rung['frechet_distance']:8.3f}"
            lines.append(f"{model['model']:12} {rung['grid']:15} {rung['steps']:11} {scores}")
    lines.append("captions: " + ", ".join(f"{m['model']} {m['caption_accuracy']:.3f}" for m in figures["models"]))
    seconds = ", ".join(f"{name} {value * 1000:.0f} ms" for name, value in figures["seconds_per_step"].items())
    return "\n".join([*lines, f"training steps: {seconds}"])


def run(cfg: Config, few_steps: int, objectives: list[str]) -> dict:
    set_, seed = data.load(), cfg.training.seed
    judge, seconds = data.Judge(set_), {}
    learner = digits.Learner(cfg, set_)
    seconds["ordinary"] = digits.speed(digits.learn(learner, None))["seconds_per_step"]
    ordinary = learner.model()
    tune(ordinary, seed)
    models = [measure(ordinary, "ordinary", set_, judge, seed)]
    for objective in objectives:
        say(f"few-step training: {objective}")
        few = digits.Learner(few_config(cfg, objective, few_steps), set_, learner.state.ema)
        seconds[objective] = digits.speed(digits.learn(few, None))["seconds_per_step"]
        models.append(measure(few.model(), objective, set_, judge, seed))
    return {"training_steps": cfg.training.steps, "few_step_training_steps": few_steps} | {
        "seed": seed,
        "sets": SETS,
        "seconds_per_step": seconds,
        "models": models,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=digits.STEPS, help=f"ordinary training (default {digits.STEPS})")
    parser.add_argument("--few-steps", type=int, default=500, help="few-step training (default 500)")
    parser.add_argument(
        "--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME", help="of: %(choices)s"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    machine = common.machine()
    common.warn_if_busy(machine["load_average"][0])
    figures = run(digits.config(arguments.steps, arguments.seed), arguments.few_steps, arguments.objectives)
    facts = {"versions": common.versions("jax", "flax", "optax"), "machine": machine}
    print(json.dumps(figures | facts, indent=1) if arguments.json else table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
