"""The update rule, each at a few learning rates. LAMB begins with a head that is not zero, which it could not move."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    rates = {"adamw": (1.5e-3, 5e-4, 4e-3), "muon": (1.5e-3, 4e-3), "lamb": (5e-3, 1.5e-2)}
    arms = {
        f"{name}-{rate:g}": {"optimizer.name": name, "optimizer.learning_rate": rate, "model.zero_head": name != "lamb"}
        for name, each in rates.items()
        for rate in each
    }
    return Sweep(
        question="Which update rule learns fastest?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
