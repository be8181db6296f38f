"""A narrow projection of the patches before the network's width."""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    base = {"model.patch": 8, "layout.row_length": 16, "training.batch_size": 64}
    arms = {"direct": base}
    arms |= {f"rank{rank}": base | {"model.bottleneck": rank, "model.lossless": False} for rank in (32, 64, 128)}
    return Sweep(
        question="Does a bottleneck in the patch embedding help, with patches of 192 values?",
        arms={name: replaced(BASE, changes) for name, changes in arms.items()},
    )
