"""Words: a built-in generator of written words and numbers, a pure function of (seed, index).

A picture shows one word of up to five letters, or a number from 0 to 999, large or small, in one of six colours, at the
top, in the middle or at the bottom of a dark image twice as wide as high. The letters are a 5 x 7 bitmap, so the
picture is exact and `read_words` inverts it.

Kinds of documents (`*` marks what carries loss):

    draw   text*  image*        "the word 'seven' in large red letters at the top"
    read   image  text*

Splits: `unseen` holds one word or number in ten that no other split ever writes: reading, not recall. `test` holds one
text in ten (its words are known, this combination is not). `train` is the rest.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdiff.config import ConfigError
from mmdiff.data.shapes import COLOURS, GROUND, SIZES, Draws, check_split, checked_mix, held_out
from mmdiff.document import Document, Image, Text, resize

KINDS = ("draw", "read")
DEFAULT_MIX = (("draw", 0.6), ("read", 0.4))
SPLITS = ("train", "test", "unseen")
PLACES = {"top": "at the top", "middle": "in the middle", "bottom": "at the bottom"}
LONGEST = 5
NOISE = 40
"""Distance from the ground, in levels, that the reader takes for noise; the faintest colour is four times as far."""
NUMBERS = 1000

_WORDS = """
able acid acre age air also apple arm ask away baby back ball band bank bath beach bean bear bed bell best big bike
bird blue boat body bone book box boy bread brick bus cake calm camp car card cat chair chin city clay clock cloud coal
coat cold cook corn cow cup dance dark day deep deer desk dog door down dream dress drum dry duck dust ear earth east
easy egg eight end eye face fact farm fast fern film fire fish five flag flour fog foot fork four fox frog fruit game
gate gift girl glass goat gold good grass green hair half hand happy hat head heart help hill home honey horse house
ice ink iron jam jazz job joke judge jump just keep key kick kind king kite knee lake lamp leaf lemon light lion long
loud lunch map maze milk mind mint moon mouse music name near neck nest new night nine nose note ocean old one open
oven owl page paper park pearl pen piano pig pink plum poem pond queen quick quiet quiz rain red rice ring river road
rock room rose salt sand sea seed seven ship shoe shop silk six skin sky sleep snow soap song soup star stone storm
sugar sun table tail tea ten three tiger time town train tree two uncle under vase view voice wall water wave wheel
white wind wolf wood word yard year young zebra zero zoo
"""
WORD_LIST = tuple(_WORDS.split())

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_FONT = """
..... #.... ..... ....# ..... ..##. ..... #.... ..#.. ...#. #.... .##..
..... #.... ..... ....# ..... .#... .#### #.... ..... ..... #.... ..#..
.###. ####. .#### .#### .###. ####. #...# ####. .##.. ..##. #..#. ..#..
....# #...# #.... #...# #...# .#... #...# #...# ..#.. ...#. #.#.. ..#..
.#### #...# #.... #...# ##### .#... .#### #...# ..#.. ...#. ##... ..#..
#...# #...# #.... #...# #.... .#... ....# #...# ..#.. #..#. #.#.. ..#..
.#### ####. .#### .#### .#### .#... .###. #...# .###. .##.. #..#. .###.

..... ..... ..... ..... ..... ..... ..... .#... ..... ..... ..... .....
..... ..... ..... ..... ..... ..... ..... .#... ..... ..... ..... .....
##.#. ####. .###. ####. .#### #.##. .#### ####. #...# #...# #...# #...#
#.#.# #...# #...# #...# #...# ##..# #.... .#... #...# #...# #.#.# .#.#.
#.#.# #...# #...# ####. .#### #.... .###. .#... #...# #...# #.#.# ..#..
#.#.# #...# #...# #.... ....# #.... ....# .#... #...# .#.#. #.#.# .#.#.
#.#.# #...# .###. #.... ....# #.... ####. ..##. .#### ..#.. .#.#. #...#

