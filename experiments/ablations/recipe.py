"""The seed's recipe against ours, on one network of the seed's kind, small.

The seed's learning rate rises over 4,000 updates and falls until 40,000 (of 500,000); here that curve of 40,000 is laid over
the run, however long it is.
"""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")
SEED = {
    "model.bias": True,
    "model.places": "none",
    "model.rope_base": 1000.0,
    "model.time_embedding": "table",
    "model.zero_head": False,
    "diffusion.schedule": "ddpm",
    "diffusion.prediction": "eps",
    "diffusion.loss": "eps",
    "diffusion.time_sampling": "uniform",
    "diffusion.reduction": "sum",
    "optimizer.name": "lamb",
    "optimizer.decay": "points",
    "optimizer.points": ((0, 0.0), (4000, 1.0), (20_000, 0.5), (40_000, 0.1)),
    "training.steps": 40_000,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-7,
    "optimizer.clip": 0.0,
    "training.ema_start": "zero",
    "sampling.steps": 1000,
    "sampling.solver": "ddpm_large",
    "sampling.grid": "ddpm_table",
}


def sweep() -> Sweep:
    arms = {"seed": SEED | {"optimizer.learning_rate": 1e-3}, "seed-lr-5e-3": SEED | {"optimizer.learning_rate": 5e-3}}
    arms["ours"] = {}
    return Sweep(
        question="How many steps does our recipe need for what the seed's reaches?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
        baseline_seeds=2,
        seeds=2,
    )
