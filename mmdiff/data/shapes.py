"""Shapes: a built-in generator of documents about simple scenes, a pure function of (seed, index).

A scene is one to three things, each of a form, a colour and a size, at most one in each quarter of a dark square image.
Picture and caption are both exact: `render` and `caption` lose nothing, `mmdiff.data.shapes_reader` inverts them, so
that a drawing or a caption made by a model can be scored attribute by attribute.

Kinds of documents (`*` marks what carries loss; `Document.extra` holds the kind, the scene and what was asked):

    draw      caption*  image*
    caption   image  caption*
    question  image  question  answer*
    edit      image  instruction  edited image*
    story     "first, <caption>"*  image*  "then <instruction>"*  edited image*  "now, <caption>"*

One scene in ten, by a hash of its caption, is held out: `split="train"` never shows it, before or after an edit, and
`split="test"` shows no other.
"""

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdiff.config import ConfigError, suggest
from mmdiff.document import Document, Image, Segment, Text

FORMS = ("circle", "square", "triangle", "cross")
SIZES = ("large", "small")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (232, 48, 48),
    "green": (40, 190, 80),
    "blue": (40, 105, 250),
    "yellow": (252, 212, 40),
    "purple": (190, 70, 225),
    "white": (242, 242, 242),
}
GROUND = (22, 24, 32)
NUMBERS = ("no", "one", "two", "three")

KINDS = ("draw", "caption", "question", "edit", "story")
DEFAULT_MIX = (("draw", 0.4), ("caption", 0.25), ("question", 0.1), ("edit", 0.15), ("story", 0.1))
SPLITS = ("train", "test")


class Thing(NamedTuple):
    size: str
    colour: str
    form: str
    place: str

    def __str__(self):
        return f"{self.size} {self.colour} {self.form}"


Scene = tuple[Thing, ...]
"""Things in reading order: top to bottom, left to right."""


def as_scene(things: Sequence[Sequence[str]]) -> Scene:
    """Things in any order, or as the lists that JSON makes of them, as a Scene."""
    return tuple(sorted((Thing(*thing) for thing in things), key=lambda thing: PLACES.index(thing.place)))


def caption(scene: Scene) -> str:
    """The one description of a scene, e.g. "a large red circle at the top left and a small blue cross at ..."."""
    phrases = [f"a {size} {colour} {form} at the {place}" for size, colour, form, place in scene]
    if len(phrases) < 2:
        return phrases[0] if phrases else "nothing"
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def held_out(text: str) -> bool:
    """Whether what this text describes is kept for the test split: one in ten, the same on every machine."""
    return zlib.crc32(text.encode()) % 10 == 0


# Pictures.


def render(scene: Scene, image_size: int = 32) -> np.ndarray:
    """Draw a scene: uint8 [image_size, image_size, 3]."""
    half = image_size // 2
    pixels = np.empty((image_size, image_size, 3), np.uint8)
    pixels[:] = GROUND
    for size, colour, form, place in scene:
        row, col = divmod(PLACES.index(place), 2)
        pixels[row * half : (row + 1) * half, col * half : (col + 1) * half] = tile(form, colour, size, half)
    return pixels


@functools.lru_cache(maxsize=1024)
def tile(form: str, colour: str, size: str, side: int) -> np.ndarray:
    """One quarter of an image, a thing in its middle: uint8 [side, side, 3], not to be written to."""
    share = coverage(form, size, side)[..., None]
    pixels = np.rint(np.array(GROUND) + share * (np.array(COLOURS[colour]) - GROUND)).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


@functools.lru_cache(maxsize=256)
def coverage(form: str, size: str, side: int, samples: int = 16) -> np.ndarray:
    """Share of each pixel that the form covers, float64 [side, side], from samples^2 points per pixel."""
    half = max(round(side * (0.42 if size == "large" else 0.22)), 2)  # whole pixels: straight edges stay crisp
    centre = side // 2
    points = (np.arange(side * samples) + 0.5) / samples - centre
    x, y = points[None, :] / half, points[:, None] / half
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= max(round(0.88 * half), 2) / half,
        "triangle": (abs(y) <= 1) & (abs(x) <= (y + 1) / 2),
        "cross": (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= max(round(half / 3), 1) / half),
    }[form]
    return inside.reshape(side, samples, side, samples).mean((1, 3))


# Language.


