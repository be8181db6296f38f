"""Documents to rows: the sequence the transformer reads.

    [BOS] text [IMG] <rows r> <cols c> (clean patches) [/IMG] text ... [EOS]   | noised block | noised block ...
    '----------------------- context stream -------------------------------'   '-- per image with loss --------'

- `[IMG] <rows> <cols>` are predicted by the language head; `[/IMG]` is written here. Patches carry no text loss.
- A noised block reads the stream up to its own size tokens, and itself. Nobody else reads it, so every later token is
  conditioned on the clean image, in training exactly as in sampling.
- With layout.images="next_code", "next_pixel" or "read" an image stands in the stream alone, and its positions read what came
  before them, in `layout.order`.
- Codes of a tokenizer stand as tokens where raw patches would (layout.images in config.CODED).
- Every query reads at most two key intervals, so a mask is four int32 vectors, never T x T (`IntervalMask`). That holds for
  strided attention, too, which works on images column by column (nn/strided.py).
- Positions are 2-D: text at (p, p), the patches of an image around the diagonal (`patch_positions`).
- Without markers (`layout.markers=False`) there is no stream: the noised blocks of a document are all there is.

Letters: b rows, t positions, p values of a patch (3 * patch^2), n patches of an image (grid_rows * grid_cols).
Everything that builds a sequence, for training or for sampling, goes through `lay_out`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config
from mmdiff.document import DataError, Document, Image, Text
from mmdiff.orders import image_order

Positions = Literal["centred", "scaled", "corner", "raster"]
TIME = -1  # in place of a token


class IntervalMask(NamedTuple):
    """Which keys each query may read: [context_start, context_end) and [block_start, block_end), int32 [..., T]."""

    context_start: Any
    context_end: Any
    block_start: Any
    block_end: Any

    def dense(self, keys: int) -> jax.Array:
        """The same mask as bool [..., T, keys]."""
        s = jnp.arange(keys, dtype=jnp.int32)
        context = (self.context_start[..., None] <= s) & (s < self.context_end[..., None])
        block = (self.block_start[..., None] <= s) & (s < self.block_end[..., None])
        return context | block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of packed rows (or one row, without the leading axis): what a training step sees."""

    tokens: Any  # int32 [b, t], 0 at raw patches and padding, TIME at the time token of a noised block
    patches: Any  # uint8 [b, t, p], 0 at text
    is_patch: Any  # bool [b, t]; raw patch or code
    image: Any  # int32 [b, t]; 0 is text, k the k-th image of the row; noised and clean copies share k
    noised: Any  # bool [b, t]
    position: Any  # float32 [b, t, 2]
    cell: Any  # int32 [b, t, 4]; row and column of a patch, and its image's numbers of rows and columns; 0 at text
    context_start: Any  # int32 [b, t], as the next three: see IntervalMask
    context_end: Any
    block_start: Any
    block_end: Any
    text_weight: Any  # float32 [b, t]; weight of predicting this token from the position before it
    image_weight: Any  # float32 [b, t]; sums to 1 over the positions at which an image is learnt
    max_u: Any  # float32 [b, t]; cap on the noise time of a noised patch (below 1 only with context="noised")

    @property
    def mask(self) -> IntervalMask:
        return IntervalMask(self.context_start, self.context_end, self.block_start, self.block_end)


class TextPiece(NamedTuple):
    """A text of a document, tokenised."""

    tokens: np.ndarray  # int32 [n]
    learn: bool = True


class ImagePiece(NamedTuple):
    """An image of a document, cut into patches. `patches` is None where only the lengths matter."""

    patches: np.ndarray | None  # raw: uint8 [n, p]; ids of codes: int32 [n]
    grid_rows: int
    grid_cols: int
    learn: bool = True

    @property
    def patch_count(self) -> int:
        return self.grid_rows * self.grid_cols


Piece = TextPiece | ImagePiece


