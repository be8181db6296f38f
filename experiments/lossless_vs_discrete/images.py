"""Held-out images that the experiments of this folder measure tokenizers on: NAME, or documents=FOLDER."""

from pathlib import Path

import numpy as np

from mmdiff.config import Config, ConfigError, Data, Model
from mmdiff.data.sources import open_source
from mmdiff.document import Image, resize

GENERATED = {"shapes": ("draw", 32), "words": ("draw", 32), "probes": ("ocr", 64)}


def held_out(name: str, size: tuple[int, int], count: int) -> list[np.ndarray]:
    """The first image of each of `count` held-out documents, centre-cropped and resized to `size`: uint8 [h, w, 3].

    Raises:
      ConfigError: an unknown name.
    """
    kind, _, folder = name.partition("=")
    if kind in GENERATED:
        what, side = GENERATED[kind]
        data = Data(source=kind, generator=((what, 1.0),), generator_image_size=max(side, *size) if kind != "probes" else side)
    elif kind == "documents" and folder:
        data = Data(source="documents", path=str(Path(folder)))
    else:
        raise ConfigError(f"unknown images {name!r}; known: {', '.join(GENERATED)}, documents=FOLDER")
    source = open_source(Config(model=Model(patch=1, lossless=False), data=data), "validation")
    found = []
    for index in range(len(source)):
        images = [segment for segment in source[index].segments if isinstance(segment, Image)]
        if images:
            found.append(resize(images[0].pixels, size))
        if len(found) == count:
            break
    return found
