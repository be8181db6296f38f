"""The probes generator: every answer is read back from the pixels by other means; pure, split without leaks, complete."""

import json
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage, stats

from mmdiff.config import Config, ConfigError, Data
from mmdiff.data import probe_pictures, probes, shapes
from mmdiff.data.probe_pictures import clock, dots, glyph_grid, number, read_glyphs, swatch
from mmdiff.data.probes import GLYPH_BITS, GLYPH_CELL, KINDS, QUESTIONS, Probes
from mmdiff.data.shapes import Draws
from mmdiff.data.sources import open_source
from mmdiff.data.words import GLYPHS
from mmdiff.document import DataError, Image, Text

TIMES = [(hour, minute) for hour in range(1, 13) for minute in range(0, 60, 5)]


def documents(kind: str, count: int, side: int = 64, split: str = "train", seed: int = 0):
    made = Probes(seed, count, side, ((kind, 1.0),), split)
    return [made[i] for i in range(count)]


def asked(kind: str, count: int, split: str) -> list[probes.Probe]:
    """Probes without their pictures: many in little time."""
    made = Probes(0, count, 64, ((kind, 1.0),), split)
    return [made._probe(kind, Draws(5, i)) for i in range(count)]


# Readers that share nothing with the drawing but the font.


def ground_of(pixels: np.ndarray) -> np.ndarray:
    values, counts = np.unique(pixels @ (65536, 256, 1), return_counts=True)
    return np.array(values[counts.argmax()] // (65536, 256, 1) % 256)


def ink_of(pixels: np.ndarray) -> np.ndarray:
    """Where a picture is not of its commonest colour."""
    return (pixels != ground_of(pixels)).any(-1)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is true."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], cols[0], rows[-1] - rows[0] + 1, cols[-1] - cols[0] + 1


def read_number(pixels: np.ndarray) -> tuple[str, int]:
    """The digits and the pixels per dot."""
    ink = ink_of(pixels)
    top, left, height, width = box_of(ink)
    dot = height // 7
    assert (height, width) == (7 * dot, 11 * dot)
    rows = ink[top : top + height, left : left + width].reshape(7, dot, 11, dot).all((1, 3))
    digits = {GLYPHS[digit].tobytes(): digit for digit in "0123456789"}
    return "".join(digits[rows[:, 6 * i : 6 * i + 5].tobytes()] for i in range(2)), dot


def read_count(pixels: np.ndarray) -> int:
    """Components, corners touching; they are all of one form."""
    labels, count = ndimage.label(ink_of(pixels), np.ones((3, 3)))
    forms = {(labels[part] == i + 1).tobytes() for i, part in enumerate(ndimage.find_objects(labels))}
    assert len(forms) == 1
    return count


def read_colour(pixels: np.ndarray) -> str:
    ground = pixels[0, 0]
    inside = (pixels != ground).any(-1)
    _, _, height, width = box_of(inside)
    assert inside.sum() == height * width >= inside.size / 4  # a full rectangle
    assert not inside[[0, -1]].any() and not inside[:, [0, -1]].any()
    colour = np.median(pixels[inside], axis=0).astype(int)
    assert abs(colour - ground).max() >= probes.DIFFERENCE
    return "".join(f"{level:02x}" for level in colour)


def read_time(pixels: np.ndarray) -> str:
    """The minute hand is what reaches two thirds of the radius, the hour hand the one that is thick."""
    away = np.linalg.norm(pixels.astype(float) - ground_of(pixels), axis=-1)
    share = away / away.max()
    top, left, height, width = box_of(share > 0.5)
    centre, radius = np.array([top + (height - 1) / 2, left + (width - 1) / 2]), height / 2
    assert abs(height - width) <= 1

    def inked(turn: float, reach: np.ndarray, aside: float) -> np.ndarray:
        out, side = (np.array([-np.cos(a), np.sin(a)]) for a in (2 * np.pi * turn, 2 * np.pi * turn + np.pi / 2))
        places = centre[:, None] + radius * (out[:, None] * reach + side[:, None] * aside)
        return ndimage.map_coordinates(share, places, order=1)

    minute = 5 * max(range(12), key=lambda m: inked(m / 12, np.linspace(0.64, 0.7, 5), 0).mean())
    hours = [(h + minute / 60) / 12 for h in range(12)]
    thick = [min(inked(turn, np.linspace(0.3, 0.45, 7), aside).min() for aside in (-0.055, 0, 0.055)) for turn in hours]
    return f"{int(np.argmax(thick)) or 12}:{minute:02}"


def read_odd(pixels: np.ndarray) -> str:
    ((row, col),) = np.argwhere(ink_of(pixels))
    assert abs(pixels[row, col].astype(int) - ground_of(pixels)).max() >= probes.DIFFERENCE
    return f"{row} {col}"


def differing_cells(first: np.ndarray, second: np.ndarray) -> set[tuple[int, int]]:
    cell = len(first) // 8
    return {(row // cell, col // cell) for row, col in np.argwhere((first != second).any(-1)).tolist()}


def read_spot(first: np.ndarray, second: np.ndarray) -> str:
    ((row, col),) = differing_cells(first, second)
    return f"{row} {col}"


def read_same(first: np.ndarray, second: np.ndarray) -> str:
    assert len(differing_cells(first, second)) <= 1
    return "same" if (first == second).all() else "different"


READERS = {
    "ocr": lambda pixels: read_number(pixels)[0],
    "count": lambda pixels: str(read_count(pixels)),
    "colour": read_colour,
    "clock": read_time,
    "odd": read_odd,
    "spot": read_spot,
    "same": read_same,
}


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_are_read_from_the_pixels(kind, side):
    for split in probes.SPLITS:
        made = documents(kind, 60, side, split)
        read = [READERS[kind](*(image.pixels for image in d.images)) for d in made]
        assert read == [d.extra["answer"] for d in made]
        assert len(set(read)) >= (2 if kind == "same" else 20)  # the answers vary: a reader of nothing would fail


def test_the_size_of_digits_is_known():
    for side in (64, 128):
        made = documents("ocr", 50, side)
        assert [read_number(d.images[0].pixels)[1] for d in made] == [d.extra["size"] * side // 64 for d in made]
        assert {d.extra["size"] for d in made} == set(probes.SIZES)


@pytest.mark.parametrize("radius, side", [(20, 64), (25, 64), (30, 64), (60, 128)])
def test_every_time_is_read_from_its_clock(radius, side):
    drawn = [clock(*time, (radius + 2, radius + 1), radius, (9, 9, 60), (250, 240, 230), side) for time in TIMES]
    assert [read_time(pixels) for pixels in drawn] == [f"{hour}:{minute:02}" for hour, minute in TIMES]
    assert len({pixels.tobytes() for pixels in drawn}) == 144
    assert read_time(drawn[0][:, ::-1]) == "11:00"  # 1:00 in a mirror


def test_the_readers_see_mistakes():
    black, white = (0, 0, 0), (255, 255, 255)
    assert read_number(number("47", (3, 5), 2, white, black, 64)) == ("47", 2)
    assert read_count(dots([(5, 5), (5, 10)], 4, white, black, 64)) == 2
    assert read_count(dots([(5, 5), (8, 8)], 3, white, black, 64)) == 1  # their corners touch
    assert read_odd(swatch((12, 40, 1, 1), white, black, 64)) == "12 40"
    with pytest.raises(AssertionError):
        read_colour(swatch((8, 8, 31, 32), white, black, 64))
    with pytest.raises(ValueError):
        read_odd(swatch((12, 40, 1, 2), white, black, 64))


@pytest.mark.parametrize("kind", ["ocr", "count", "clock", "spot"])
def test_ink_stands_out(kind):
    for document in documents(kind, 60):
        pixels = document.images[0].pixels.astype(float) @ (0.299, 0.587, 0.114)
        assert np.ptp(pixels) >= probes.CONTRAST - 1e-6


# Glyph grids.


@pytest.mark.parametrize("bits", range(1, 17))
def test_glyphs_are_read_back(bits):
    rng = np.random.default_rng(bits)
    for rows, cols, cell in ((8, 8, 8), (3, 5, 4), (2, 4, 16)):
        symbols = rng.integers(0, 2**bits, (rows, cols))
        pixels = glyph_grid(symbols, bits, cell)
        assert pixels.shape == (rows * cell, cols * cell, 3) and pixels.dtype == np.uint8
        assert (read_glyphs(pixels, bits, cell) == symbols).all()
        noisy = np.clip(pixels + rng.normal(0, 25, pixels.shape), 0, 255)
        assert (read_glyphs(noisy, bits, cell) == symbols).all()
        assert (read_glyphs(noisy.astype(np.uint8), bits, cell) == symbols).all()
        assert (read_glyphs(255 - pixels, bits, cell) == 2**bits - 1 - symbols).all()  # the pixels are what is read
        assert (pixels == probe_pictures.GREY).mean() == pytest.approx(1 - bits / 16)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_symbol_has_its_own_picture(bits):
    symbols = np.arange(2**bits)
    cells = {glyph_grid(symbol.reshape(1, 1), bits, 4).tobytes() for symbol in symbols}
    assert len(cells) == 2**bits
    assert set(np.unique(glyph_grid(symbols[None], bits, 4))) == {0, probe_pictures.GREY, 255}


@pytest.mark.parametrize("split", probes.SPLITS)
def test_glyphs_carry_all_their_bits(split):
    made = documents("glyphs", 200, 64, split)
    symbols = np.stack([read_glyphs(d.images[0].pixels, GLYPH_BITS, GLYPH_CELL) for d in made])
    assert symbols.tolist() == [d.extra["symbols"] for d in made] and symbols.shape == (200, 8, 8)
    assert uniform(symbols)
    assert not uniform(symbols & symbols[:, ::-1])  # bits that are set one time in four
    bits = (symbols[..., None] >> np.arange(GLYPH_BITS) & 1).reshape(200, -1)
    together = np.corrcoef(bits.T)[np.triu_indices(bits.shape[1], 1)]
    assert abs(together).max() < 6 / np.sqrt(200) and together.std() == pytest.approx(1 / np.sqrt(200), rel=0.05)


def uniform(symbols: np.ndarray) -> bool:
    return stats.chisquare(np.bincount(symbols.reshape(-1), minlength=2**GLYPH_BITS)).pvalue > 1e-3


def test_glyphs_of_the_splits_differ():
    train, test = ({d.images[0].pixels.tobytes() for d in documents("glyphs", 50, 64, split)} for split in probes.SPLITS)
    assert len(train) == len(test) == 50 and train.isdisjoint(test)


# Documents.


def test_documents_are_a_function_of_seed_and_index():
    mix = tuple((kind, 1.0) for kind in KINDS)
    first, again = Probes(3, 60, 64, mix), Probes(3, 600, 64, mix)
    order = np.random.default_rng(0).permutation(60).tolist()
    assert all(again[i] == first[i] for i in order)
    assert {first[i].extra["kind"] for i in range(60)} == set(KINDS)
    other = Probes(4, 60, 64, mix)
    assert sum(first[i] == other[i] for i in range(60)) == 0
    with pytest.raises(IndexError):
        first[60]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_the_promised_form(kind):
    for document in documents(kind, 10):
        *pictures, question, answer = document.segments if kind in QUESTIONS else (*document.segments, None, None)
        assert len(pictures) == (2 if kind in ("spot", "same") else 1)
        assert all(isinstance(p, Image) and p.pixels.shape == (64, 64, 3) for p in pictures)
        assert [p.learn for p in pictures] == [kind == "glyphs"] * len(pictures)
        assert document.split == "train" and document.extra["kind"] == kind
        if kind in QUESTIONS:
            assert question == Text(QUESTIONS[kind], learn=False) and answer == Text(f" {document.extra['answer']}")
        assert json.loads(json.dumps(document.extra)) == document.extra


def test_the_default_mix_asks_all_questions():
    made = Probes(0, 400)
    counts = Counter(made[i].extra["kind"] for i in range(400))
    assert set(counts) == set(QUESTIONS) and min(counts.values()) > 30
    assert set(made.texts(200)) > set(QUESTIONS.values())


@pytest.mark.parametrize("kind", QUESTIONS)
def test_contents_of_the_splits_are_disjoint(kind):
    count = 300 if kind == "count" else 1500
    drawn = [asked(kind, count, split) for split in probes.SPLITS]
    train, test = ({probe.content for probe in some} for some in drawn)
    assert kind in ("count", "same") or all(probe.answer in probe.content for some in drawn for probe in some)
    assert train.isdisjoint(test)
    assert all(map(shapes.held_out, test)) and not any(map(shapes.held_out, train))
    assert len(train) > count / 2 and len(test) > 100


def test_pixels_of_the_splits_differ_whatever_the_colours():
    """A split by the document's number would fail: these contents come again and again."""
    odd = [{d.extra["answer"] for d in documents("odd", 2000, 64, split, seed=9)} for split in probes.SPLITS]
    assert odd[0].isdisjoint(odd[1])
    assert all({answer.split()[axis] for answer in odd[0]} == set(map(str, range(64))) for axis in (0, 1))
    changes = [{change(d) for d in documents("spot", 1000, 64, split, seed=9)} for split in probes.SPLITS]
    assert changes[0].isdisjoint(changes[1])


def change(document) -> tuple:
    """Where a picture changes, and the forms there before and after, in no colours."""
    row, col = map(int, document.extra["answer"].split())
    forms = [ink_of(image.pixels)[8 * row : 8 * row + 8, 8 * col : 8 * col + 8].tobytes() for image in document.images]
    return row, col, *forms


ANSWERS = {
    "ocr": {f"{n:02}" for n in range(100)},
    "count": {str(n) for n in range(1, 31)},
    "clock": {f"{hour}:{minute:02}" for hour, minute in TIMES},
    "spot": {f"{row} {col}" for row in range(8) for col in range(8)},
    "same": {"same", "different"},
}


@pytest.mark.parametrize("split", probes.SPLITS)
@pytest.mark.parametrize("kind", ANSWERS)
def test_every_answer_occurs_in_both_splits(kind, split):
    count = 25 * len(ANSWERS[kind])
    answers = Counter(probe.answer for probe in asked(kind, count, split))
    assert set(answers) == ANSWERS[kind]
    assert stats.chisquare(list(answers.values())).pvalue > 1e-4  # and as often as any other


def test_every_number_occurs_in_every_size():
    seen = {(probe.answer, probe.size) for probe in asked("ocr", 10_000, "train")}
    assert seen == {(f"{n:02}", size) for n in range(100) for size in probes.SIZES}


@pytest.mark.parametrize("split", probes.SPLITS)
def test_half_of_the_pairs_are_equal(split):
    share = np.mean([probe.answer == "same" for probe in asked("same", 2000, split)])
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(2000)


# As a source of data.


def test_as_a_source():
    cfg = Config(data=Data(source="probes", size=20, generator_image_size=64))
    train, validation = open_source(cfg, "train"), open_source(cfg, "validation")
    assert len(train) == len(validation) == 20 and validation[0].split == "test"
    for i in range(20):
        segments = [(s.height, s.width, s.learn) if isinstance(s, Image) else s for s in train[i].segments]
        assert train.outline(i) == segments
    assert cfg.fixed_size == (64, 64)
    with pytest.raises(ConfigError, match="generator_image_size=32: probes needs 64 or 128"):
        open_source(Config(data=Data(source="probes")), "train")


def test_mistakes_are_one_line():
    for bad, message in [
        ({"mix": [("glyhps", 1)]}, "did you mean 'glyphs'"),
        ({"mix": [("glyphs", 0)]}, "at least one kind"),
        ({"image_size": 96}, "data.generator_image_size=96: probes needs 64 or 128"),
        ({"image_size": 192}, "probes needs 64 or 128"),
        ({"split": "tets"}, "did you mean 'test'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Probes(0, 10, **bad)
    symbols = np.zeros((2, 2), int)
    for arguments, error, message in [
        ((symbols, 0, 8), ConfigError, "bits=0 must be from 1 to 16"),
        ((symbols, 17, 8), ConfigError, "bits=17 must be"),
        ((symbols, 8, 6), ConfigError, "cell=6 must be a multiple of 4"),
        ((symbols + 256, 8, 8), DataError, "between 0 and 255"),
        ((symbols - 1, 8, 8), DataError, "between 0 and 255"),
        ((symbols[0], 8, 8), DataError, r"\[rows, cols\]"),
    ]:
        with pytest.raises(error, match=message) as refused:
            glyph_grid(*arguments)
        assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="30x32 has no cells of 8x8"):
        read_glyphs(np.zeros((30, 32, 3)), 8, 8)
