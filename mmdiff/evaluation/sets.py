"""Metrics that compare a set of generated images with as many real ones, in the features of one extractor.

    real        the first `count` images that are drawn, of the split that is asked for
    generated   one for each, from the prompt that stands before it in the data, through uint8 like the real ones
    train       (encoder, nearest_train_ratio) images of the training split, evenly spread, all that are learnt

With prompts the sets are paired, as is the custom for text-to-image models: a good model's images then resemble the real
set more than another real set would, distances come out lower than between independent sets, and KID may fall below 0.
The generators' held-out split shows combinations that the training split lacks, so nearest_train_ratio below 1 is no sign
of copying there.

The formulas are in mmdiff/evaluation/distances.py, the extractors in mmdiff/evaluation/features.py. A result's name ends
with that of its features; what else it depends on goes to the task's notes, which `mmdiff evaluate` prints.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmdiff import config
from mmdiff.data.sources import open_source
from mmdiff.document import DataError, Image
from mmdiff.evaluation import distances, encoder, inception
from mmdiff.evaluation.features import NAMES, Features, patch_dct_features, random_features, side_for
from mmdiff.evaluation.task import SPLITS, Comparison, Task

TRAIN_IMAGES = 50_000
"""Training images among which the nearest is looked for, at most."""
K_PRECISION, K_DENSITY = 3, 5
NEEDS_WEIGHTS = f"features 'inception' need a file of weights: --features inception --weights {inception.KNOWN_NAME}."


class Embedded(NamedTuple):
    """Features [n, d] of the two sets."""

    real: np.ndarray
    generated: np.ndarray


def frechet(name: str) -> Callable[[Task], dict[str, float]]:
    """`frechet_<features>`, and `fid_inception`."""

    def measure(task: Task) -> dict[str, float]:
        found = embedded(task, name, least=2, metric=measured)
        width = found.real.shape[1]
        if len(found.real) <= width:
            task.warn(
                f"{measured}: {len(found.real)} images are not more than the {width} features of {name}: the covariances "
                f"are singular and the number is too high; compare equal counts only, or raise --count."
            )
        return {measured: distances.frechet(distances.moments(found.real), distances.moments(found.generated))}

    measured = frechet_name(name)
    return measure


def kid(name: str) -> Callable[[Task], dict[str, float]]:
    """`kid_<features>`: mean over random subsets; `kid_<features>_spread`: standard deviation over them."""

    def measure(task: Task) -> dict[str, float]:
        found = distances.kid(*embedded(task, name, least=4, metric=f"kid_{name}"), task.seed)
        return {f"kid_{name}": found.value, f"kid_{name}_spread": found.spread}

    return measure


def precision_recall(task: Task) -> dict[str, float]:
    """`precision_<features>`, `recall_<features>`."""
    name = task.comparison.space
    found = distances.precision_recall(*embedded(task, name, K_PRECISION + 1, "precision_recall"), K_PRECISION)
    return {f"precision_{name}": found.precision, f"recall_{name}": found.recall}


def density_coverage(task: Task) -> dict[str, float]:
    """`density_<features>`, `coverage_<features>`."""
    name = task.comparison.space
    found = distances.density_coverage(*embedded(task, name, K_DENSITY + 1, "density_coverage"), K_DENSITY)
    return {f"density_{name}": found.density, f"coverage_{name}": found.coverage}


def nearest_train_ratio(task: Task) -> dict[str, float]:
    """`nearest_train_ratio_<features>`: 1 is as far from the training images as held-out ones are, 0 copies of them;
    `nearest_train_closest_<features>`: the same of the closest twentieth."""
    name = task.comparison.space
    extract, found = features(task, name), embedded(task, name, 1, "nearest_train_ratio")
    held_out = found.real
    if task.comparison.split != "validation":
        held_out = extract(d.image.pixels for d in task.wanted_of(task.source))
    if not len(held_out):
        raise DataError("nearest_train_ratio: the held-out data has no image that is drawn.")
    train = extract(train_images(task, TRAIN_IMAGES))
    if not len(train):
        raise DataError("nearest_train_ratio: the training data has no image that is learnt.")
    task.notes["train_images"] = len(train)
    ratio = distances.nearest_ratio(found.generated, held_out, train)
    return {f"nearest_train_ratio_{name}": ratio.ratio, f"nearest_train_closest_{name}": ratio.closest}


def embedded(task: Task, name: str, least: int, metric: str) -> Embedded:
    """Features of the two sets, computed once.

    Raises:
      DataError: fewer than `least` images.
    """
    wanted = task.wanted
    if len(wanted) < least:
        raise DataError(
            f"{metric} needs at least {least} images, and there are {len(wanted)}: raise --count, or give more data."
        )
    extract = features(task, name)
    real = lambda: task.once(f"real {name}", lambda: extract(d.image.pixels for d in wanted))
    return task.once(f"embedded {name}", lambda: Embedded(real(), extract(task.generated)))


def features(task: Task, name: str) -> Features:
    """The extractor, made once and noted.

    Raises:
      ConfigError, DataError: its weights are missing or wrong, or there are no images to train it on.
    """

    def make() -> Features:
        made = open_features(task, name)
        task.notes.setdefault("features", {})[name] = {"hash": made.digest, "width": made.width, "resize": made.resize}
        return made

    return task.once(f"features {name}", make)


def open_features(task: Task, name: str) -> Features:
    choice, side = task.comparison, side_for([d.image.pixels for d in task.wanted])
    match name:
        case "random":
            return random_features(side)
        case "patch_dct":
            return patch_dct_features()
        case "inception":
            if choice.weights is None:
                raise config.ConfigError(NEEDS_WEIGHTS)
            return inception.load(choice.weights, choice.weights_sha256)
        case _:
            if choice.weights is not None:
                return encoder.load(choice.weights)
            return encoder.trained(train_images(task, encoder.IMAGES), side, encoder_path(task, side))


def encoder_path(task: Task, side: int) -> Path | None:
    """Where the run keeps its encoder: one file for each recipe and each configuration of the data."""
    if task.comparison.cache is None:
        return None
    data = json.dumps(dataclasses.asdict(task.model.cfg.data), sort_keys=True)
    words = f"{encoder.RECIPE} side {side} {data} {task.model.cfg.training.seed}"
    return task.comparison.cache / f"encoder-{hashlib.sha256(words.encode()).hexdigest()[:12]}.npz"


def train_images(task: Task, limit: int) -> Iterator[np.ndarray]:
    """Pixels of the learnt images of the training split; of more than `limit` documents, as many evenly spread."""
    source = open_source(task.model.cfg, "train")
    count = min(limit, len(source))
    for index in range(count):
        for segment in source[index * len(source) // count].segments:
            if isinstance(segment, Image) and segment.learn:
                yield segment.pixels


def in_space(name: str) -> list[str]:
    """Names of the metrics that show all there is to see in one extractor's features."""
    return [frechet_name(name), f"kid_{name}", "precision_recall", "density_coverage", "nearest_train_ratio"]


