"""Normalised queries and keys, for both kinds of block."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    arms = {
        f"{block}{'-norm' if norm else ''}": {"model.block": block, "model.depth": depth, "model.qk_norm": norm}
        for block, depth in (("gau", 4), ("attention", 2))
        for norm in (False, True)
    }
    return Sweep(
        question="Do normalised queries and keys help?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
