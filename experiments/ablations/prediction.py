"""What the network predicts, and in which space its error counts: nine pairs, for patches of one size.

The larger the patch, the more values a position must carry: 48 values of a patch of 4, 192 of 8, which is the network's
width, and 768 of 16. For patches of 8 and of 16, each with a baseline of its own:

    mmdiff sweep experiments/ablations/prediction.py ... --model.patch 8 --layout.row_length 16
    mmdiff sweep experiments/ablations/prediction.py ... --model.patch 16 --layout.row_length 4 --model.lossless False
"""

from pathlib import Path

from mmdiff.config_files import load_experiment, replaced
from mmdiff.sweeps.sweep import Sweep

BASE = load_experiment(Path(__file__).parents[1] / "faces_32.py")


def sweep() -> Sweep:
    pairs = [(prediction, loss) for prediction in ("x", "eps", "v") for loss in ("v", "x", "eps")]
    return Sweep(
        question="Which prediction and which loss space suit the patch size?",
        arms={
            f"{prediction}-{loss}-loss": replaced(BASE, {"diffusion.prediction": prediction, "diffusion.loss": loss})
            for prediction, loss in pairs
        },
    )
