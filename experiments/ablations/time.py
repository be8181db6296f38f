"""Where the noise time enters the network."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    arms = {
        "input": {},
        "token": {"model.time": "token", "layout.time_token": True, "layout.row_length": 65},
        "adaln": {"model.time": "adaln"},
        "none": {"model.time": "none"},
    }
    return Sweep(
        question="Where should the noise time enter the network?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
