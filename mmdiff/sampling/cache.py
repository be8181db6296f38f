"""The cache of a batch of growing documents, and the program that appends to it.

Each row of a batch is one document; its context stream fills slots 0 .. length of the cache, in order and without gaps.
A chunk (the rest of a prompt, or a finished clean image and its [/IMG]) is read by one forward pass against the cache,
and its keys and values are written behind. Nothing noised ever enters the cache.

Letters: b rows (documents), s cache slots, t positions of a chunk, p patch values, v vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.layout import IntervalMask, Rows
from mmdiff.models.network import Network
from mmdiff.nn.attention import KeyValue
from mmdiff.training.loss import normalise

SLOT_BUCKET = 64  # capacities and chunk lengths are rounded up to few distinct values, so that few programs are compiled
CHUNK_BUCKET = 8


class Cache(NamedTuple):
    """Context of b documents."""

    layers: tuple[KeyValue, ...]  # [b, h, s, .] each
    length: jax.Array  # int32 [b], slots in use


class Chunk(NamedTuple):
    """The next t positions of each document's stream; rows shorter than t are padded."""

    tokens: np.ndarray  # int32 [b, t]
    patches: np.ndarray  # uint8 [b, t, p]
    is_patch: np.ndarray  # bool [b, t]
    position: np.ndarray  # float32 [b, t, 2]
    cell: np.ndarray  # int32 [b, t, 4]
    read: np.ndarray  # int32 [b, t]; own positions [0, read) that each may read, beside the whole cache
    counts: np.ndarray  # int32 [b]; positions that are not padding


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # one dispatch instead of two per layer
def empty_cache(network: Network, rows: int, slots: int, dtype) -> Cache:
    """Room for `slots` positions in each of `rows` documents."""
    heads, key_width, value_width = network.head
    lead = (rows, heads, round_up(slots, SLOT_BUCKET))
    k_axes, v_axes = network.cache_axes
    k, v = jnp.zeros((*lead, key_width), dtype), jnp.zeros((*lead, value_width), dtype)
    layer = lambda: KeyValue(network.place(k, *k_axes), network.place(v, *v_axes))
    return Cache(tuple(layer() for _ in range(network.cached_layers)), jnp.zeros(rows, jnp.int32))


def capacity(cache: Cache) -> int:
    """Slots per document."""
    return cache.layers[0].k.shape[2] if cache.layers else 0


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with room for at least `slots` positions."""
    extra = round_up(slots, SLOT_BUCKET) - capacity(cache)
    if extra <= 0:
        return cache
    pad = [(0, 0), (0, 0), (0, extra), (0, 0)]
    return cache._replace(layers=jax.tree.map(lambda a: jnp.pad(a, pad), cache.layers))


def chunks(network: Network, streams: list[Rows], starts: list[int]) -> Iterator[Chunk]:
    """The positions from `starts[b]` on of each laid-out stream (no noised blocks): in one chunk, or where layers are
    sparse in several, so that an image begins its chunk (nn/strided.py)."""
    stops = [[len(stream.tokens)] for stream in streams]
    if network.cfg.sparse != "none":
        for start, stop, stream in zip(starts, stops, streams, strict=True):
            begins = np.flatnonzero(np.diff(stream.image, prepend=0) > 0)
            stop[:0] = [int(at) for at in begins if at > start]
    for number in range(max(map(len, stops))):
        ends = [stop[min(number, len(stop) - 1)] for stop in stops]
        yield make_chunk(streams, starts, ends, network.patch_values)
        starts = ends


def make_chunk(streams: list[Rows], starts: list[int], ends: list[int], patch_values: int) -> Chunk:
    """The positions from `starts[b]` to `ends[b]` of each laid-out stream, padded to a common length."""
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    rows, length = len(streams), round_up(max(counts), CHUNK_BUCKET)
    chunk = Chunk(
        tokens=np.zeros((rows, length), np.int32),
        patches=np.zeros((rows, length, patch_values), np.uint8),
        is_patch=np.zeros((rows, length), bool),
        position=np.zeros((rows, length, 2), np.float32),
        cell=np.zeros((rows, length, 4), np.int32),
        read=np.zeros((rows, length), np.int32),
        counts=np.asarray(counts, np.int32),
    )
    for b, (stream, start, end, count) in enumerate(zip(streams, starts, ends, counts, strict=True)):
        for name in ("tokens", "patches", "is_patch", "position", "cell"):
            getattr(chunk, name)[b, :count] = getattr(stream, name)[start:end]
        chunk.read[b, :count] = stream.context_end[start:end] - start
    return chunk


@functools.partial(jax.jit, static_argnames="network", donate_argnames="cache")
def extend(network: Network, params: Any, cache: Cache, chunk: Chunk) -> tuple[Cache, jax.Array]:
    """Append a chunk to every document.

    Returns:
      the cache, and float32 logits [b, v] of the token that follows (of the last position before, for an empty chunk:
      meaningless, keep the old ones).
    """
    model = network.bind(params)
    rows, length = chunk.tokens.shape
    x = model.embed(chunk.tokens, chunk.is_patch, normalise(jnp.asarray(chunk.patches)), jnp.zeros((rows, length)), chunk.cell)
    slots = capacity(cache)
    here = jnp.arange(length, dtype=jnp.int32)[None] + slots
    real = here < slots + chunk.counts[:, None]
    mask = IntervalMask(
        context_start=jnp.zeros_like(chunk.read),
        context_end=jnp.where(real, cache.length[:, None], 0),
        block_start=jnp.where(real, slots, here),  # padding reads itself
        block_end=jnp.where(real, slots + chunk.read, here + 1),
    )
    hidden, own = model.stack(x, jnp.asarray(chunk.position), mask, cache.layers, keep=True)
    last = jnp.take_along_axis(hidden, jnp.maximum(chunk.counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return append(cache, own or (), jnp.asarray(chunk.counts)), model.text_logits(last)


def append(cache: Cache, own: tuple[KeyValue, ...], count: jax.Array) -> Cache:
    """Write the first `count[b]` of the new keys and values [b, h, t, .] behind each document's last slot."""
    rows, _, length = own[0].k.shape[:3]
    offset = jnp.arange(length, dtype=jnp.int32)[None]
    slots = jnp.where(offset < count[:, None], cache.length[:, None] + offset, capacity(cache))  # past the end: dropped
    row = jnp.arange(rows)[:, None]
    write = lambda old, new: old.at[row, :, slots].set(new.swapaxes(1, 2), mode="drop")
    return Cache(jax.tree.map(write, cache.layers, own), cache.length + count)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
