"""Step-indexed batches: the batch is a function of (seed, step) only.

An epoch is a packing plan over all documents; its random choices (dropped texts, trailing clean copies, order) come from
(seed, epoch), so the plan of any step can be rebuilt from nothing. A checkpoint therefore stores the step and a
fingerprint of the data, no iterator state, and any number of processes or workers reads identical batches.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from mmdiff import config
from mmdiff.data.packing import pack_plan, waste
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError, Document, Image
from mmdiff.layout import (
    ImagePiece,
    Piece,
    Rows,
    TextPiece,
    drop_text,
    laid_length,
    lay_out,
    pack,
    plan_images,
    stack,
)
from mmdiff.layout import text_pieces as cut_document

CACHE_BYTES = 2**30  # tokenised and cut documents kept in memory


class Source(Protocol):
    """A finite, random-access set of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def outline(self, index: int) -> Document | list:
        """The document without its pixels: Text, or (height, width, learn) for an image."""
        ...


class Choice(NamedTuple):
    """The random choices of one document in one epoch."""

    drop: bool
    trailing: bool
    swap: bool
    flip: bool


class Batches:
    """Packed rows of a source, by step."""

    def __init__(self, source: Source, vocabulary: Vocabulary, cfg: config.Config, *, learn: bool = True):
        """`learn=False` is for validation: no text is dropped and nothing is flipped or swapped."""
        if len(source) == 0:
            raise DataError("the data set holds no document.")
        self.source, self.vocabulary, self.cfg = source, vocabulary, cfg
        layout = cfg.layout
        self.rates = (
            (layout.text_drop, layout.trailing_context, 0.5 * (cfg.data.order == "both"), 0.5 * cfg.data.flip)
            if learn
            else (0.0, layout.trailing_context, 0.5 * (cfg.data.order == "both"), 0.0)
        )
        self.outlines = [self._outline(i) for i in range(len(source))]
        self._lengths: dict[tuple, np.ndarray] = {}
        self._plans: dict[int, tuple[list[list[int]], np.ndarray]] = {}
        self._ends: list[int] = []  # global number of the first row after each epoch planned so far
        self._cache: dict[int, list[Piece]] = {}
        self._cached_bytes = 0
        self._check_lengths()

    @property
    def fingerprint(self) -> str:
        """Identifies documents (by outline and sampled pixels), vocabulary and everything the batches depend on."""
        digest = hashlib.sha256(f"{self.vocabulary.fingerprint} {self.cfg.layout} {self.cfg.data}".encode())
        for outline in self.outlines:
            digest.update(repr([(len(p.tokens), *p.tokens[:8]) if isinstance(p, TextPiece) else p[1:] for p in outline]).encode())
        for index in np.linspace(0, len(self.source) - 1, num=min(16, len(self.source)), dtype=int):
            for piece in self.pieces(int(index)):
                digest.update((piece.patches if isinstance(piece, ImagePiece) else piece.tokens).tobytes())
        return digest.hexdigest()[:16]

    def waste(self) -> float:
        """Fraction of padding in the first epoch."""
        plan, choices = self._plan(0)
        return waste(self._choice_lengths(choices), plan, self.cfg.layout.row_length)

    def rows_per_epoch(self) -> int:
        return len(self._plan(0)[0])

    def row(self, number: int) -> Rows:
        """The global row `number`, epochs laid end to end."""
        epoch = 0
        while epoch >= len(self._ends) or number >= self._ends[epoch]:
            if epoch >= len(self._ends):
                self._ends.append((self._ends[-1] if self._ends else 0) + len(self._plan(epoch)[0]))
            else:
                epoch += 1
        plan, choices = self._plan(epoch)
        members = plan[number - (self._ends[epoch - 1] if epoch else 0)]
        return pack([self.laid(i, Choice(*choices[i])) for i in members], self.cfg.layout.row_length)

    def batch(self, step: int) -> Rows:
        """Rows [batch_size, row_length] of one optimiser step."""
        size = self.cfg.training.batch_size
        return stack([self.row(step * size + i) for i in range(size)])

    def iterate(self, start: int, stop: int) -> Iterator[Rows]:
        """Batches of the steps [start, stop), prepared ahead by grain's reading threads."""
        import grain

        dataset = grain.MapDataset.source(_Steps(self, stop))
        iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        grain.experimental.set_next_index(iterator, start)
        for _ in range(start, stop):
            yield next(iterator)

    def laid(self, index: int, choice: Choice) -> Rows:
        """One document, laid out under its choices."""
        pieces = _swapped(self.pieces(index)) if choice.swap else self.pieces(index)
        if choice.flip:
            pieces = [_flipped(p) if isinstance(p, ImagePiece) else p for p in pieces]
        if choice.drop:
            pieces = drop_text(pieces)
        plans = plan_images(pieces, self.cfg.layout, choice.trailing)
        model = self.cfg.model
        return lay_out(
            pieces,
            plans,
            self.vocabulary,
            self.cfg.layout,
            patch_values=3 * model.patch**2,
            positions=model.positions,
            dropped=choice.drop,
        )[0]

    def pieces(self, index: int) -> list[Piece]:
        """Document `index`, tokenised and cut; kept in memory while there is room."""
        if index in self._cache:
            return self._cache[index]
        pieces = cut_document(self.source[index], self.vocabulary, self.cfg.model.patch)
        size = sum((p.patches if isinstance(p, ImagePiece) else p.tokens).nbytes for p in pieces)
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cached_bytes += size
            self._cache[index] = pieces
        return pieces

    def _outline(self, index: int) -> list[Piece]:
        patch, pieces = self.cfg.model.patch, []
        for segment in self.source.outline(index):
            if isinstance(segment, Image):
                segment = (segment.height, segment.width, segment.learn)
            if isinstance(segment, tuple):
                height, width, learn = segment
                config.check_image_size(height, width, patch, f"document {index}")
                self.vocabulary.rows(height // patch), self.vocabulary.cols(width // patch)
                pieces.append(ImagePiece(None, height // patch, width // patch, learn))
            else:
                pieces.append(TextPiece(np.asarray(self.vocabulary.encode(segment.text), np.int32), segment.learn))
        return pieces

    def _variant_lengths(self, drop: bool, trailing: bool, swap: bool) -> np.ndarray:
        key = (bool(drop), bool(trailing), bool(swap))
        if key not in self._lengths:
            lengths = []
            for pieces in self.outlines:
                pieces = _swapped(pieces) if swap else pieces
                pieces = drop_text(pieces) if drop else pieces
                lengths.append(laid_length(pieces, plan_images(pieces, self.cfg.layout, trailing), self.cfg.layout))
            self._lengths[key] = np.asarray(lengths)
        return self._lengths[key]

    def _choice_lengths(self, choices: np.ndarray) -> np.ndarray:
        lengths = np.zeros(len(self.outlines), int)
        for key in np.unique(choices[:, :3], axis=0):
            chosen = (choices[:, :3] == key).all(axis=1)
            lengths[chosen] = self._variant_lengths(*key)[chosen]
        return lengths

    def _check_lengths(self) -> None:
        swaps = [False, True] if self.rates[2] else [False]
        longest = np.max([self._variant_lengths(False, self.rates[1] > 0, s) for s in swaps], axis=0)
        worst = int(longest.argmax())
        if longest[worst] > self.cfg.layout.row_length:
            raise DataError(
                f"document {worst} needs {longest[worst]} positions but layout.row_length="
                f"{self.cfg.layout.row_length}: raise layout.row_length to {longest[worst]} or shrink its images "
                f"(data.image_size). {(longest > self.cfg.layout.row_length).sum()} documents are too long."
            )

    def _plan(self, epoch: int) -> tuple[list[list[int]], np.ndarray]:
        if epoch not in self._plans:
            rng = np.random.default_rng([self.cfg.training.seed, epoch])
            choices = rng.random((len(self.outlines), 4)) < np.asarray(self.rates)
            plan = pack_plan(self._choice_lengths(choices), self.cfg.layout.row_length, rng)
            while len(self._plans) > 2:  # reading threads straddle at most two epochs
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = plan, choices
        return self._plans[epoch]


class _Steps:
    """grain's view: element i is the batch of step i."""

    def __init__(self, batches: Batches, steps: int):
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Rows:
        return self.batches.batch(step)


def _swapped(pieces: Sequence[Piece]) -> list[Piece]:
    """A document of one text and one image in the other order; the image that comes first is only read."""
    if len(pieces) != 2 or isinstance(pieces[0], ImagePiece) == isinstance(pieces[1], ImagePiece):
        return list(pieces)
    image, text = sorted(pieces, key=lambda p: isinstance(p, TextPiece))
    if isinstance(pieces[0], TextPiece):
        return [image._replace(learn=False), text]
    return [text, image]


def _flipped(piece: ImagePiece) -> ImagePiece:
    from mmdiff.layout import patchify, unpatchify

    pixels = unpatchify(piece.patches, piece.grid_rows, piece.grid_cols)
    return piece._replace(patches=patchify(pixels[:, ::-1], pixels.shape[0] // piece.grid_rows))


def device_count_check(batch_size: int) -> None:
    """Raise ConfigError unless the batch divides over the devices."""
    devices = jax.device_count()
    if batch_size % devices:
        raise config.ConfigError(f"training.batch_size={batch_size} is not divisible by the {devices} devices.")
