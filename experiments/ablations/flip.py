"""Mirrored images."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    return Sweep(
        question="Does mirroring the images help?",
        arms={"flip": BASE, "no-flip": replaced(BASE, {"data.flip": False})},
    )