def frechet_name(name: str) -> str:
    """Only in Inception's features is it called FID."""
    return "fid_inception" if name == "inception" else f"frechet_{name}"


def check(comparison: Comparison, metrics: Sequence[str] = ()) -> None:
    """Refuse a choice of features that cannot work, before anything is measured.

    Raises:
      ConfigError: with the one line to show.
    """
    space, weights = comparison.space, comparison.weights
    if space not in NAMES:
        hint = config.suggest(space, list(NAMES)) or f"; choose from {', '.join(NAMES)}."
        raise config.ConfigError(f"unknown features {space!r}{hint}")
    asked = space == "inception" or any(name.endswith("_inception") for name in metrics)
    if asked and (space != "inception" or weights is None):
        raise config.ConfigError(NEEDS_WEIGHTS)
    if weights is not None and space not in ("inception", "encoder"):
        raise config.ConfigError(f"--weights {weights} needs --features inception or encoder, whose weights they are.")
    sha256 = comparison.weights_sha256
    if sha256 is not None and (space != "inception" or re.fullmatch("[0-9a-fA-F]{64}", sha256) is None):
        raise config.ConfigError(f"--weights-sha256 {sha256} must be 64 hexadecimal digits, with --features inception.")
    if weights is not None and space == "inception":
        inception.check_file(weights, sha256)
    if weights is not None and not weights.is_file():
        raise config.ConfigError(f"weights {weights} not found.")
    if comparison.split not in SPLITS:
        raise config.ConfigError(f"split={comparison.split!r} must be one of {', '.join(SPLITS)}.")