def describe(thing: Thing, scene: Scene) -> str:
    """The shortest words that mean this thing and no other of the scene."""
    size, colour, form, place = thing
    for words in ((form,), (colour, form), (size, form), (size, colour, form)):
        if sum(set(words) <= set(other) for other in scene) == 1:
            return f"the {' '.join(words)}"
    return f"the {form} at the {place}"


def ask(scene: Scene, draws: "Draws") -> tuple[str, str]:
    """A question with exactly one right answer, and the answer."""
    thing = draws.choice(scene)
    kind = draws.choice(("what", "colour", "size", "where", "how many", "is there"))
    if kind == "what":
        place = draws.choice(PLACES)
        here = [f"a {other}" for other in scene if other.place == place]
        return f"what is at the {place}?", here[0] if here else "nothing"
    if kind == "how many":
        what = draws.choice(("", *COLOURS, *FORMS))
        count = sum(not what or what in other for other in scene)
        noun = f"{what}s" if what in FORMS else f"{what} shapes".strip()
        if what == "cross":
            noun = "crosses"
        return f"how many {noun} are there?", NUMBERS[count]
    if kind == "is there":
        colour, form = thing.colour, thing.form
        if draws.below(2):  # half of the questions are about something that need not be there
            colour, form = draws.choice(tuple(COLOURS)), draws.choice(FORMS)
        there = any((other.colour, other.form) == (colour, form) for other in scene)
        return f"is there a {colour} {form}?", "yes" if there else "no"
    # The words that identify the thing must not give away the answer.
    by_form = sum(other.form == thing.form for other in scene) == 1
    by_words = f"the {thing.form}" if by_form else f"the shape at the {thing.place}"
    if kind == "where":
        words = describe(thing, scene)
        return (f"where is {words}?", thing.place) if thing.place not in words else ask(scene, draws)
    if kind == "colour":
        return f"what colour is {by_words}?", thing.colour
    return f"is {by_words} large or small?", thing.size


def edit(scene: Scene, draws: "Draws", max_objects: int) -> tuple[str, Scene]:
    """An instruction that changes exactly one thing, and the scene it leads to."""
    thing = draws.choice(scene)
    words = describe(thing, scene)
    rest = tuple(other for other in scene if other is not thing)
    free = [place for place in PLACES if all(place != other.place for other in scene)]
    kinds = ["colour", "form", "size", "move"] + ["remove"] * (len(scene) > 1) + ["add"] * (len(scene) < max_objects)
    kind = draws.choice(kinds)
    if kind == "remove":
        return f"remove {words}", rest
    if kind == "add":
        added = Thing(draws.choice(SIZES), draws.choice(tuple(COLOURS)), draws.choice(FORMS), draws.choice(free))
        return f"add a {added} at the {added.place}", as_scene((*scene, added))
    if kind == "move":
        changed = thing._replace(place=draws.choice(free))
        instruction = f"move {words} to the {changed.place}"
    elif kind == "colour":
        changed = thing._replace(colour=draws.choice([colour for colour in COLOURS if colour != thing.colour]))
        instruction = f"make {words} {changed.colour}"
    elif kind == "size":
        changed = thing._replace(size=SIZES[1 - SIZES.index(thing.size)])
        instruction = f"make {words} {changed.size}"
    else:
        changed = thing._replace(form=draws.choice([form for form in FORMS if form != thing.form]))
        instruction = f"turn {words} into a {changed.form}"
    return instruction, as_scene((*rest, changed))


# Documents.


class Draws:
    """Random choices for one document: a stream of bits that depends on (seed, index) only."""

    def __init__(self, seed: int, index: int):
        self._generator = np.random.Philox(key=np.array([seed % 2**64, index], np.uint64))
        self._bits: list[int] = []

    def bits(self) -> int:
        if not self._bits:
            self._bits = self._generator.random_raw(64).tolist()
        return self._bits.pop()

    def below(self, stop: int) -> int:
        return self.bits() % stop

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.bits() % len(options)]

    def weighted(self, options: Sequence[tuple[str, float]]) -> str:
        """One of the names, by weight; the weights sum to 1."""
        point = self.bits() / 2**64
        for name, weight in options:
            point -= weight
            if point < 0:
                return name
        return max(options, key=lambda option: option[1])[0]


