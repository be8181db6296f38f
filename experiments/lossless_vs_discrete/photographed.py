"""Photographed words for readers.py: which sign does a word begin with? The left square of each picture, 64 x 64.

FOLDER is one that `mmdiff train` or `mmdiff prepare` would take: documents of one picture and the word it shows, split into
train and test. Few such words exist, so training examples are the same ones turned, sheared, stretched, moved and recoloured.
"""

from pathlib import Path

import numpy as np
import PIL.Image

from mmdiff.config import Config, Data, Model
from mmdiff.data.sources import open_source
from mmdiff.document import DataError, Document, Image

KIND = "letter"
SIDE = 64
SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"
TURN, SHEAR, STRETCH, MOVE, CONTRAST = 0.1, 0.2, 0.12, 3.0, 0.25  # standard deviations; radians, logarithms, pixels


def squares(folder: Path, split: str) -> tuple[list[PIL.Image.Image], list[str]]:
    """Left squares of the words of a split ("train" or "validation"), 64 x 64, and the signs that these begin with, small.

    Raises:
      DataError: no word of the folder begins with a letter or a digit.
    """
    source = open_source(Config(model=Model(patch=1, lossless=False), data=Data(source="documents", path=str(folder))), split)
    images, signs = [], []
    for document in map(source.__getitem__, range(len(source))):
        word = "".join(document.texts).strip().lower()
        if word and word[0] in SIGNS and document.images:
            pixels = document.images[0].pixels
            left = pixels[:, : len(pixels)]
            left = np.pad(left, ((0, 0), (0, len(pixels) - left.shape[1]), (0, 0)), mode="edge")
            images.append(PIL.Image.fromarray(left).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC))
            signs.append(word[0])
    if not images:
        raise DataError(f"{folder}: no {split} document shows a word that begins with a letter or a digit.")
    return images, signs


def asked(image: PIL.Image.Image, sign: str) -> Document:
    return Document(Image(np.asarray(image)), extra={"kind": KIND, "answer": sign})


def held_out(folder: Path) -> list[Document]:
    """All words that are not for training, as they are."""
    return [asked(image, sign) for image, sign in zip(*squares(folder, "validation"), strict=True)]


def examples(folder: Path, count: int) -> list[Document]:
    """`count` altered training words, the same ones at every call."""
    images, signs = squares(folder, "train")
    rng = np.random.default_rng(0)
    return [asked(altered(images[i], rng), signs[i]) for i in rng.integers(0, len(images), count)]


def altered(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    turn, shear, moved = TURN * rng.normal(), SHEAR * rng.normal(), MOVE * rng.normal(size=2)
    size, cos, sin = np.exp(STRETCH * rng.normal(size=2)), np.cos(turn), np.sin(turn)
    matrix = np.diag(size) @ np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
    middle = (SIDE - 1) / 2
    offset = middle + moved - matrix @ [middle, middle]
    edges = np.pad(np.asarray(image), ((SIDE, SIDE), (SIDE, SIDE), (0, 0)), mode="edge")  # so that no black comes in
    terms = (*matrix[0], offset[0] + SIDE, *matrix[1], offset[1] + SIDE)
    how = PIL.Image.Transform.AFFINE, terms, PIL.Image.Resampling.BILINEAR
    levels = np.asarray(PIL.Image.fromarray(edges).transform((SIDE, SIDE), *how), np.float32)[..., rng.permutation(3)]
    if rng.random() < 0.3:
        levels = 255 - levels
    mean = levels.mean()
    levels = mean + (levels - mean) * np.exp(CONTRAST * rng.normal()) + 20 * rng.normal()
    return PIL.Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
