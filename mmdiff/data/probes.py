"""Probes: a built-in generator of questions about fine detail, a pure function of (seed, index).

Pictures are square, 64 or 128 pixels a side; lengths are given for 64 and double for 128, but for the odd pixel and the
cells of glyphs. Colours are any of 2^24. `*` marks what carries loss; `Document.extra` holds the kind, the question and
the answer.

    ocr     image  "which number?"  "07"*                two digits at 1 to 5 pixels per dot (`extra["size"]`)
    count   image  "how many dots?"  "17"*               1 to 30 equal dots, no two touching
    colour  image  "which colour?"  "a1b2c3"*            of the rectangle, at least a quarter of the picture, hexadecimal
    clock   image  "what time?"  "7:35"*                 in steps of five minutes
    odd     image  "where is the odd pixel?"  "12 40"*   row and column of the one pixel of another colour, from 0
    spot    image  image  "where do they differ?"  "3 5"*    row and column of one of 8 x 8 characters, from 0
    same    image  image  "same or different?"  "same"*  equal, or different in one character: half each
    glyphs  image*                                       8 x 8 pixels per cell, 8 fair bits each: mmdiff/data/probe_pictures.py

`glyphs` has no part in the default mix.

Splits: `test` holds one content in ten, by a hash, and `train` the rest, in any colours; but every answer, save that of
colour and odd, occurs in both:

    ocr     number, size and place             odd     row and column (train has every row and every column)
    count   size and places of the dots        spot    row, column, character before and after
    colour  the colour that is asked for       same    as spot; the whole grid where both are equal
    clock   time, size and place               glyphs  none: a hash would cost entropy, and 512 bits do not come twice
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdiff.config import ConfigError
from mmdiff.data import probe_pictures as pictures
from mmdiff.data.probe_pictures import GRID, Colour, Place
from mmdiff.data.shapes import Draws, check_split, checked_mix, held_out
from mmdiff.data.words import CHARACTERS
from mmdiff.document import Document, Image, Segment, Text

QUESTIONS = {
    "ocr": "which number?",
    "count": "how many dots?",
    "colour": "which colour?",
    "clock": "what time?",
    "odd": "where is the odd pixel?",
    "spot": "where do they differ?",
    "same": "same or different?",
}
KINDS = (*QUESTIONS, "glyphs")
DEFAULT_MIX = (*((kind, 1 / len(QUESTIONS)) for kind in QUESTIONS), ("glyphs", 0.0))
SPLITS = ("train", "test")
IMAGE_SIZES = (64, 128)
SIZES = (1, 2, 3, 4, 5)
"""ocr: pixels per dot of the bitmap, in an image of 64."""
MOST_DOTS = 30
CONTRAST = 96
"""Least difference in luma of ink and ground, in levels."""
DIFFERENCE = 64
"""colour, odd: least difference from the ground, in levels of the channel that differs most."""
GLYPH_BITS, GLYPH_CELL = 8, 8


class Probe(NamedTuple):
    """What a document asks."""

    answer: str
    content: str
    """What decides the split."""
    draw: Callable[[], Sequence[np.ndarray]]
    """Makes the pictures: most contents of the other split are dropped without any."""
    size: int | None = None


# Each kind of question: a function of random choices and of the side of the picture.


def _ocr(draws: Draws, side: int) -> Probe:
    digits, size = f"{draws.below(100):02}", draws.choice(SIZES)
    dot = size * side // 64
    corner = draws.below(side - 7 * dot + 1), draws.below(side - 11 * dot + 1)
    colours = _ink_and_ground(draws)
    content = f"number {digits} of size {size} at {corner}"
    return Probe(digits, content, lambda: [pictures.number(digits, corner, dot, *colours, side)], size)


def _count(draws: Draws, side: int) -> Probe:
    count, diameter = 1 + draws.below(MOST_DOTS), (3 + draws.below(4)) * side // 64
    corners = _scatter(count, diameter, diameter + 2 * side // 64, draws, side)
    colours = _ink_and_ground(draws)
    content = f"dots of {diameter} at {sorted(corners)}"
    return Probe(str(count), content, lambda: [pictures.dots(corners, diameter, *colours, side)])


def _colour(draws: Draws, side: int) -> Probe:
    margin = side // 16
    height, width = (side // 2 + draws.below(side // 2 - 2 * margin + 1) for _ in range(2))
    top, left = (margin + draws.below(side - 2 * margin - length + 1) for length in (height, width))
    colour, ground = _two_colours(draws)
    answer = bytes(colour).hex()
    return Probe(answer, f"colour {answer}", lambda: [pictures.swatch((top, left, height, width), colour, ground, side)])


def _clock(draws: Draws, side: int) -> Probe:
    hour, minute = 1 + draws.below(12), 5 * draws.below(12)
    radius = (20 + draws.below(11)) * side // 64
    centre = radius + 1 + draws.below(side - 2 * radius - 1), radius + 1 + draws.below(side - 2 * radius - 1)
    colours = _ink_and_ground(draws)
    answer = f"{hour}:{minute:02}"
    content = f"clock of {radius} at {centre}: {answer}"
    return Probe(answer, content, lambda: [pictures.clock(hour, minute, centre, radius, *colours, side)])


def _odd(draws: Draws, side: int) -> Probe:
    row, col = draws.below(side), draws.below(side)
    colours = _two_colours(draws)
    return Probe(f"{row} {col}", f"odd pixel at {row} {col}", lambda: [pictures.swatch((row, col, 1, 1), *colours, side)])


def _spot(draws: Draws, side: int) -> Probe:
    before, cell = _characters(draws), draws.below(GRID**2)
    row, col = divmod(cell, GRID)
    other = draws.choice(CHARACTERS.replace(before[cell], ""))
    after = before[:cell] + other + before[cell + 1 :]
    colours = _ink_and_ground(draws)
    content = f"{before[cell]} to {other} at {row} {col}"
    return Probe(f"{row} {col}", content, lambda: [pictures.characters(text, *colours, side) for text in (before, after)])


def _different(draws: Draws, side: int) -> Probe:
    return _spot(draws, side)._replace(answer="different")


def _equal(draws: Draws, side: int) -> Probe:
    text, colours = _characters(draws), _ink_and_ground(draws)
    return Probe("same", f"grid {text}", lambda: [pictures.characters(text, *colours, side)] * 2)


_PROBES = {"ocr": _ocr, "count": _count, "colour": _colour, "clock": _clock, "odd": _odd, "spot": _spot}


def _characters(draws: Draws) -> str:
    return "".join(draws.choice(CHARACTERS) for _ in range(GRID**2))


def _any_colour(draws: Draws) -> Colour:
    value = draws.below(2**24)
    return value >> 16, value >> 8 & 255, value & 255


def _ink_and_ground(draws: Draws) -> tuple[Colour, Colour]:
    while True:
        ink, ground = _any_colour(draws), _any_colour(draws)
        if abs(np.dot((0.299, 0.587, 0.114), np.subtract(ink, ground))) >= CONTRAST:
            return ink, ground


def _two_colours(draws: Draws) -> tuple[Colour, Colour]:
    while True:
        colour, ground = _any_colour(draws), _any_colour(draws)
        if max(abs(a - b) for a, b in zip(colour, ground, strict=True)) >= DIFFERENCE:
            return colour, ground


def _scatter(count: int, diameter: int, apart: int, draws: Draws, side: int) -> list[Place]:
    """Top left corners of discs whose centres lie at least `apart` from each other."""
    row, col = np.mgrid[: side - diameter + 1, : side - diameter + 1]
    while True:
        free = np.ones(row.shape, bool)
        corners: list[Place] = []
        while len(corners) < count and free.any():
            places = np.flatnonzero(free)
            top, left = divmod(int(places[draws.below(len(places))]), free.shape[1])
            corners.append((top, left))
            free &= (row - top) ** 2 + (col - left) ** 2 >= apart**2
        if len(corners) == count:
            return corners


# Documents.


class Probes:
    """`size` documents; document i is a function of (seed, i) and of the arguments."""

    def __init__(
        self,
        seed: int = 0,
        size: int = 20000,
        image_size: int = 64,
        mix: Sequence[tuple[str, float]] = (),
        split: str = "train",
    ):
        if image_size not in IMAGE_SIZES:
            raise ConfigError(f"data.generator_image_size={image_size}: probes needs {' or '.join(map(str, IMAGE_SIZES))}.")
        check_split(split, SPLITS)
        self.seed, self.size, self.image_size, self.split = seed, size, image_size, split
        self.mix = checked_mix(mix, DEFAULT_MIX, "probes")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self.size:
            raise IndexError(f"document {index} of {self.size}")
        # Another stream for each split: glyphs have nothing else that would tell the splits apart.
        draws = Draws(self.seed, index + 2**63 * SPLITS.index(self.split))
        kind = draws.weighted(self.mix)
        if kind == "glyphs":
            symbols = glyph_symbols(draws, self.image_size // GLYPH_CELL)
            image = Image(pictures.glyph_grid(symbols, GLYPH_BITS, GLYPH_CELL))
            return Document(image, split=self.split, extra={"kind": kind, "symbols": symbols.tolist()})
        probe = self._probe(kind, draws)
        segments: list[Segment] = [Image(pixels, learn=False) for pixels in probe.draw()]
        segments += [Text(QUESTIONS[kind], learn=False), Text(f" {probe.answer}")]
        extra: dict[str, Any] = {"kind": kind, "question": QUESTIONS[kind], "answer": probe.answer}
        if probe.size is not None:
            extra["size"] = probe.size
        return Document(*segments, split=self.split, extra=extra)

    def texts(self, limit: int = 5000) -> Iterator[str]:
        """Texts of the first documents, to train a vocabulary on."""
        for index in range(min(limit, self.size)):
            yield from self[index].texts

    def _probe(self, kind: str, draws: Draws) -> Probe:
        # Decided before the split is: that must not change the odds.
        make = draws.choice((_equal, _different)) if kind == "same" else _PROBES[kind]
        while True:
            probe = make(draws, self.image_size)
            if held_out(probe.content) == (self.split == "test"):
                return probe


def glyph_symbols(draws: Draws, cells: int) -> np.ndarray:
    """Uniform symbols, int64 [cells, cells]."""
    return np.array([[draws.below(2**GLYPH_BITS) for _ in range(cells)] for _ in range(cells)])
