"""How much each noise level counts in the loss."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    weighted = lambda name, value: {"diffusion.weighting": name, "diffusion.weighting_value": value}
    arms = {
        "v-loss": {},
        "uniform-eps": {"diffusion.loss": "eps", "diffusion.time_sampling": "uniform", "diffusion.schedule": "cosine"},
        "min-snr-5": weighted("min_snr", 5.0),
        "soft-min-snr": weighted("soft_min_snr", 0.5),
        "sigmoid-1": weighted("sigmoid", -1.0),
        "sigmoid-3": weighted("sigmoid", -3.0),
    }
    return Sweep(
        question="How should noise levels be weighted?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
