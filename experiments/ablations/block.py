"""Gated attention units or attention + SwiGLU, at about equal parameters (two units for each layer).

    mmdiff sweep experiments/ablations/block.py --budget 5m-per-arm --workdir runs/block
    mmdiff report runs/block

On the built-in coloured shapes, or on a prepared folder of images of 32 x 32 or any other size:

    mmdiff sweep experiments/ablations/block.py --budget 10m-per-arm --workdir runs/block_faces --data.source documents \\
        --data.path data/faces_64 --layout.row-length 240
"""

import dataclasses

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Sampling, Training
from mmdiff.sweeps.sweep import Sweep


def sweep() -> Sweep:
    attention = Config(
        name="block",
        model=Model(width=192, depth=3, patch=8, block="attention", head_width=32),
        layout=Layout(row_length=192, noised_copies=2),
        data=Data(source="shapes", max_objects=2, generator=(("draw", 0.7), ("caption", 0.3))),
        optimizer=Optimizer(learning_rate=2e-3, warmup=100),
        training=Training(batch_size=8, ema=0.998),
        sampling=Sampling(steps=10, guidance=1.5),
    )
    units = dataclasses.replace(attention.model, block="gau", depth=6, key_width=64)
    return Sweep(
        question="Does a gated attention unit learn images faster than attention with SwiGLU?",
        arms={"attention": attention, "gau": dataclasses.replace(attention, model=units)},
        seeds=2,
        baseline_seeds=3,
        metrics=("x_error", "text_bits_per_byte"),
    )
