"""Which noise levels are trained: schedule, times, shift."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    uniform = lambda schedule: {"diffusion.schedule": schedule, "diffusion.time_sampling": "uniform"}
    arms = {"logit-normal-0.8": {}}
    arms |= {f"logit-normal-{-mean:g}": {"diffusion.time_mean": mean} for mean in (-1.2, -0.4, 0.0)}
    arms |= {f"uniform-{schedule}": uniform(schedule) for schedule in ("flow", "cosine", "ddpm")}
    arms |= {f"shift-{shift:g}": {"diffusion.shift": shift} for shift in (0.67, 1.5)}
    return Sweep(
        question="Which noise levels should be trained most?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
