"""One group of documents, generated together: the host's side of sampling.

The host keeps one `Draft` per document; the device works in three kinds of calls, each for all documents that are due:

    read   append what the prompt (or a finished clean image) adds to the stream                  cache.extend
    write  text until every document has drawn a size token, ended or spent its budget            text.write_text
    draw   the images that are due, all solver steps in one program                               image.draw

Random numbers come from a document's key, folded with the stream position (text) or the number of the image.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config
from mmdiff.document import IMG, DataError, Document, Image, Segment, Text
from mmdiff.layout import (
    ImagePiece,
    ImagePlan,
    Piece,
    Rows,
    TextPiece,
    drop_text,
    image_grid,
    lay_out,
    patch_cells,
    patch_positions,
    patchify,
    text_pieces,
    unpatchify,
)
from mmdiff.orders import image_order
from mmdiff.parallel.distributed import fetch
from mmdiff.sampling import text
from mmdiff.sampling.cache import CHUNK_BUCKET, SLOT_BUCKET, Cache, capacity, chunks, empty_cache, extend, grow, round_up
from mmdiff.sampling.image import Canvas, Drawing, Guidance, Known, Weak

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model

LENGTH_BUCKET = 16  # of codes, where the model chooses how many: few shapes, few programs
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to sample; the defaults are those of the model's configuration (see Model.options).

    steps: network evaluations (NFE) per image. guidance: scale, 1 is off. autoguidance: the same away from the weaker
    model that was loaded with this one. guidance_interval: noise levels sigma between which either acts.
    guidance_rescale: how much of the contrast that it adds is taken back, 0 to 1. max_tokens: text tokens written per
    document, over all its texts. max_images: images the model may start by itself (those that the prompt asks for come on
    top). image_size: (height, width) in pixels, None lets the model choose. temperature 0 is greedy; top_k, top_p, min_p
    narrow the choice of tokens. seed: an int, or one per document.
    """

    steps: int
    solver: str
    grid: str
    guidance: float
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    max_tokens: int
    max_images: int
    image_size: tuple[int, int] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | Sequence[int] = 0
    autoguidance: float = 1.0

    def __post_init__(self):
        check = config.require
        check(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        check(self.guidance >= 0, f"guidance={self.guidance} must not be negative (1 is off).")
        check(self.autoguidance >= 0, f"autoguidance={self.autoguidance} must not be negative (1 is off).")
        check(
            self.guidance == 1 or self.autoguidance == 1,
            f"guidance={self.guidance} and autoguidance={self.autoguidance} exclude each other: set one of them to 1 (off).",
        )
        check(0 <= self.guidance_rescale <= 1, f"guidance_rescale={self.guidance_rescale} must be from 0 to 1.")
        check(self.max_tokens >= 0, f"max_tokens={self.max_tokens} must not be negative.")
        check(self.max_images >= 0, f"max_images={self.max_images} must not be negative.")
        check(self.temperature >= 0, f"temperature={self.temperature} must not be negative (0 is greedy).")
        check(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1].")
        check(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1].")
        check(self.top_k >= 0, f"top_k={self.top_k} must not be negative (0 is off).")


@dataclasses.dataclass
class Draft:
    """A document in the making."""

    queue: list[Segment]  # of the prompt, not yet read
    segments: list[Segment]  # of the result
    pieces: list[Piece]
    mode: int
    budget: int
    images: int
    drawn: int = 0
    ended: bool = False  # the model wrote [EOS], it did not run out of budget
    read: int = 0  # positions of the stream that are in the cache
    place: float = -1.0  # position of the last of them


class Session:
    """One group of documents, generated together."""

    def __init__(self, model: "Model", documents, keys, options: Options, known):
        self.model, self.keys, self.options, self.known = model, keys, options, known
        images = options.max_images if model.cfg.layout.images != "read" else 0
        self.drafts = [Draft(list(d.segments), [], [], text.TEXT, options.max_tokens, images) for d in documents]
        self.cache: Cache = empty_cache(model.network, len(documents), SLOT_BUCKET, model.network.compute_type)
        self.logits = jnp.zeros((len(documents), model.vocabulary.size), jnp.float32)

    def run(self) -> list[Document]:
        for draft in self.drafts:
            self._take(draft)
        while True:
            self.model.between()
            self._read()
            if any(d.mode < text.DRAW for d in self.drafts):
                self._write()
            due = [i for i, d in enumerate(self.drafts) if d.mode == text.DRAW]
            if due:
                self._draw(due)
            if all(d.mode == text.DONE for d in self.drafts):
                return [Document(*d.segments, extra={"ended": d.ended}) for d in self.drafts]

    def _take(self, draft: Draft) -> None:
        """Move the prompt up to its next IMG (or its end) into the pieces, and decide what comes after it."""
        model, size = self.model, self.options.image_size
        if not model.cfg.layout.markers:
            self._take_image(draft)
            return
        while draft.queue and draft.queue[0] is not IMG:
            segment = draft.queue.pop(0)
            draft.segments.append(segment)
            draft.pieces += text_pieces(Document(segment), model.vocabulary, model.cfg.model.patch, model.tokenizer)
        if draft.queue:
            draft.queue.pop(0)
            if size is None:
                draft.mode, draft.images = text.MARKER, draft.images + 1
            else:
                self._open(draft, *image_grid(*size, model.cfg.model.patch, model.tokenizer))
        elif draft.budget > 0:
            draft.mode = text.TEXT
        else:
            draft.mode = text.DONE

    def _take_image(self, draft: Draft) -> None:
        """The same for a model that knows images alone: the next IMG, or the end."""
        size = self.options.image_size or self.model.cfg.fixed_size
        if size is None:
            raise config.ConfigError("this model was trained on images of several sizes, without text: give image_size.")
        if any(segment is not IMG for segment in draft.queue):
            raise DataError("this model was trained on images alone (layout.markers=False): a prompt can hold IMG only.")
        self.model.network.check_size(*size)
        if draft.queue:
            draft.queue.pop(0)
            self._open(draft, *image_grid(*size, self.model.cfg.model.patch))
        else:
            draft.mode = text.DONE

    def _open(self, draft: Draft, grid_rows: int, grid_cols: int) -> None:
        """Put an image without patches at the end: its size tokens stand, it is still to be drawn."""
        draft.pieces.append(ImagePiece(None, grid_rows, grid_cols))
        draft.mode = text.DRAW

    def _read(self) -> None:
        """Bring the cache up to date with the pieces of every document that goes on."""
        if not self.model.cfg.layout.markers:
            return
        streams = [self._stream(d.pieces) for d in self.drafts]
        for draft, (stream, _) in zip(self.drafts, streams, strict=True):
            if draft.mode == text.DONE:  # nothing will read it
                draft.read = len(stream.tokens)
        pending = [len(s.tokens) - d.read for (s, _), d in zip(streams, self.drafts, strict=True)]
        if not any(pending):
            return
        self._reserve(max(len(s.tokens) for s, _ in streams))
        for chunk in chunks(self.model.network, [s for s, _ in streams], [d.read for d in self.drafts]):
            self.cache, logits = extend(self.model.network, self.model.params, self.cache, chunk)
            fresh = chunk.counts > 0
            self.logits = logits if fresh.all() else jnp.where(fresh[:, None], logits, self.logits)
        for draft, (stream, place) in zip(self.drafts, streams, strict=True):
            draft.read, draft.place = len(stream.tokens), place

    def _write(self) -> None:
        """The text phase."""
        options, model = self.options, self.model
        # a phase writes at most the budget, and [IMG] with its two size tokens
        longest = max(d.budget for d in self.drafts if d.mode < text.DRAW) + 4
        slots = round_up(max(d.read for d in self.drafts) + longest, SLOT_BUCKET)
        as_ints = lambda values: jnp.asarray(list(values), jnp.int32)
        size = options.image_size
        grid = image_grid(*size, model.cfg.model.patch, model.tokenizer) if size else (int(self._dynamic), 0)
        state = text.Writing(
            logits=self.logits,
            place=jnp.asarray([d.place for d in self.drafts], jnp.float32),
            mode=as_ints(d.mode for d in self.drafts),
            budget=as_ints(d.budget for d in self.drafts),
            images=as_ints(d.images for d in self.drafts),
            grid_rows=jnp.zeros(len(self.drafts), jnp.int32),
            tokens=jnp.zeros((len(self.drafts), round_up(longest, CHUNK_BUCKET)), jnp.int32),
            written=jnp.zeros(len(self.drafts), jnp.int32),
            read=jnp.zeros(len(self.drafts), jnp.int32),
        )
        choice = text.Choice.of(options, *grid, self._largest_image())
        self.cache, state = text.write_text(
            model.network, model.special, model.params, self.cache, state, self.keys, choice, slots
        )
        self.logits = state.logits
        host = fetch((state.mode, state.budget, state.images, state.tokens, state.written, state.place))
        for draft, mode, budget, images, tokens, written, place in zip(self.drafts, *host, strict=True):
            if draft.mode < text.DRAW:
                draft.mode, draft.budget, draft.images = int(mode), int(budget), int(images)
                draft.place = float(place)
                draft.ended = bool(written) and int(tokens[written - 1]) == self.model.vocabulary.eos
                self._keep(draft, tokens[:written])

    def _keep(self, draft: Draft, tokens: np.ndarray) -> None:
        """Turn the tokens of a text phase into pieces and segments."""
        vocabulary = self.model.vocabulary
        start, stop = vocabulary.text_range
        written = tokens[(tokens >= start) & (tokens < stop)]
        if len(written):
            draft.pieces.append(TextPiece(written.astype(np.int32)))
            draft.segments.append(Text(vocabulary.decode(written.tolist())))
        draft.read += len(written)
        if draft.mode == text.DRAW:
            self._open(draft, vocabulary.row_count(int(tokens[-2])), vocabulary.col_count(int(tokens[-1])))
            draft.read += 3

    def first_drawing(self) -> Drawing:
        """Read the prompts, which end with an IMG of given size, and stop where their images are due."""
        for draft in self.drafts:
            self._take(draft)
        self._read()
        return self._drawing(list(range(len(self.drafts))))

    def _draw(self, due: list[int]) -> None:
        """The image phase for the documents `due`."""
        padded = due + [due[0]] * (_bucket(len(due), len(self.drafts)) - len(due))
        made = fetch(self.model.path.draw(self.model, self._drawing(padded), self.options))
        for i, patches in zip(due, made, strict=False):
            draft = self.drafts[i]
            piece = cast(ImagePiece, draft.pieces[-1])
            order = image_order(self.model.cfg.layout.order, piece.grid_rows, piece.grid_cols)
            patches = patches[: piece.patch_count][np.argsort(order)]  # as they lie in the image
            draft.pieces[-1] = piece._replace(patches=patches)
            if self.model.tokenizer is None:
                draft.segments.append(Image(unpatchify(patches, piece.grid_rows, piece.grid_cols)))
            else:
                draft.segments.append(Image(self.model.tokenizer.decode(patches[None])[0]))
            draft.drawn += 1
            self._take(draft)

    def _drawing(self, padded: list[int]) -> Drawing:
        """The images due in these documents."""
        options, cfg = self.options, self.model.cfg
        drafts = [self.drafts[i] for i in padded]
        open_images = [cast(ImagePiece, d.pieces[-1]) for d in drafts]
        guided = options.guidance != 1.0 and cfg.layout.markers
        take = np.asarray(padded)
        caches, starts = [self._rows(self.cache, take)], [[d.place for d in drafts]]
        if guided:
            streams = [self._stream(drop_text(d.pieces)) for d in drafts]  # as training drops it
            caches.append(self._context(self.model, [rows for rows, _ in streams]))
            starts.append([place for _, place in streams])
            slots = max(capacity(c) for c in caches)
            caches = [grow(c, slots) for c in caches]
        count = np.asarray([p.patch_count for p in open_images], np.int32)
        columns = round_up(int(count.max()), LENGTH_BUCKET) if self._dynamic else int(count.max())
        position = np.zeros((len(starts), len(drafts), columns, 2), np.float32)
        cell = np.zeros((len(drafts), columns, 4), np.int32)
        for b, piece in enumerate(open_images):
            grid = piece.grid_rows, piece.grid_cols
            order = image_order(cfg.layout.order, *grid)
            cell[b, : piece.patch_count] = patch_cells(*grid)[order]
            for g, where in enumerate(starts):
                position[g, b, : piece.patch_count] = patch_positions(where[b], *grid, cfg.model.positions)[0][order]
        keys = fold(self._rows(self.keys, take), np.asarray([2**30 + d.drawn for d in drafts]))
        lowest, highest = options.guidance_interval
        scale = options.guidance if options.autoguidance == 1 else options.autoguidance
        guide = Guidance(*map(np.float32, (scale, lowest, highest, options.guidance_rescale)))
        canvas = Canvas(position, cell, count, self._known(), np.asarray(starts, np.float32))
        weaker = self.model.weak if options.autoguidance != 1 else None
        weak = None
        if weaker is not None:
            weak = Weak(weaker.params, self._context(weaker, [self._stream(d.pieces)[0] for d in drafts]))
        return Drawing(self.model.params, tuple(caches), canvas, keys, guide, weak)

    def _context(self, model: "Model", streams: list[Rows]) -> Cache:
        """What `model` keeps of these streams."""
        network = model.network
        cache = empty_cache(network, len(streams), max(len(s.tokens) for s in streams), network.compute_type)
        if not model.cfg.layout.markers:  # images alone: they read nothing before them
            return cache
        for chunk in chunks(network, streams, [0] * len(streams)):
            cache, _ = extend(network, model.params, cache, chunk)
        return cache

    def _stream(self, pieces: list[Piece]) -> tuple[Rows, float]:
        """The context stream so far: finished images clean, an open one only announced."""
        plans = [ImagePlan(p.patches is not None, 0) for p in pieces if isinstance(p, ImagePiece)]
        cfg = self.model.cfg
        clean = dataclasses.replace(cfg.layout, context="clean")
        return lay_out(
            pieces,
            plans,
            self.model.vocabulary,
            clean,
            patch_values=cfg.patch_values,
            positions=cfg.model.positions,
            end=False,
        )

    def _known(self) -> Known | None:
        """Known patches of the image being inpainted, and where to repaint."""
        if self.known is None:
            return None
        image, mask = self.known
        patch = self.model.cfg.model.patch
        wide = np.repeat(mask[..., None], 3, axis=-1)
        pixels = patchify(image.pixels, patch)[None].astype(np.float32) / 127.5 - 1.0
        return Known(pixels, patchify(wide, patch)[None])

    def _largest_image(self) -> int:
        """Patches of the largest image the model may choose: what fits a training row, and a dynamic tokenizer can decode."""
        most = self.model.tokenizer.grid[1] if self._dynamic else self.model.cfg.layout.row_length
        return max(1, min(most, self.model.cfg.layout.row_length))

    @property
    def _dynamic(self) -> bool:
        """Whether the model chooses how many codes an image has, which then stand in one row."""
        return self.model.tokenizer is not None and self.model.tokenizer.dynamic

    def _reserve(self, slots: int) -> None:
        self.cache = grow(self.cache, slots)

    def _rows(self, tree: T, take: np.ndarray) -> T:
        if np.array_equal(take, np.arange(len(self.drafts))):
            return tree  # indexing outside of a program costs a millisecond
        return jax.tree.map(lambda a: a[take], tree)


@jax.jit
def fold(keys: jax.Array, numbers: np.ndarray) -> jax.Array:
    """One key per document from keys [b] and int [b]."""
    return jax.vmap(jax.random.fold_in)(keys, numbers)


def _bucket(count: int, most: int) -> int:
    """`count` rounded up to a power of two, at most `most`: few shapes, few programs."""
    return min(most, 1 << (count - 1).bit_length())
