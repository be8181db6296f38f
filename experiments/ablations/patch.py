"""The size of a patch, the same network otherwise."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    arms = {
        f"patch{patch}": {
            "model.patch": patch,
            "model.lossless": patch < 16,
            "layout.row_length": (32 // patch) ** 2,
        }
        for patch in (4, 2, 8, 16)
    }
    return Sweep(
        question="What does the size of a patch cost and bring?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
