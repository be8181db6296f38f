"""How patches are told where they stand: at the input, by rotation, both, or not at all."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    arms = {"axial-100-smooth": {}}
    arms |= {f"axial-{base}": {"model.places": "none", "model.rope_base": float(base)} for base in (10, 100, 1000, 10000)}
    arms |= {
        "mixed": {"model.places": "none", "model.rope": "mixed", "model.rope_base": 10.0},
        "1-d": {"model.places": "none", "model.positions": "raster", "model.rope_base": 10000.0},
        "learned": {"model.places": "learned", "model.rope": "none"},
        "sincos": {"model.places": "sincos", "model.rope": "none"},
        "smooth": {"model.rope": "none"},
        "none": {"model.places": "none", "model.rope": "none"},
    }
    return Sweep(
        question="How should patches be told where they stand?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
