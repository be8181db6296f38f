"""The text phase: one compiled loop in which every document that is writing text advances by one token.

A document is in one of these modes, which also say which tokens it may write next:

    TEXT    a text piece, [EOS], or [IMG] while it may still draw        ROWS    <rows r>        COLS    <cols c>
    MARKER  [IMG], because the prompt asks for an image here             DRAW    nothing: its image is due
    DONE    nothing

Keys and values of new tokens go to a buffer with one column per step, which is moved to the cache when the phase ends: a
document that has stopped simply uses fewer columns. The grammar is enforced by masking logits, so a size is always complete
and always fits. Letters: b rows, v vocabulary.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from mmdiff.data.vocabulary import Vocabulary
from mmdiff.layout import IntervalMask
from mmdiff.models.network import Network
from mmdiff.nn.attention import Growing, KeyValue, squeezed
from mmdiff.sampling.cache import Cache, append, capacity, grow

if TYPE_CHECKING:
    from mmdiff.models.transfusion import Embedded
    from mmdiff.sampling.image import Canvas

TEXT, MARKER, ROWS, COLS, DRAW, DONE = range(6)
NEVER = -1e30


class Special(NamedTuple):
    """Token ids the loop must know; hashable."""

    eos: int
    img: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    text: tuple[int, int]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "Special":
        ranges = vocabulary.rows_range, vocabulary.cols_range, vocabulary.text_range
        return cls(vocabulary.eos, vocabulary.img, *ranges)


class Writing(NamedTuple):
    """State of the text phase of b documents."""

    logits: jax.Array  # float32 [b, v] of the next token
    place: jax.Array  # float32 [b]; position of the last token
    mode: jax.Array  # int32 [b]
    budget: jax.Array  # int32 [b]; text tokens that may still be written
    images: jax.Array  # int32 [b]; images that may still be started
    grid_rows: jax.Array  # int32 [b]; rows of the image being sized
    tokens: jax.Array  # int32 [b, m]; what was written in this phase
    written: jax.Array  # int32 [b]; how many
    read: jax.Array  # int32 [b]; of these, how many the model has read: all but [EOS]


class Choice(NamedTuple):
    """How tokens are chosen. `rows`, `cols` = 0 leave the image size to the model, up to `patches` patches."""

    temperature: jax.Array
    narrow: "Narrow | None"  # None: every token that is allowed
    rows: jax.Array  # int32
    cols: jax.Array
    patches: jax.Array

    @classmethod
    def of(cls, options, rows: int = 0, cols: int = 0, patches: int = 0) -> "Choice":
        """Of sampling options (session.Options)."""
        narrow = Narrow.of(options.top_k, options.top_p, options.min_p)
        return cls(jnp.float32(options.temperature), narrow, jnp.int32(rows), jnp.int32(cols), jnp.int32(patches))


class Narrow(NamedTuple):
    """Limits on the tokens drawn from; None: no such limit. Only top_k and top_p cost a sort of the vocabulary per token."""

    top_k: jax.Array | None  # int32
    top_p: jax.Array | None
    min_p: jax.Array | None

    @classmethod
    def of(cls, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> "Narrow | None":
        """Of the options as users give them, where 0, 1 and 0 mean no limit; None if there is none."""
        if top_k == 0 and top_p == 1.0 and min_p == 0.0:
            return None
        return cls(
            top_k=jnp.int32(top_k) if top_k > 0 else None,
            top_p=jnp.float32(top_p) if top_p < 1.0 else None,
            min_p=jnp.float32(min_p) if min_p > 0.0 else None,
        )


@functools.partial(jax.jit, static_argnames=("network", "special", "slots"), donate_argnames="state")
def write_text(
    network: Network,
    special: Special,
    params: Any,
    cache: Cache,
    state: Writing,
    keys: jax.Array,
    choice: Choice,
    slots: int,
) -> tuple[Cache, Writing]:
    """Advance until no document is in TEXT, MARKER, ROWS or COLS.

    Args:
      keys: [b], one PRNG key per document.
      slots: capacity of the cache that is returned; it must hold what is written.
    """
    model = network.bind(params)
    allowed_by_mode = _allowed_tables(special, state.logits.shape[-1])
    rows, columns = len(state.mode), state.tokens.shape[1]

    def active(carry):
        return jnp.any(carry[0].mode < DRAW)

    def advance(carry):
        state, fresh, column = carry
        going = state.mode < DRAW
        allowed = allowed_by_mode[state.mode] & _fits(special, state, choice)
        # the key is folded with the stream position, so a document's tokens do not depend on its neighbours
        folded = jax.vmap(jax.random.fold_in)(keys, cache.length + column)
        token = jnp.where(going, choose(state.logits, allowed, folded, choice), 0)
        is_text = (token >= special.text[0]) & (token < special.text[1])
        budget = state.budget - (going & is_text)
        forward = going & (token != special.eos)
        place = state.place + forward
        here = jnp.broadcast_to(place[:, None], (rows, 2))
        hidden, fresh = one_token(model, cache, fresh, column, token, here, jnp.zeros((rows, 4), jnp.int32))
        state = Writing(
            logits=jnp.where(forward[:, None], model.text_logits(hidden[:, 0]), state.logits),
            place=place,
            mode=_next_mode(special, state.mode, token, budget),
            budget=budget,
            images=state.images - (going & (token == special.img)),
            grid_rows=jnp.where(state.mode == ROWS, token - special.rows[0] + 1, state.grid_rows),
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], column, axis=1),
            written=state.written + going,
            read=state.read + forward,
        )
        return state, fresh, column + 1

    state, fresh, _ = jax.lax.while_loop(active, advance, (state, buffers(cache, columns), jnp.int32(0)))
    fresh = jax.tree.map(lambda buffer: buffer.reshape(rows, network.head[0], *buffer.shape[-2:]), fresh)
    return append(grow(cache, slots), fresh, state.read), state


def choose(logits: jax.Array, allowed: jax.Array, keys: jax.Array, choice: Choice) -> jax.Array:
    """Draw a token per row from float32 logits [b, v]; temperature 0 takes the most likely."""
    logits = jnp.where(allowed, logits, NEVER)
    warm = logits / jnp.maximum(choice.temperature, 1e-6)
    if choice.narrow is not None:
        warm = jnp.where(warm >= _lowest(warm, choice.narrow), warm, NEVER)
    drawn = jax.vmap(jax.random.categorical)(keys, warm)
    return jnp.where(choice.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _lowest(logits: jax.Array, narrow: Narrow) -> jax.Array:
    """The smallest logit that may still be drawn, [b, 1].

    top_k keeps the k most likely, top_p the smallest set with that much probability, min_p those with at least that
    fraction of the best one's probability; each acts on the distribution after temperature.
    """
    lowest = jnp.full((len(logits), 1), NEVER)
    if narrow.min_p is not None:
        lowest = logits.max(axis=-1, keepdims=True) + jnp.log(narrow.min_p)
    if narrow.top_k is None and narrow.top_p is None:
        return lowest
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    keep = jnp.ones_like(ordered, bool)
    if narrow.top_k is not None:
        keep &= jnp.arange(ordered.shape[-1]) < narrow.top_k
    if narrow.top_p is not None:
        probability = jax.nn.softmax(ordered, axis=-1)
        keep &= jnp.cumsum(probability, axis=-1) - probability < narrow.top_p
    keep = keep.at[:, 0].set(True)
    return jnp.maximum(lowest, jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True))


def buffers(cache: Cache, columns: int) -> tuple[KeyValue, ...]:
    """Room for the keys and values of `columns` new tokens per document."""
    empty = lambda a: squeezed(jnp.zeros((*a.shape[:2], columns, a.shape[3]), a.dtype))
    return tuple(KeyValue(empty(layer.k), empty(layer.v)) for layer in cache.layers)


def before_image(model, cache: Cache, canvas: "Canvas", columns: tuple[int, int]) -> jax.Array:
    """The last hidden state [g * b, d] of streams that end with the size tokens of an image, read once more.

    `columns`: the ids of the size tokens `<cols 1> ..` (Vocabulary.cols_range).
    """
    branches = len(canvas.start)
    token = jnp.tile(jnp.asarray(canvas.cell)[:, 0, 3] + columns[0] - 1, branches)
    place = jnp.broadcast_to(jnp.asarray(canvas.start).reshape(-1, 1), (len(token), 2))
    earlier, nowhere = cache._replace(length=cache.length - 1), jnp.zeros((len(token), 4), jnp.int32)
    return one_token(model, earlier, buffers(cache, 1), jnp.int32(0), token, place, nowhere)[0][:, 0]


def one_token(
    model,
    cache: Cache,
    fresh: tuple[KeyValue, ...],
    column: jax.Array,
    token: jax.Array,
    place: jax.Array,
    cell: jax.Array,
    is_patch: bool = False,
    z: jax.Array | None = None,
):
    """Forward pass of one token per document, which reads the cache and the columns before it.

    Args:
      fresh: `buffers` for what is new, of which `column` are in use.
      token: int32 [b]; place: float32 [b, 2], its position; cell: int32 [b, 4].
      is_patch: it stands in an image. z: float32 [b, p], the raw patch there, if it is one.
    Returns:
      hidden [b, 1, d], and the buffers with its keys and values.
    """
    count = len(token)
    patch = jnp.zeros((count, model.image.values)) if z is None else z
    x = model.embed(token[:, None], jnp.full((count, 1), is_patch), patch[:, None], jnp.zeros((count, 1)), cell[:, None])
    return one_embedded(model, cache, fresh, column, x, place, cell)


def one_embedded(
    model, cache: Cache, fresh: tuple[KeyValue, ...], column: jax.Array, x: "Embedded", place: jax.Array, cell: jax.Array
):
    """`one_token` of what stands at one position of each document, embedded."""
    count, slots = len(place), capacity(cache)
    one = jnp.zeros((count, 1), jnp.int32)
    mask = IntervalMask(one, cache.length[:, None], one + slots, one + slots + column + 1)
    context = tuple(map(Growing, cache.layers, fresh, model.columns(cell, column)))
    return model.stack(x, place[:, None], mask, context, keep=True)


def _allowed_tables(special: Special, size: int) -> jax.Array:
    """bool [modes, v]: what each mode may write, sizes and budgets aside."""
    ids = jnp.arange(size)
    inside = lambda span: (ids >= span[0]) & (ids < span[1])
    text = inside(special.text) | (ids == special.eos) | (ids == special.img)
    nothing = ids == 0
    return jnp.stack([text, ids == special.img, inside(special.rows), inside(special.cols), nothing, nothing])


def _fits(special: Special, state: Writing, choice: Choice) -> jax.Array:
    """bool [b, v]: image budget and image size."""
    ids = jnp.arange(state.logits.shape[-1])[None]
    starting = (ids != special.img) | (state.images > 0)[:, None]
    r = ids - special.rows[0] + 1
    is_rows = (ids >= special.rows[0]) & (ids < special.rows[1])
    fits_rows = jnp.where(choice.rows > 0, r == choice.rows, r <= choice.patches)
    c = ids - special.cols[0] + 1
    is_cols = (ids >= special.cols[0]) & (ids < special.cols[1])
    fits_cols = jnp.where(choice.cols > 0, c == choice.cols, c * state.grid_rows[:, None] <= choice.patches)
    return starting & (~is_rows | fits_rows) & (~is_cols | fits_cols)


def _next_mode(special: Special, mode, token, budget) -> jax.Array:
    after_text = jnp.where(budget > 0, TEXT, DONE)
    after = jnp.where(token == special.img, ROWS, jnp.where(token == special.eos, DONE, after_text))
    follow = jnp.stack([after, jnp.full_like(mode, ROWS), jnp.full_like(mode, COLS), jnp.full_like(mode, DRAW), mode, mode])
    return jnp.take_along_axis(follow, mode[None], axis=0)[0]