def checked_mix(
    mix: Sequence[tuple[str, float]], default: Sequence[tuple[str, float]], generator: str
) -> tuple[tuple[str, float], ...]:
    """The weights of the document kinds, summing to 1; an empty mix means the default.

    Raises:
      ConfigError: an unknown kind (with a suggestion) or weights that are not positive.
    """
    kinds = [kind for kind, _ in default]
    for kind, weight in mix:
        if kind not in kinds:
            hint = suggest(str(kind), kinds) or f"; choose from {', '.join(kinds)}."
            raise ConfigError(f"data.generator: {generator} has no documents of kind {kind!r}{hint}")
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"data.generator: the weight {weight} of {kind!r} must not be negative.")
    mix = tuple(mix) or tuple(default)
    total = sum(weight for _, weight in mix)
    if total <= 0:
        raise ConfigError("data.generator: at least one kind needs a weight above 0.")
    return tuple((kind, weight / total) for kind, weight in mix)


def check_split(split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        hint = suggest(split, list(splits)) or f"; choose from {', '.join(splits)}."
        raise ConfigError(f"data.split: a generator has no split {split!r}{hint}")


class Shapes:
    """`size` documents; document i is a function of (seed, i) and of the arguments."""

    def __init__(
        self,
        seed: int = 0,
        size: int = 20000,
        image_size: int = 32,
        max_objects: int = 3,
        mix: Sequence[tuple[str, float]] = (),
        split: str = "train",
    ):
        if image_size % 8 or not 24 <= image_size <= 128:
            raise ConfigError(f"data.generator_image_size={image_size}: shapes needs a multiple of 8 from 24 to 128.")
        if not 1 <= max_objects <= 3:
            raise ConfigError(f"data.max_objects={max_objects} must be 1, 2 or 3.")
        check_split(split, SPLITS)
        self.seed, self.size, self.image_size, self.max_objects, self.split = seed, size, image_size, max_objects, split
        self.mix = checked_mix(mix, DEFAULT_MIX, "shapes")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self.size:
            raise IndexError(f"document {index} of {self.size}")
        draws = Draws(self.seed, index)
        kind = draws.weighted(self.mix)
        scene = self._scene(draws)
        extra: dict[str, Any] = {"kind": kind, "scene": scene}
        segments: list[Segment]
        if kind == "draw":
            segments = [Text(caption(scene)), self._image(scene)]
        elif kind == "caption":
            segments = [self._image(scene, learn=False), Text(caption(scene))]
        elif kind == "question":
            question, answer = ask(scene, draws)
            extra |= {"question": question, "answer": answer}
            segments = [self._image(scene, learn=False), Text(question, learn=False), Text(f" {answer}")]
        else:
            scene, instruction, target = self._edit(scene, draws)
            extra |= {"scene": scene, "instruction": instruction, "target": target}
            if kind == "edit":
                segments = [self._image(scene, False), Text(instruction, learn=False), self._image(target)]
            else:
                segments = [
                    Text(f"first, {caption(scene)}"),
                    self._image(scene),
                    Text(f"then {instruction}"),
                    self._image(target),
                    Text(f"now, {caption(target)}"),
                ]
        return Document(*segments, split=self.split, extra=extra)

    def texts(self, limit: int = 5000) -> Iterator[str]:
        """Texts of the first documents, to train a vocabulary on."""
        for index in range(min(limit, self.size)):
            yield from self[index].texts

    def _image(self, scene: Scene, learn: bool = True) -> Image:
        return Image(render(scene, self.image_size), learn)

    def _in_split(self, scene: Scene) -> bool:
        return held_out(caption(scene)) == (self.split == "test")

    def _scene(self, draws: Draws) -> Scene:
        colours = tuple(COLOURS)
        while True:
            free = list(PLACES)
            things = []
            for _ in range(1 + draws.below(self.max_objects)):
                place = free.pop(draws.below(len(free)))
                things.append(Thing(draws.choice(SIZES), draws.choice(colours), draws.choice(FORMS), place))
            scene = as_scene(things)
            if self._in_split(scene):
                return scene

    def _edit(self, scene: Scene, draws: Draws) -> tuple[Scene, str, Scene]:
        """A scene, an instruction and its result, both scenes in the split."""
        while True:
            for _ in range(30):
                instruction, target = edit(scene, draws, self.max_objects)
                if self._in_split(target):
                    return scene, instruction, target
            scene = self._scene(draws)
