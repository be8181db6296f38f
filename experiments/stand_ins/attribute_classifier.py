"""A small classifier of what stands in each quarter of a generated scene: a judge of drawings that guesses where they are soft.

    python experiments/stand_ins/attribute_classifier.py --out runs/stand_ins/attributes.npz
    mmdiff evaluate RUN --metrics phrase_drawn --judge runs/stand_ins/attributes.npz

It is the judge of mmdiff/evaluation/judge.py with a group of phrases for each quarter: each thing that can stand there ("large
red circle at the top left"), or none. `image_accuracy` compares pixels with every thing there could be and calls unknown what
resembles none; this one has learnt from images, and decides. What it says of real images (`phrase_judge`) is the most to ask.
Numbers of one quarter bear the name of its first phrase: phrase_drawn_large_red_circle_at_the_top_left is all of the top left.

Held out: scenes that training never shows (mmdiff/data/shapes.py).
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

from mmdiff.config import ConfigError
from mmdiff.data.shapes import COLOURS, FORMS, PLACES, SIZES, Shapes
from mmdiff.evaluation import judge
from mmdiff.evaluation.phrases import classes

GROUPS = [[f"{' '.join(thing)} at the {place}" for thing in itertools.product(SIZES, COLOURS, FORMS)] for place in PLACES]
EXAMPLES, TESTED = 20_000, 500


def scenes(count: int, split: str, side: int) -> tuple[list[np.ndarray], list[str]]:
    """uint8 [side, side, 3] each, and what they show."""
    source = Shapes(0, count, side, mix=(("draw", 1.0),), max_objects=2, split=split)
    documents = [source[i] for i in range(count)]
    return [d.images[0].pixels for d in documents], [d.texts[0] for d in documents]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--steps", type=int, default=judge.STEPS)
    parser.add_argument("--side", type=int, default=32, metavar="PIXELS", help="of the images it learns from")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} must be at least 1.")
    try:
        shown = scenes(EXAMPLES, "train", arguments.side)
    except ConfigError as error:
        parser.error(str(error))
    found = judge.train(*shown, GROUPS, steps=arguments.steps)
    found.save(arguments.out)
    images, texts = scenes(TESTED, "test", arguments.side)
    right = found(images) == classes(texts, GROUPS)
    there = classes(texts, GROUPS) < len(GROUPS[0])
    shares = f"{right[there].mean():.3f} of things, {right.all(-1).mean():.3f} of whole scenes"
    print(f"{TESTED} unseen scenes: {shares} are seen right: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
