"""Reading scenes back: from pixels, from captions, and scores for both.

`read_scene` compares each quarter of an image with every thing that could stand there, and with bare ground, and takes
the nearest in mean squared distance. On rendered scenes it is exact, and stays exact under noise far above what eight
bits or a sampler leave behind. A quarter that resembles nothing is reported as a thing whose size, colour and form are
`UNKNOWN`, so that scores count it as wrong instead of overlooking it.

Score of a scene read against the scene wanted, W and R things, each of four attributes (size, colour, form, place):

    accuracy = matches / (4 max(W, R))

with `matches` the most attributes that any one-to-one assignment of things makes equal. Missing and extra things
therefore count as wrong. A thing of random attributes scores about 0.3, not 0.
"""

import functools
import itertools
import re

import numpy as np

from mmdiff.data.shapes import (
    COLOURS,
    FORMS,
    GROUND,
    PLACES,
    SIZES,
    Scene,
    Thing,
    as_scene,
    tile,
)
from mmdiff.document import resize

UNKNOWN = "unknown"
EMPTY_RMS = 32.0
"""Bare ground may differ by this much, in root mean square levels; the faintest thing differs by about twice as much."""
UNEXPLAINED = 0.5
"""Share of a quarter's difference from bare ground that its best thing may leave unexplained."""

_THING = re.compile(rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(FORMS)}) at the ({'|'.join(PLACES)})")


def read_scene(pixels: np.ndarray) -> Scene:
    """The scene an image shows: uint8 [H, W, 3]. An image of an odd shape is first brought to 32 x 32."""
    pixels = np.asarray(pixels)
    side = pixels.shape[0]
    if pixels.shape[1] != side or side % 8 or not 24 <= side <= 128:
        pixels, side = resize(pixels, (32, 32)), 32
    half = side // 2
    names, templates, norms = _templates(half)
    quarters = pixels.reshape(2, half, 2, half, 3).swapaxes(1, 2).reshape(4, -1).astype(np.float32)
    quarters -= np.tile(np.array(GROUND, np.float32), half * half)
    energy = (quarters**2).sum(1)
    errors = energy[:, None] + norms - 2 * quarters @ templates.T
    things = []
    for place, total, error in zip(PLACES, energy, errors, strict=True):
        best = int(error.argmin())
        if total <= error[best]:
            if total > EMPTY_RMS**2 * quarters.shape[1]:
                things.append(Thing(UNKNOWN, UNKNOWN, UNKNOWN, place))
        elif error[best] > UNEXPLAINED * total:
            things.append(Thing(UNKNOWN, UNKNOWN, UNKNOWN, place))
        else:
            things.append(Thing(*names[best], place))
    return tuple(things)


@functools.lru_cache(maxsize=16)
def _templates(side: int) -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray]:
    """(size, colour, form) of all things, their differences from the ground [things, pixels], their squared norms."""
    names = list(itertools.product(SIZES, COLOURS, FORMS))
    tiles = np.stack([tile(form, colour, size, side) for size, colour, form in names]).astype(np.float32)
    templates = (tiles - np.array(GROUND, np.float32)).reshape(len(names), -1)
    return names, templates, (templates**2).sum(1)


def parse_caption(text: str) -> Scene | None:
    """The scene a caption describes, things in any order; None unless every word of it is understood."""
    text = re.sub(r"^(first|now), ", "", text.strip())
    things = [_THING.fullmatch(phrase) for phrase in re.split(r", | and ", text)]
    places = [thing[4] for thing in things if thing]
    if len(places) < len(things) or len(set(places)) < len(places):
        return None
    return as_scene([thing.groups() for thing in things if thing])


def attribute_accuracy(read: Scene, wanted: Scene) -> float:
    """Share of attributes that agree, under the best assignment; see the module's first lines."""
    if not read and not wanted:
        return 1.0
    few, many = sorted((read, wanted), key=len)
    equal = [[sum(a == b for a, b in zip(one, other, strict=True)) for other in many] for one in few]
    orders = itertools.permutations(range(len(many)), len(few))
    matches = max(sum(row[column] for row, column in zip(equal, order, strict=True)) for order in orders)
    return matches / (4 * len(many))


def caption_exact(text: str, scene: Scene) -> bool:
    """Whether the caption says exactly this scene."""
    return parse_caption(text) == as_scene(scene)


def score_caption(text: str, scene: Scene) -> float:
    """Attribute accuracy of a caption: 1 when it says exactly this scene, 0 when nothing in it can be read.

    Phrases that do not parse count as things that are wrong in every attribute, and so does every repetition of a place.
    """
    text = re.sub(r"^(first|now), ", "", text.strip())
    phrases = [phrase for phrase in re.split(r", | and ", text) if phrase.strip()]
    found = [match.groups() for phrase in phrases if (match := _THING.fullmatch(phrase.strip()))]
    things = {place: Thing(size, colour, form, place) for size, colour, form, place in reversed(found)}
    if not things:
        return 0.0
    wanted = as_scene(scene)
    accuracy = attribute_accuracy(as_scene(list(things.values())), wanted)
    counted = max(len(things), len(wanted))
    return accuracy * counted / max(len(phrases), len(wanted))
