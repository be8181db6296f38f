"""Images restored by a frozen language model that reads their tokens as a foreign language, in context.

    inpainting    the middle quarter of the grid is missing: what are the next m tokens behind the n before them?
    outpainting   its lower half is missing: the same
    deblurring    the image is blurred,
    shift         moved by a quarter of its side to the top left, its lower and right edges repeated,
    rotation      turned by a right angle: which m tokens of the image belong to these m of the changed one?

m tokens are written at a time, greedily, and stand before the next ones. A prompt holds ten examples for the same places, each
of tokens a share of which is replaced by random ones: 0.50, 0.47 ... 0.23 (`RATES`). Whose tokens, is the protocol:

    faithful   the image's own clean ones, as published: the examples contain the answer (vote.py)
    no leak    those of ten other images

Source: Zhu et al., arXiv 2403.07874, and the code published with it (n = 16, m = 2 on a grid of 16 x 16). As there, the same
random tokens replace those of the clean and of the changed image, and the share is one of all codes, global ones included, but
taken from the local ones. Ours: how far an image is shifted and blurred.

Tokens are local ones, ids of the language model. Letters: b images, l tokens of an image, x examples.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from mmdiff.config import require
from mmdiff.in_context import prompts
from mmdiff.in_context.language import Language
from mmdiff.in_context.prompts import Pair
from mmdiff.in_context.vote import plurality

Task = Literal["inpainting", "outpainting", "deblurring", "shift", "rotation"]
TASKS: tuple[Task, ...] = get_args(Task)
RATES = tuple(round(0.5 - 0.03 * i, 2) for i in range(10))
BEFORE, WRITTEN = 16, 2  # n and m
BLUR = (1, 4, 6, 4, 1)  # weights along each axis, twice


def changed(task: Task, images: np.ndarray) -> np.ndarray:
    """What the task is given of images uint8 [b, h, w, 3]; of missing tokens the image itself."""
    if task == "rotation":
        require(images.shape[1] == images.shape[2], f"rotation needs square images, not {images.shape[1:3]}.")
        return np.ascontiguousarray(np.rot90(images, axes=(1, 2)))
    if task == "shift":
        down, right = (side // 4 for side in images.shape[1:3])
        return np.pad(images, ((0, 0), (0, down), (0, right), (0, 0)), mode="edge")[:, down:, right:]
    if task == "deblurring":
        x = images.astype(np.float64)
        for axis in (1, 2, 1, 2):
            x = _smooth(x, axis)
        return np.rint(x).astype(np.uint8)
    return images


def _smooth(x: np.ndarray, axis: int) -> np.ndarray:
    """Along one axis, edges repeated."""
    reach = len(BLUR) // 2
    padded = np.pad(x, [(reach, reach) if i == axis else (0, 0) for i in range(x.ndim)], mode="edge")
    parts = [w * np.take(padded, np.arange(i, i + x.shape[axis]), axis) for i, w in enumerate(BLUR)]
    return np.sum(parts, axis=0) / sum(BLUR)


def missing(task: Task, grid: tuple[int, int]) -> np.ndarray:
    """Which tokens are to be written: bool [l]."""
    rows, cols = grid
    wanted = np.ones(grid, bool)
    if task == "inpainting":
        wanted[:] = False
        wanted[rows // 4 : rows - rows // 4, cols // 4 : cols - cols // 4] = True
    elif task == "outpainting":
        wanted[: rows // 2] = False
    return wanted.reshape(-1)


class Examples(NamedTuple):
    given: np.ndarray  # int [x, l], changed like the image in question
    wanted: np.ndarray  # int [x, l]


def corrupted(
    clean: np.ndarray,
    changed: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    others: int = 0,
    rates: Sequence[float] = RATES,
) -> Examples:
    """Examples made of one image's tokens [l] for each rate, or of those of as many images [x, l].

    Args:
      changed: tokens of the changed images, of the same shape.
      size: random tokens lie below it.
      others: global tokens of an image, of which a rate also counts its share.
    """
    given, wanted = (np.array(np.broadcast_to(a, (len(rates), a.shape[-1])), np.int32) for a in (changed, clean))
    for row, rate in enumerate(rates):
        count = min(int(rate * (clean.shape[-1] + others)), clean.shape[-1])
        places, tokens = rng.permutation(clean.shape[-1])[:count], rng.integers(0, size, count)
        given[row, places] = wanted[row, places] = tokens
    return Examples(given, wanted)


def restored(
    language: Language,
    task: Task,
    given: np.ndarray,
    grid: tuple[int, int],
    examples: Sequence[Examples],
    *,
    before: int = BEFORE,
    written: int = WRITTEN,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> np.ndarray:
    """Tokens int32 [b, l] that the language model writes for images of which it is given tokens [b, l].

    What is missing of `given` is never read. examples: for each image. before, written: n and m.
    """
    wanted, result = missing(task, grid), np.array(given, np.int32)
    behind = task in ("inpainting", "outpainting")
    starts, place = [], 0
    while place < len(wanted):
        starts += [place] if wanted[place] else []
        place += written if wanted[place] else 1
    if behind:
        result[:, wanted] = 0

    def prompt(image: int, start: int) -> list[int]:
        end = min(start + written, len(wanted))
        read = slice(max(0, start - before), start) if behind else slice(start, end)
        source = result if behind else given
        pairs = [Pair(a[read].tolist(), b[start:end].tolist()) for a, b in zip(*examples[image], strict=True)]
        return prompts.restoration(language, pairs, source[image, read].tolist(), written)

    def write(images: Sequence[int], at: Sequence[int]) -> None:
        answers = language.greedy([prompt(i, s) for i, s in zip(images, at, strict=True)], written)
        for image, start, tokens in zip(images, at, answers, strict=True):
            end = min(start + written, len(wanted))
            inside = wanted[start:end]
            result[image, start:end][inside] = tokens[: end - start][inside]

    every = range(len(given))
    if behind:  # one after the other: what is written is read next
        for number, start in enumerate(starts):
            write(every, [start] * len(given))
            progress(number + 1, len(starts))
    else:
        write([i for i in every for _ in starts], [s for _ in every for s in starts])
    return result


def accuracy(task: Task, grid: tuple[int, int], found: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Share of the tokens to be written that are right, of each image [b]."""
    wanted = missing(task, grid)
    return (found == clean)[:, wanted].mean(-1)


def voted(task: Task, given: np.ndarray, grid: tuple[int, int], examples: Sequence[Examples], size: int) -> np.ndarray:
    """As `restored`, by plurality among the examples, without a model."""
    votes = np.stack([plurality(each.wanted, size) for each in examples])
    return np.where(missing(task, grid), votes, given).astype(np.int32)
