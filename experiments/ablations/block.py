"""Gated attention units against attention + SwiGLU: four of one cost about as much as two of the other."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    return Sweep(
        question="Which block learns images faster at equal parameters?",
        arms={"gau": BASE, "attention": replaced(BASE, {"model.block": "attention", "model.depth": 2})},
        seeds=3,
    )
