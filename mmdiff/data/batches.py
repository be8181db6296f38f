"""Step-indexed batches: the batch is a function of (seed, step) only.

An epoch is a packing plan over all documents; its random choices (dropped texts, trailing clean copies, order) come
from (seed, epoch), so the plan of any step can be rebuilt from nothing. A checkpoint therefore stores the step and a
fingerprint of the data, no iterator state, and any number of processes or workers reads identical batches.
"""

import bisect
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdiff import config
from mmdiff.adapters.slices import Slices
from mmdiff.data.packing import pack_plan, row_count, waste
from mmdiff.data.sources import Source
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError, Text
from mmdiff.layout import (
    ImagePiece,
    Piece,
    Rows,
    TextPiece,
    code_grid,
    drop_text,
    image_grid,
    laid_length,
    lay_out,
    learnt_images,
    pack,
    patchify,
    plan_images,
    stack,
    unpatchify,
)

CACHE_BYTES = 2**30  # patches kept in memory
PLANS = 3  # epochs whose plans are kept: a reader ahead and a reader behind straddle two
READERS = max(1, min(16, (os.cpu_count() or 1) // 4))  # threads; decoding an image holds no lock
SAMPLED = 16  # documents whose pixels enter the fingerprint


class Choice(NamedTuple):
    """The random choices of one document in one epoch."""

    drop: bool
    trailing: bool
    swap: bool
    flip: bool


class Batches:
    """Packed rows of a source, by step. Safe to read from several threads."""

    def __init__(
        self, source: Source, vocabulary: Vocabulary, cfg: config.Config, *, learn: bool = True, tokenizer: Any = None
    ):
        """`learn=False` is for validation: no text is dropped, nothing is flipped, and training.seed makes no difference.
        `tokenizer` (mmdiff/tokenizers/model.py): of the codes that stand for images, with layout.codes.

        Raises:
          ConfigError: an image is not divisible by the patch, too large for the vocabulary, or not of the size that the
            tokenizer takes; names file and line.
          DataError: no documents, or one that does not fit a row.
        """
        if len(source) == 0:
            raise DataError("the data set holds no document.")
        if cfg.front_end.kind != "none":
            tokenizer = Slices(cfg)
        self.source, self.vocabulary, self.cfg, self.tokenizer = source, vocabulary, cfg, tokenizer
        self.levels = tokenizer.levels(cfg.patch_values) if cfg.layout.images == "next_vector" else None  # of codes
        self.seed = cfg.training.seed if learn else 0
        layout, data = cfg.layout, cfg.data
        drop, flip = (layout.text_drop, 0.5 * data.flip) if learn else (0.0, 0.0)
        about_text = (drop, layout.trailing_context, 0.5 * (data.order == "both")) if layout.markers else (0.0, 0.0, 0.0)
        self.rates = (*about_text, flip)  # of each Choice
        self.outlines = [self._outline(i) for i in range(len(source))]
        self._lengths = self._variant_lengths()
        self._ends: list[int] = []  # global number of the first row after each epoch counted so far
        self._plans: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}
        self._cache: dict[int, list[Piece]] = {}
        self._cached_bytes = 0
        self._lock = threading.RLock()
        self._check_lengths()

    @property
    def fingerprint(self) -> str:
        """Identifies what the sequence of rows depends on: texts, image sizes, vocabulary, layout, seed, and the pixels
        of a few documents."""
        cfg = self.cfg
        settings = (cfg.layout, cfg.model.patch, cfg.model.positions, self.seed, self.rates)
        told = f"{self.vocabulary.fingerprint} {settings}"
        for unchanged in ("images='denoised', ", "order='raster', "):  # as before there was a choice
            told = told.replace(unchanged, "")
        digest = hashlib.sha256(told.encode())
        if self.tokenizer is not None:
            digest.update(self.tokenizer.fingerprint.encode())
        for outline in self.outlines:
            for piece in outline:
                if isinstance(piece, TextPiece):
                    digest.update(b"text%d %d " % (len(piece.tokens), piece.learn) + piece.tokens.tobytes())
                else:
                    digest.update(b"image%d %d %d " % piece[1:])
            digest.update(b"end ")
        for index in np.unique(np.linspace(0, len(self.source) - 1, num=SAMPLED, dtype=int)):
            for piece in self.pieces(int(index)):
                if isinstance(piece, ImagePiece) and piece.patches is not None:
                    digest.update(piece.patches.tobytes())
        return digest.hexdigest()[:16]

    def waste(self) -> float:
        """Fraction of padding in the first epoch."""
        lengths = self._epoch_lengths(self._choices(0, self._rng(0)))
        return waste(lengths, self.rows_per_epoch(), self.cfg.layout.row_length)

    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; later ones differ a little, as other texts are dropped."""
        return self._end(0)

    def epoch(self, step: int) -> float:
        """Epochs read before `step`, with its fraction."""
        number, member = self._locate(step * self.cfg.training.batch_size)
        return number + member / (self._end(number) - (self._end(number - 1) if number else 0))

    def row(self, number: int) -> Rows:
        """The global row `number`, epochs laid end to end."""
        epoch, member = self._locate(number)
        plan, choices = self._plan(epoch)
        return pack([self.laid(i, Choice(*choices[i].tolist())) for i in plan[member].tolist()], self.cfg.layout.row_length)

    def batch(self, step: int, members: Sequence[int] | None = None) -> Rows:
        """Rows [batch_size, row_length] of one optimiser step, or only those numbered `members`."""
        size = self.cfg.training.batch_size
        return stack([self.row(step * size + i) for i in (range(size) if members is None else members)])

    def iterate(self, start: int, stop: int, members: Sequence[int] | None = None) -> Iterator[Rows]:
        """Batches of the steps [start, stop), prepared ahead in threads; `members` as of `batch`."""
        import grain

        if start >= stop:
            return
        dataset = grain.MapDataset.source(_Steps(self, stop, members))
        iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=4 * READERS)))
        grain.experimental.set_next_index(iterator, start)
        for _ in range(start, stop):
            yield next(iterator)

    def laid(self, index: int, choice: Choice) -> Rows:
        """One document, laid out under its choices."""
        pieces = _swapped(self.pieces(index)) if choice.swap else self.pieces(index)
        if choice.flip:
            pieces = [self._flipped(p) if isinstance(p, ImagePiece) else p for p in pieces]
        if choice.drop:
            pieces = drop_text(pieces)
        pieces = self._kept(pieces)
        plans = plan_images(pieces, self.cfg.layout, choice.trailing)
        model = self.cfg.model
        rows = lay_out(
            pieces,
            plans,
            self.vocabulary,
            self.cfg.layout,
            patch_values=self.cfg.patch_values,
            positions=model.positions,
            dropped=choice.drop,
        )[0]
        if self.levels is not None:
            rows.patches[rows.is_patch] = self.levels[rows.tokens[rows.is_patch] - self.vocabulary.codes_range[0]]
        return rows

    def pieces(self, index: int) -> list[Piece]:
        """Document `index`, tokenised and cut; kept in memory while there is room."""
        known = self._cache.get(index)
        if known is not None:
            return known
        if any(isinstance(piece, ImagePiece) and piece.patches is None for piece in self.outlines[index]):
            images, patch = iter(self.source[index].images), self.cfg.model.patch
        pieces: list[Piece] = []
        size = 0
        for piece in self.outlines[index]:
            if isinstance(piece, ImagePiece) and piece.patches is None:
                pixels = next(images).pixels
                whole = self.tokenizer.size if self.tokenizer else (piece.grid_rows * patch, piece.grid_cols * patch)
                if pixels.shape[:2] != whole:
                    raise DataError(f"{self.source.where(index)}: an image changed its size after training began.")
                # one image at a time: its codes depend on nothing else, to the bit
                patches = patchify(pixels, patch) if self.tokenizer is None else self.tokenizer.encode([pixels])[0]
                piece = piece._replace(patches=patches)
                size += patches.nbytes
            pieces.append(piece)
        with self._lock:
            if index not in self._cache and self._cached_bytes + size <= CACHE_BYTES:
                self._cached_bytes += size
                self._cache[index] = pieces
        return pieces

    def _outline(self, index: int) -> list[Piece]:
        """Its lengths; where they depend on pixels (a dynamic tokenizer), also its codes, so that no image is coded twice."""
        patch, number = self.cfg.model.patch, 0
        dynamic = self.tokenizer is not None and self.tokenizer.dynamic
        images = self.source[index].images if dynamic else []
        pieces: list[Piece] = []
        for segment in self.source.outline(index):
            if isinstance(segment, Text):
                pieces.append(TextPiece(np.asarray(self.vocabulary.encode(segment.text), np.int32), segment.learn))
                continue
            height, width, learn = segment
            where = self.source.where(index)
            config.check_image_size(height, width, patch, where)
            if self.tokenizer is not None:
                size, what = self.tokenizer.size, "front end" if isinstance(self.tokenizer, Slices) else "tokenizer"
                config.require(
                    (height, width) == size,
                    f"{where}: an image of {height}x{width}, and the {what} takes {size[0]}x{size[1]}: set data.image_size.",
                )
            ids = None
            if dynamic:
                ids, number = self.tokenizer.encode([images[number].pixels])[0], number + 1
            grid = image_grid(height, width, patch, self.tokenizer) if ids is None else code_grid(self.tokenizer, ids)
            try:
                self.vocabulary.rows(grid[0]), self.vocabulary.cols(grid[1])
            except config.ConfigError as error:
                raise config.ConfigError(f"{where}: {error}") from error
            pieces.append(ImagePiece(ids, *grid, learn))
        return pieces

    def _flipped(self, piece: ImagePiece) -> ImagePiece:
        patches = np.asarray(piece.patches)
        if self.tokenizer is not None:
            return piece._replace(patches=self.tokenizer.encode(self.tokenizer.decode(patches[None])[:, :, ::-1])[0])
        pixels = unpatchify(patches, piece.grid_rows, piece.grid_cols)
        return piece._replace(patches=patchify(pixels[:, ::-1], pixels.shape[0] // piece.grid_rows))

    def _kept(self, pieces: Sequence[Piece]) -> list[Piece]:
        if (
            self.cfg.model.network in config.TOKENIZERS and not self.cfg.layout.markers
        ):  # a tokenizer learns from all images, also from those given
            return [p._replace(learn=True) for p in pieces if isinstance(p, ImagePiece)]
        return list(pieces) if self.cfg.layout.markers else learnt_images(pieces)

    # Lengths and plans.

    def _variant_lengths(self) -> np.ndarray:
        """Positions of every document under every choice, int [8, documents]: row 4 drop + 2 trailing + swap."""
        variants: list[np.ndarray | None] = [None] * 8
        layout = self.cfg.layout
        for variant in range(8):
            drop, trailing, swap = bool(variant & 4), bool(variant & 2), bool(variant & 1)
            if any(chosen and not rate for chosen, rate in zip((drop, trailing, swap), self.rates[:3], strict=True)):
                continue
            lengths = []
            for pieces in self.outlines:
                pieces = _swapped(pieces) if swap else pieces
                pieces = self._kept(drop_text(pieces) if drop else pieces)
                lengths.append(laid_length(pieces, plan_images(pieces, layout, trailing), layout))
            variants[variant] = np.asarray(lengths)
        unused = np.zeros(len(self.outlines), int)
        return np.stack([unused if lengths is None else lengths for lengths in variants])

    def _check_lengths(self) -> None:
        longest = self._lengths.max(axis=0)
        worst, length = int(longest.argmax()), self.cfg.layout.row_length
        if not longest.any():
            raise DataError("layout.markers=False learns images alone, and no document holds one that is learnt.")
        if longest[worst] > length:
            raise DataError(
                f"{self.source.where(worst)} needs {longest[worst]} positions but layout.row_length={length}: raise "
                f"layout.row_length to {longest[worst]} or shrink the images (data.image_size; a larger model.patch). "
                f"{(longest > length).sum()} of {len(longest)} documents are too long."
            )

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch])

    def _choices(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """bool [documents, 4], columns as in `Choice`."""
        return rng.random((len(self.outlines), 4)) < np.asarray(self.rates)

    def _epoch_lengths(self, choices: np.ndarray) -> np.ndarray:
        return self._lengths[choices[:, :3] @ np.array([4, 2, 1]), np.arange(len(choices))]

    def _end(self, epoch: int) -> int:
        """Global number of the first row after `epoch`; counting an epoch's rows does not need its plan."""
        with self._lock:
            while len(self._ends) <= epoch:
                number = len(self._ends)
                lengths = self._epoch_lengths(self._choices(number, self._rng(number)))
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + row_count(lengths, self.cfg.layout.row_length))
            return self._ends[epoch]

    def _locate(self, number: int) -> tuple[int, int]:
        """(epoch, row of that epoch) of a global row."""
        with self._lock:
            while not self._ends or self._ends[-1] <= number:
                self._end(len(self._ends))
            epoch = bisect.bisect_right(self._ends, number)
            return epoch, number - (self._ends[epoch - 1] if epoch else 0)

    def _plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        with self._lock:
            if epoch not in self._plans:
                rng = self._rng(epoch)
                choices = self._choices(epoch, rng)
                plan = pack_plan(self._epoch_lengths(choices), self.cfg.layout.row_length, rng)
                while len(self._plans) >= PLANS:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[epoch] = plan, choices
            return self._plans[epoch]


class _Steps:
    """grain's view: element i is the batch of step i."""

    def __init__(self, batches: Batches, steps: int, members: Sequence[int] | None):
        self.batches, self.steps, self.members = batches, steps, members

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Rows:
        return self.batches.batch(step, self.members)


def _swapped(pieces: Sequence[Piece]) -> list[Piece]:
    """A document of one text and one image in the other order; the image that comes first is only read."""
    if len(pieces) != 2 or isinstance(pieces[0], ImagePiece) == isinstance(pieces[1], ImagePiece):
        return list(pieces)
    first, second = pieces
    return [second._replace(learn=False), first] if isinstance(second, ImagePiece) else [second, first]