class ImagePlan(NamedTuple):
    """Which copies one image gets."""

    clean: bool
    noised: int


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [h, w, 3] to uint8 [n, 3 * patch^2]: patches in raster order, each (row, column, channel)."""
    height, width, channels = pixels.shape
    cut = pixels.reshape(height // patch, patch, width // patch, patch, channels)
    return cut.transpose(0, 2, 1, 3, 4).reshape(-1, patch * patch * channels)


def unpatchify(patches: np.ndarray, grid_rows: int, grid_cols: int) -> np.ndarray:
    """The inverse of `patchify` for any dtype: [..., n, p] to [..., h, w, 3]."""
    lead, patch = patches.shape[:-2], round((patches.shape[-1] / 3) ** 0.5)
    cut = patches.reshape(*lead, grid_rows, grid_cols, patch, patch, 3)
    return np.moveaxis(cut, -4, -3).reshape(*lead, grid_rows * patch, grid_cols * patch, 3)


def image_grid(height: int, width: int, patch: int, tokenizer=None) -> tuple[int, int]:
    """Rows and columns of an image's patches, or of its codes; of a dynamic tokenizer those of the most codes."""
    return (height // patch, width // patch) if tokenizer is None else tokenizer.grid


def code_grid(tokenizer, ids: np.ndarray) -> tuple[int, int]:
    """Rows and columns in which the codes of one image stand: of a dynamic tokenizer one row of as many as there are."""
    return (1, len(ids)) if tokenizer.dynamic else tokenizer.grid


def text_pieces(document: Document, vocabulary, patch: int, tokenizer=None) -> list[Piece]:
    """Tokenise the texts and cut the images of a document, into the codes of a tokenizer if there is one.

    Raises:
      ConfigError: an image side is not divisible by the patch, or its grid exceeds the vocabulary's.
    """
    pieces: list[Piece] = []
    for segment in document.segments:
        if isinstance(segment, Text):
            pieces.append(TextPiece(np.asarray(vocabulary.encode(segment.text), np.int32), segment.learn))
        elif isinstance(segment, Image):
            config.check_image_size(segment.height, segment.width, patch, "image")
            if tokenizer is None:
                grid, patches = image_grid(segment.height, segment.width, patch), patchify(segment.pixels, patch)
            else:
                patches = tokenizer.encode([segment.pixels])[0]
                grid = code_grid(tokenizer, patches)
            pieces.append(ImagePiece(patches, *grid, segment.learn))
        else:
            raise DataError(f"{segment!r} marks a prompt; it cannot stand in a document to learn from.")
    return pieces


def drop_text(pieces: Sequence[Piece]) -> list[Piece]:
    """Drop every text before the last learnt image: the unconditional branch of guidance.

    Images stay, so what guidance strengthens is the text alone. Training and sampling both call this function.
    """
    last = max((i for i, p in enumerate(pieces) if isinstance(p, ImagePiece) and p.learn), default=-1)
    return [p for i, p in enumerate(pieces) if i > last or isinstance(p, ImagePiece)]


def plan_images(pieces: Sequence[Piece], layout: config.Layout, trailing_context: bool) -> list[ImagePlan]:
    """Which copies each image of a document gets.

    Images with something after them get a clean copy; learnt images get noised blocks; an image at the end gets a clean
    copy only if `trailing_context` (drawn per document with probability `layout.trailing_context`).
    With `layout.context == "noised"` an image exists once: noised in place if learnt, else clean. Without noised blocks
    (layout.blocks) it exists once, and clean.
    """
    plans = []
    for index, piece in enumerate(pieces):
        if not isinstance(piece, ImagePiece):
            continue
        read = index + 1 < len(pieces) or trailing_context
        if not layout.blocks:
            plans.append(ImagePlan(clean=True, noised=0))
        elif layout.context == "noised":
            plans.append(ImagePlan(clean=read and not piece.learn, noised=int(piece.learn)))
        else:
            plans.append(ImagePlan(clean=read, noised=layout.noised_copies if piece.learn else 0))
    return plans


def patch_positions(start: float, rows: int, cols: int, kind: Positions) -> tuple[np.ndarray, float]:
    """Coordinates of an image's patches, and the position at which the sequence goes on after it.

    Args:
      start: position of the last token before the image (its size tokens).
      rows, cols: patch grid, N = rows * cols.
      kind: `centred` and `scaled` give the image the room of N tokens, symmetric between the text before and after
        it; `corner` and `raster` are ablations.
    Returns:
      float32 [N, 2] in raster order, and the position of the token after the image.
    Source: Su Jianlin, RoPE-Tie and RoPE-TV, kexue.fm/archives/10040 and 10352.
    """
    count = rows * cols
    row, col = np.divmod(np.arange(count), cols)
    if kind == "centred":
        centre = start + (count + 1) / 2
        coordinates: tuple = centre + row - (rows - 1) / 2, centre + col - (cols - 1) / 2
    elif kind == "scaled":
        coordinates = start + (row + 1) * (count + 1) / (rows + 1), start + (col + 1) * (count + 1) / (cols + 1)
    elif kind == "corner":
        coordinates = start + 1 + row, start + 1 + col
    else:
        coordinates = start + 1 + np.arange(count), start + 1 + np.arange(count)
    resume = start + 1 + max(rows, cols) if kind == "corner" else start + count + 1
    return np.stack(coordinates, axis=-1).astype(np.float32), float(resume)


def patch_cells(rows: int, cols: int) -> np.ndarray:
    """`Rows.cell` of an image's patches: int32 [rows * cols, 4], raster order."""
    row, col = np.divmod(np.arange(rows * cols), cols)
    return np.stack([row, col, np.full_like(row, rows), np.full_like(col, cols)], axis=-1).astype(np.int32)


def learnt_images(pieces: Sequence[Piece]) -> list[Piece]:
    """What `layout.markers=False` leaves of a document."""
    return [p for p in pieces if isinstance(p, ImagePiece) and p.learn]


def laid_length(pieces: Sequence[Piece], plans: Sequence[ImagePlan], layout: config.Layout, end: bool = True) -> int:
    """Positions that `lay_out` will use, from lengths alone."""
    if not layout.markers:
        images = [p for p in pieces if isinstance(p, ImagePiece)]
        return sum(_block_length(p, layout) * plan.noised for p, plan in zip(images, plans, strict=True))
    length, remaining = 1, iter(plans)
    for index, piece in enumerate(pieces):
        if isinstance(piece, TextPiece):
            length += len(piece.tokens)
            continue
        plan = next(remaining)
        closed = plan.clean or index + 1 < len(pieces)  # by [/IMG]
        length += 3 + piece.patch_count * int(plan.clean) + _block_length(piece, layout) * plan.noised + int(closed)
    return length + int(end and _closes(pieces, plans))


def _block_length(piece: ImagePiece, layout: config.Layout) -> int:
    return piece.patch_count + int(layout.time_token)


def _closes(pieces: Sequence[Piece], plans: Sequence[ImagePlan]) -> bool:
    """Whether [EOS] is written: not after an image that the stream does not show."""
    return not (pieces and isinstance(pieces[-1], ImagePiece)) or plans[-1].clean


def lay_out(
    pieces: Sequence[Piece],
    plans: Sequence[ImagePlan],
    vocabulary,
    layout: config.Layout,
    *,
    patch_values: int,
    positions: Positions = "centred",
    dropped: bool = False,
    end: bool = True,
) -> tuple[Rows, float]:
    """One document as a row of exactly its own length.

    Args:
      pieces: the document; `plans`: one ImagePlan per image, from `plan_images`.
      patch_values: 3 * patch^2.
      dropped: the texts before the last learnt image were dropped, so no text loss falls there either.
      end: write [EOS]; a prompt leaves it out.
    Returns:
      Rows without batch axis, and the position of the last token of the stream.
    """
    length = laid_length(pieces, plans, layout, end)
    row = empty_row(length, patch_values)
    last_learnt = max((i for i, p in enumerate(pieces) if isinstance(p, ImagePiece) and p.learn), default=-1)
    t, place = 0, -1.0

    def write(tokens, weight: float) -> None:
        nonlocal t, place
        count = len(tokens)
        stop = t + count
        row.tokens[t:stop] = tokens
        row.position[t:stop] = (place + 1 + np.arange(count, dtype=np.float32))[:, None]
        row.context_start[t:stop], row.context_end[t:stop] = 0, np.arange(t + 1, stop + 1)
        row.text_weight[t:stop] = weight
        t, place = stop, place + count

    def write_patches(piece: ImagePiece, number: int, where, context_end, block: bool) -> None:
        nonlocal t
        start = t + int(block and layout.time_token)
        stop = start + piece.patch_count
        row.tokens[t:start], row.position[t:start] = TIME, where.mean(axis=0)
        if piece.patches is not None and layout.codes:
            row.tokens[start:stop] = vocabulary.codes_range[0] + piece.patches
        elif piece.patches is not None:
            row.patches[start:stop] = piece.patches
        row.is_patch[start:stop], row.image[t:stop], row.position[start:stop] = True, number, where
        row.cell[start:stop] = patch_cells(piece.grid_rows, piece.grid_cols)
        if layout.order != "raster":
            order = image_order(layout.order, piece.grid_rows, piece.grid_cols)
            for written in (row.tokens, row.patches, row.position, row.cell):
                written[start:stop] = written[start:stop][order]
        row.context_start[t:stop], row.context_end[t:stop] = 0, context_end
        if block:
            row.block_start[t:stop], row.block_end[t:stop] = t, stop
            row.noised[t:stop] = True
            row.image_weight[start:stop] = 1 / (piece.patch_count * layout.noised_copies)
        t = stop

    number, blocks = 0, []
    if layout.markers:
        write([vocabulary.bos], 0.0)
    for index, piece in enumerate(pieces):
        learn = float(piece.learn and not (dropped and index <= last_learnt))
        if isinstance(piece, TextPiece):
            write(piece.tokens, learn)
            continue
        plan, number = plans[number], number + 1
        if not layout.markers:
            where, _ = patch_positions(place, piece.grid_rows, piece.grid_cols, positions)
            blocks += [(piece, number, where, 0)] * plan.noised
            continue
        asked = learn * (layout.images != "read")  # else the model would ask for images that it cannot draw
        write([vocabulary.img, vocabulary.rows(piece.grid_rows), vocabulary.cols(piece.grid_cols)], asked)
        where, resume = patch_positions(place, piece.grid_rows, piece.grid_cols, positions)
        sized = t
        read = plan.clean or index + 1 < len(pieces)
        if layout.context == "noised" and plan.noised:
            write_patches(piece, number, where, sized, block=True)
            row.max_u[sized:t] = layout.max_context_u if read else 1.0
        else:
            if plan.clean:
                whole = sized + piece.patch_count
                seen = whole if layout.blocks else np.arange(sized + 1, whole + 1)
                write_patches(piece, number, where, seen, block=False)
                row.image_weight[sized:whole] = piece.learn * layout.in_order / piece.patch_count
            blocks += [(piece, number, where, sized)] * plan.noised
        if read:
            place = resume - 1
            write([vocabulary.end_img], 0.0)
    if end and layout.markers and _closes(pieces, plans):
        write([vocabulary.eos], float(pieces[-1].learn) if pieces else 1.0)
    for piece, number, where, sized in blocks:
        write_patches(piece, number, where, sized, block=True)
    return row, place


def without_words(rows: Rows, first_word: int) -> tuple[Rows, jax.Array]:
    """What `drop_text` would have made of every document of a batch, as far as noised blocks can read it.

    The rest moves up, and rows are padded at their end.
    Args:
      first_word: the smallest token id that is text (vocabulary.text_range).
    Returns:
      The batch, and where each of its positions stood before, int32 [b, t].
    """
    length = rows.tokens.shape[-1]
    word = rows.tokens >= first_word
    before = jnp.pad(jnp.cumsum(word, axis=-1), ((0, 0), (1, 0)))  # words before a position, int [b, t + 1]
    words_before = lambda index: jnp.take_along_axis(before, index, axis=-1)
    here = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), word.shape)
    moved = {name: index - words_before(index) for name in IntervalMask._fields for index in (getattr(rows, name),)}
    # what a position reads of the stream ends with itself, or with the size tokens of its image
    gone = words_before(rows.context_end) - words_before(rows.context_start)
    rows = dataclasses.replace(rows, position=rows.position - gone[..., None], **moved)
    order = jnp.argsort(word, axis=-1, stable=True)
    rows = jax.tree.map(lambda a: jnp.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), axis=1), rows)
    padding = here >= length - before[:, -1:]
    alone = {"context_start": here, "context_end": here + 1, "block_start": here, "block_end": here}
    masked = {name: jnp.where(padding, index, getattr(rows, name)) for name, index in alone.items()}
    masked |= {name: getattr(rows, name) & ~padding for name in ("is_patch", "noised")}
    return dataclasses.replace(rows, **masked), order


