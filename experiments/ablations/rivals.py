"""Our two networks against U-Net, U-ViT and DiT of about as many parameters, under one loss, trainer and sampler."""

import dataclasses
from pathlib import Path

from mmdiff.config import Model
from mmdiff.config_files import load_experiment, replaced
from mmdiff.models.matching import matched, parameter_count
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")
TARGET = parameter_count(BASE)


def rival(model: Model):
    return matched(dataclasses.replace(BASE, model=model), TARGET, tolerance=0.15)


def sweep() -> Sweep:
    unet = rival(Model(network="unet", width=24, depth=2, patch=4, channels=(1, 2, 2), head_width=32))
    return Sweep(
        question="How do networks of equal size compare on small faces?",
        arms={
            "gau": BASE,
            "attention": replaced(BASE, {"model.block": "attention", "model.depth": 2}),
            "unet": replaced(unet, {"training.accumulate": 1}),  # convolutions in a loop crawl on XLA's CPU backend
            "uvit": rival(Model(network="uvit", width=128, depth=3, patch=4, head_width=16)),
            "dit": rival(Model(network="dit", width=128, depth=3, patch=4, head_width=16)),
        },
        baseline_seeds=2,
    )
