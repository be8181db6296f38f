"""Long skips from the first half of the layers to the second."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    return Sweep(
        question="Do long skips help a gated attention network on patches?",
        arms={name: replaced(BASE, {"model.skip": name}) for name in ("none", "concat", "lerp")},
    )
