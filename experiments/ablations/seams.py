"""Heads against the seams between large patches; patch_grid_ratio measures the seams (1: as in real images)."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    base = {"model.patch": 8, "layout.row_length": 16, "training.batch_size": 64}
    arms = {
        "linear": base,
        "conv": base | {"model.patch_head": "conv"},
        "overlap-1": base | {"model.overlap": 1},
        "overlap-2": base | {"model.overlap": 2},
        "conv-overlap-2": base | {"model.patch_head": "conv", "model.overlap": 2},
    }
    return Sweep(
        question="Which head removes the seams between patches of 8?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
        metrics=("x_error", "patch_grid_ratio"),
        options={"count": 200},
    )
