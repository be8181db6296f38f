"""A loss summed or averaged over an image's values, and what Adam's eps makes of it."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    arms = {
        f"{reduction}-eps-{eps:g}": {"diffusion.reduction": reduction, "optimizer.eps": eps, "optimizer.clip": 0.0}
        for reduction in ("mean", "sum")
        for eps in (1e-12, 1e-7)
    }
    return Sweep(
        question="Must the loss be a sum, and does Adam's eps decide it?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
