"""E6: does it matter in which order codes are predicted? `vq_ar` of systems.py in six orders, which denoising has no need of.

    python experiments/lossless_vs_discrete/joint.py --workdir runs/lossless/joint \\
        --systems experiments/lossless_vs_discrete/orders.py

With the WORKDIR of the other systems, `vq_ar`, which goes in raster order, is trained once for both.

Claim, before it was run: orders in which neighbours follow each other (raster, snake, spiral, hilbert) need fewer bits for a
code than those in which they do not (centre, random), and draw no worse. It would be wrong if the interval of code_bits of
`random` lay below that of `vq_ar`.
"""

from pathlib import Path

from mmdiff.config import Config
from mmdiff.config_files import load_experiment, replaced
from mmdiff.orders import Order

ARMS = ("vq_ar", "snake", "spiral", "centre", "hilbert", "random")


def config(order: Order = "raster") -> Config:
    base = load_experiment(f"{Path(__file__).with_name('systems.py')}:vq_ar")
    return base if order == base.layout.order else replaced(base, {"layout.order": order, "name": f"vq_ar_{order}"})


vq_ar = config


def snake() -> Config:
    return config("snake")


def spiral() -> Config:
    return config("spiral")


def centre() -> Config:
    return config("centre")


def hilbert() -> Config:
    return config("hilbert")


def random() -> Config:
    return config("random")
