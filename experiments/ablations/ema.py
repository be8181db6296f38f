"""The decay of the moving average that samples are drawn with."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    arms = {f"{decay:g}": {"training.ema": decay} for decay in (0.998, 0.0, 0.99, 0.995, 0.999)}
    arms["0.998-from-zero"] = {"training.ema": 0.998, "training.ema_start": "zero"}
    return Sweep(
        question="How long should the moving average remember in a short run?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
