"""What the network predicts, and in which space its error counts: nine pairs, on patches of 4, 8 and 16.

The larger the patch, the more values a position must carry; of 768 values the network's width holds only 192.
"""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    arms = {}
    for patch in (4, 8, 16):
        for prediction in ("x", "eps", "v"):
            for loss in ("v", "x", "eps"):
                arms[f"patch{patch}-{prediction}-{loss}-loss"] = {
                    "model.patch": patch,
                    "model.lossless": patch < 16,
                    "layout.row_length": (32 // patch) ** 2,
                    "diffusion.prediction": prediction,
                    "diffusion.loss": loss,
                }
    return Sweep(
        question="Which prediction and which loss space suit which patch size?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
