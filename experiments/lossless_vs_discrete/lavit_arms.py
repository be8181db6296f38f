"""E6: what LaVIT's choices are worth, each changed alone, on the same transformer and documents.

    python experiments/stand_ins/two_tower.py --side 32 --patch 4 --out runs/stand_ins/two_tower_32
    mmdiff train experiments/lossless_vs_discrete/semantic.py:lavit --workdir runs/tokenizers/lavit
    mmdiff train experiments/lossless_vs_discrete/semantic.py:lavit_fixed --workdir runs/tokenizers/lavit_fixed
    mmdiff train experiments/lossless_vs_discrete/semantic.py:lavit_bidirectional --workdir runs/tokenizers/lavit_bidirectional
    python experiments/lossless_vs_discrete/joint.py --workdir runs/lossless/joint \
        --systems experiments/lossless_vs_discrete/lavit_arms.py

    lavit                 as many codes as an image needs, classified
    lavit_regression      the same codes, the numbers of each regressed (next_vector)
    lavit_fixed           a code for every patch: 64
    lavit_bidirectional   a merger in which a kept patch reads all that are kept
    lavit_continuous      the merged features themselves, before they are quantised; reads, and draws nothing

With the WORKDIR of the other systems (systems.py), `lavit` is trained once for both.

Claims, before any was run, from what LaVIT reports: (1) classification draws better than regression; (2) fewer codes cost
nothing at equal positions; (3) codes answer and describe worse than the features before them; (4) a causal merger suits
next-token prediction. (1) would be wrong if the interval of image_accuracy of `lavit_regression` reached that of `lavit`; (2)
if the interval of caption_accuracy or image_accuracy of `lavit_fixed` lay above that of `lavit`; (3) if that of
question_accuracy or caption_accuracy of `lavit_continuous` did not lie above that of `lavit`; (4) if `lavit_bidirectional` drew
better.
"""

import dataclasses
from pathlib import Path

from mmdiff.config import Config, FrontEnd
from mmdiff.config_files import load_experiment, replaced

ARMS = ("lavit", "lavit_regression", "lavit_fixed", "lavit_bidirectional", "lavit_continuous")
SYSTEMS = Path(__file__).with_name("systems.py")
TOKENIZERS = "runs/tokenizers"


def config(name: str = "lavit", **changes) -> Config:
    """`lavit` of systems.py, and what differs."""
    named = {"name": name} | {f"data.{field}": value for field, value in changes.items()}
    return replaced(load_experiment(f"{SYSTEMS}:lavit"), named)


lavit = config


def lavit_regression() -> Config:
    cfg = config("lavit_regression")
    return replaced(cfg, {"layout.images": "next_vector"})


def lavit_fixed() -> Config:
    return config("lavit_fixed", tokenizer=f"{TOKENIZERS}/lavit_fixed")


def lavit_bidirectional() -> Config:
    return config("lavit_bidirectional", tokenizer=f"{TOKENIZERS}/lavit_bidirectional")


def lavit_continuous() -> Config:
    base = load_experiment(f"{SYSTEMS}:llava")
    front = FrontEnd(
        kind="merger",
        encoder=base.front_end.encoder,
        tower=base.front_end.tower,
        tokens=64,
        depth=2,
        init=f"{TOKENIZERS}/lavit",
    )
    layout = dataclasses.replace(base.layout, max_grid=64)
    return dataclasses.replace(base, name="lavit_continuous", front_end=front, layout=layout)