def empty_row(length: int, patch_values: int) -> Rows:
    """A row of padding: every position reads itself only and carries no loss."""
    zeros = lambda dtype, *more: np.zeros((length, *more), dtype)
    here = np.arange(length, dtype=np.int32)
    return Rows(
        tokens=zeros(np.int32),
        patches=zeros(np.uint8, patch_values),
        is_patch=zeros(bool),
        image=zeros(np.int32),
        noised=zeros(bool),
        position=zeros(np.float32, 2),
        cell=zeros(np.int32, 4),
        context_start=here.copy(),
        context_end=here + 1,
        block_start=here.copy(),
        block_end=here.copy(),
        text_weight=zeros(np.float32),
        image_weight=zeros(np.float32),
        max_u=np.ones(length, np.float32),
    )


def pack(documents: Sequence[Rows], length: int) -> Rows:
    """Put laid-out documents one after another into one row of `length` positions.

    Raises:
      DataError: they do not fit.
    """
    sizes = [len(d.tokens) for d in documents]
    if sum(sizes) > length:
        raise DataError(f"documents of {sizes} positions do not fit layout.row_length={length}.")
    row = empty_row(length, documents[0].patches.shape[-1] if documents else 0)
    start, images = 0, 0
    for document, size in zip(documents, sizes, strict=True):
        stop = start + size
        for field in dataclasses.fields(Rows):
            value = getattr(document, field.name)
            if field.name in IntervalMask._fields:
                value = value + start
            elif field.name == "image":
                value = np.where(value > 0, value + images, 0)
            getattr(row, field.name)[start:stop] = value
        images += int(document.image.max(initial=0))
        start = stop
    return row


def stack(rows: Sequence[Rows]) -> Rows:
    """Rows of equal length to one batch."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