..... ..... .###. ..#.. .###. ####. #..#. ##### .###. ##### .###. .###.
#...# ..... #...# .##.. #...# ....# #..#. #.... #.... ....# #...# #...#
#...# ##### #..## #.#.. ....# ....# #..#. ####. #.... ...#. #...# #...#
#...# ...#. #.#.# ..#.. ..##. .###. ##### ....# ####. ..#.. .###. .####
.#### ..#.. ##..# ..#.. .#... ....# ...#. ....# #...# ..#.. #...# ....#
....# .#... #...# ..#.. #.... ....# ...#. #...# #...# ..#.. #...# ....#
.###. ##### .###. ##### ##### ####. ...#. .###. .###. ..#.. .###. .###.
"""


def _glyphs() -> dict[str, np.ndarray]:
    """bool [7, 5] per character, from the three lines of drawings above."""
    bands = [band.split("\n") for band in _FONT.strip("\n").split("\n\n")]
    drawings = [[row.split()[column] for row in band] for band in bands for column in range(12)]
    return {
        character: np.array([[cell == "#" for cell in row] for row in drawing])
        for character, drawing in zip(CHARACTERS, drawings, strict=True)
    }


GLYPHS = _glyphs()


class Writing(NamedTuple):
    """What an image says: a word, or the digits of a number."""

    content: str
    size: str
    colour: str
    place: str


def caption(writing: Writing) -> str:
    """The one description of a writing."""
    content, size, colour, place = writing
    what, marks = (f"number {content}", "digits") if content.isdigit() else (f"word '{content}'", "letters")
    return f"the {what} in {size} {colour} {marks} {PLACES[place]}"


_CAPTION = re.compile(
    rf"the (?:number (\d+)|word '([a-z]+)') in ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) (digits|letters) "
    rf"({'|'.join(PLACES.values())})"
)


def parse_caption(text: str) -> Writing | None:
    """The inverse of `caption`; None for any other text."""
    found = _CAPTION.fullmatch(text.strip())
    if not found or (found[1] is None) != (found[5] == "letters"):
        return None
    place = next(place for place, words in PLACES.items() if words == found[6])
    return Writing(found[1] or found[2], found[3], found[4], place)


# Pictures.


def render(writing: Writing, image_size: int = 32) -> np.ndarray:
    """Draw a writing: uint8 [image_size, 2 * image_size, 3]."""
    content, size, colour, place = writing
    pixels = np.empty((image_size, 2 * image_size, 3), np.uint8)
    pixels[:] = GROUND
    top, left, dot = _corner(size, place, len(content), image_size)
    for number, character in enumerate(content):
        glyph = _glyph(character, dot)
        x = left + 6 * dot * number
        pixels[top : top + 7 * dot, x : x + 5 * dot][glyph] = COLOURS[colour]
    return pixels


def _corner(size: str, place: str, letters: int, image_size: int) -> tuple[int, int, int]:
    """Top and left of the first letter, and the pixels per dot of the bitmap."""
    dot = (image_size // 32) * (2 if size == "large" else 1)
    margin = image_size // 16
    tops = {"top": margin, "middle": (image_size - 7 * dot) // 2, "bottom": image_size - margin - 7 * dot}
    return tops[place], (2 * image_size - (6 * letters - 1) * dot) // 2, dot


@functools.lru_cache(maxsize=1024)
def _glyph(character: str, dot: int) -> np.ndarray:
    return GLYPHS[character].repeat(dot, 0).repeat(dot, 1)


# Reading.


def read_words(pixels: np.ndarray) -> Writing | None:
    """What an image shows, uint8 [H, 2 H, 3]; None when it resembles no writing.

    For every size, place and length, each letter's cell is compared with all glyphs in mean squared distance; the
    hypothesis with the least total error wins. An image of an odd shape is first brought to 32 x 64.
    """
    pixels = np.asarray(pixels)
    image_size = pixels.shape[0]
    if pixels.shape[1] != 2 * image_size or not _good_size(image_size):
        pixels, image_size = resize(pixels, (32, 64)), 32
    difference = pixels.astype(np.float32) - np.array(GROUND, np.float32)
    # Ink is 0 on the ground, noise included, and 1 in the strongest colour found; the colour itself is decided last.
    strength = np.sqrt((difference**2).sum(-1))
    peak = max(float(np.percentile(strength, 99.5)), 2 * NOISE)
    ink = np.clip((strength - NOISE) / (peak - NOISE), 0, 1)
    total = float((ink**2).sum())
    best: tuple[float, Writing, np.ndarray] | None = None
    for size in SIZES:
        for place in PLACES:
            for letters in range(1, LONGEST + 1):
                top, left, dot = _corner(size, place, letters, image_size)
                band = ink[top : top + 7 * dot, left : left + 6 * dot * letters - dot]
                padded = np.pad(band, ((0, 0), (0, dot))).reshape(7 * dot, letters, 6 * dot)
                cells = padded[:, :, : 5 * dot].swapaxes(0, 1).reshape(letters, -1)
                # |cell - glyph|^2 - |cell|^2: what the glyph leaves unexplained, less what no glyph would.
                change = _glyph_norms(dot) - 2 * cells @ _glyph_matrix(dot).T
                error = total + float(change.min(1).sum())
                if best is None or error < best[0]:
                    content = "".join(CHARACTERS[i] for i in change.argmin(1))
                    best = error, Writing(content, size, "", place), cells
    if best is None or best[0] > 0.5 * total or strength.max() < 2 * NOISE:
        return None
    writing = best[1]
    mask = render(writing._replace(colour="white"), image_size).sum(-1) > sum(GROUND)
    seen = pixels[mask].astype(np.float32).mean(0)
    colour = min(COLOURS, key=lambda name: float(((seen - COLOURS[name]) ** 2).sum()))
    return writing._replace(colour=colour)


@functools.lru_cache(maxsize=16)
def _glyph_matrix(dot: int) -> np.ndarray:
    return np.stack([_glyph(character, dot).reshape(-1) for character in CHARACTERS]).astype(np.float32)


@functools.lru_cache(maxsize=16)
def _glyph_norms(dot: int) -> np.ndarray:
    return (_glyph_matrix(dot) ** 2).sum(1)


def writing_accuracy(read: Writing | None, wanted: Writing) -> float:
    """Share of the four attributes (content, size, colour, place) that agree; 0 when nothing was read."""
    return 0.0 if read is None else sum(a == b for a, b in zip(read, wanted, strict=True)) / 4


def character_accuracy(read: Writing | None, wanted: Writing) -> float:
    """1 - edit distance / length of the content wanted, at least 0."""
    content = "" if read is None else read.content
    row = list(range(len(wanted.content) + 1))
    for i, character in enumerate(content, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(wanted.content, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (character != other))
    return max(0.0, 1 - row[-1] / len(wanted.content))


def score_caption(text: str, wanted: Writing) -> float:
    """Attribute accuracy of a description; 0 when it cannot be parsed."""
    return writing_accuracy(parse_caption(text), wanted)


# Documents.


def _good_size(image_size: int) -> bool:
    return image_size % 8 == 0 and 32 <= image_size <= 128


class Words:
    """`size` documents; document i is a function of (seed, i) and of the arguments. Images are s x 2s pixels."""

    def __init__(
        self,
        seed: int = 0,
        size: int = 20000,
        image_size: int = 32,
        mix: Sequence[tuple[str, float]] = (),
        split: str = "train",
    ):
        if not _good_size(image_size):
            raise ConfigError(f"data.generator_image_size={image_size}: words needs a multiple of 8 from 32 to 128.")
        check_split(split, SPLITS)
        self.seed, self.size, self.image_size, self.split = seed, size, image_size, split
        self.mix = checked_mix(mix, DEFAULT_MIX, "words")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self.size:
            raise IndexError(f"document {index} of {self.size}")
        draws = Draws(self.seed, index)
        kind = draws.weighted(self.mix)
        writing = self._writing(draws)
        picture = Image(render(writing, self.image_size), learn=kind == "draw")
        text = Text(caption(writing))
        extra: dict[str, Any] = {"kind": kind, "writing": writing}
        return Document(*((text, picture) if kind == "draw" else (picture, text)), split=self.split, extra=extra)

    def texts(self, limit: int = 5000) -> Iterator[str]:
        """Texts of the first documents, to train a vocabulary on."""
        for index in range(min(limit, self.size)):
            yield from self[index].texts

    def _writing(self, draws: Draws) -> Writing:
        colours, places = tuple(COLOURS), tuple(PLACES)
        while True:
            content = draws.choice(WORD_LIST) if draws.below(3) else str(draws.below(NUMBERS))
            writing = Writing(content, draws.choice(SIZES), draws.choice(colours), draws.choice(places))
            if split_of(writing) == self.split:
                return writing


def split_of(writing: Writing) -> str:
    """The split a writing belongs to; see the module's first lines."""
    if held_out(f"'{writing.content}'"):
        return "unseen"
    return "test" if held_out(caption(writing)) else "train"
