"""Attention as TPU kernels, under the same interval masks. Equations and letters: attention_tiled.py.

Three kernels (attention_kernels.py): forward, dq, and dk with dv. Which tiles are visited is a list computed outside
(`list_visits`) and read by the index maps, so a tile that no query needs costs neither arithmetic nor a copy. The grid is as
long as the longest list of the batch; shorter lists repeat their last entry, which copies nothing, and compute nothing.

Wide values (a gated attention unit has e = 2 d in its one head) come in slices: the forward pass makes a round for each
slice, recomputing the scores; the backward passes add g . v up over the slices before (5). `choose_sizes` takes the
largest blocks that fit VMEM by the account of `vmem_bytes`.

A kernel is opaque to the partitioner: with several devices, wrap the call in `jax.shard_map` over rows and heads.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmdiff.layout import IntervalMask
from mmdiff.nn.attention_kernels import HIGH, Visits, dkv_kernel, dq_kernel, forward_kernel
from mmdiff.nn.attention_tiled import Passes, needed_first, needed_tiles, tiled_attention

LANES = 128
BLOCK = 512  # positions of the largest block; rows are filled up to a multiple of it
SLICE = 1024  # values of the largest slice
VMEM_LIMIT = 15 * 2**20  # of the 16 MiB that a kernel gets by default
SMEM_LIMIT = 2**18  # bytes of the lists of visits; a core has 1 MiB
TILES_IN_FLIGHT = 2  # intermediate arrays of a tile's size that the compiler keeps
MASK_ROWS = 8  # the four vectors and four rows of zeros: what one register tile holds
FLOAT, INT = jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)

Kernel = Literal["forward", "dq", "dkv"]
KERNELS: dict[Kernel, Callable[..., None]] = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}


class Sizes(NamedTuple):
    """Positions in a block of queries and in a block of keys, and values in a slice."""

    queries: int
    keys: int
    values: int


class Block(NamedTuple):
    """An array of which a grid step sees one block; `axes` names what its index on each axis is."""

    shape: tuple[int, ...]
    axes: str
    dtype: jnp.dtype


def pallas_attention(q, k, v, mask: IntervalMask, *, scale: float, block: int = BLOCK, interpret: bool = False) -> jax.Array:
    """Attend under `mask`: q [b, h, t, c], k [b, h, s, c], v [b, h, s, e], mask vectors [b, t], to [b, h, t, e].

    Args:
      block: positions of the largest block, a multiple of 128.
      interpret: run the kernels as plain JAX, on any backend.
    Raises:
      ValueError: the kernels cannot take these arrays; the message says why.
    """
    if reason := unsupported(q, k, v, block):
        raise ValueError(f"attention 'pallas' {reason}; use 'blockwise'.")
    return tiled_attention(passes(block, interpret), q, k, v, mask, scale=scale, block=(block, block))


def unsupported(q, k, v, block: int = BLOCK) -> str | None:
    """Why the kernels cannot take these arrays, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"takes float32 or bfloat16 throughout, not {q.dtype}, {k.dtype}, {v.dtype}"
    width, values = q.shape[-1], v.shape[-1]
    if values > SLICE and values % LANES:
        return f"takes at most {SLICE} values in a head or a multiple of {LANES}, not {values}"
    try:
        chosen = [choose_sizes(kernel, width, values, q.dtype, block) for kernel in KERNELS]
    except ValueError as error:
        return str(error)
    tiles = max(-(-q.shape[2] // size.queries) * -(-k.shape[2] // size.keys) for size in chosen)
    if 4 * q.shape[0] * tiles > SMEM_LIMIT:
        return f"cannot hold {q.shape[0]} lists of {tiles} visits in {SMEM_LIMIT} bytes of SMEM"
    return None


@functools.cache
def passes(block: int, interpret: bool) -> Passes:
    return Passes(*(functools.partial(run, block=block, interpret=interpret) for run in (forward, backward)))


def forward(q, k, v, mask: IntervalMask, *, block: int, interpret: bool):
    """Out [b, h, t, e] and lse [b, h, t]."""
    out, lse = _call("forward", (q, k, v, _mask_rows(mask)), mask, block, interpret)
    return out, lse[:, :, 0]


def backward(q, k, v, mask: IntervalMask, lse, delta, g, *, block: int, interpret: bool):
    """Dq, dk, dv, without the scale that `q` carries."""
    inputs = q, k, v, _mask_rows(mask), lse[:, :, None], delta[:, :, None], g
    (dq,) = _call("dq", inputs, mask, block, interpret)
    return dq, *_call("dkv", inputs, mask, block, interpret)


def _mask_rows(mask: IntervalMask) -> jax.Array:
    """int32 [b, 8, t]."""
    rows = jnp.stack(mask, axis=1)
    return jnp.pad(rows, ((0, 0), (0, MASK_ROWS - rows.shape[1]), (0, 0)))


def list_visits(needed) -> Visits:
    """Needed tiles bool [b, staying, passing] as lists of visits; every staying block gets one, so that it is written."""
    needed = needed.at[..., 0].set(needed[..., 0] | ~needed.any(axis=-1))
    order, count = needed_first(needed.reshape(needed.shape[0], -1))
    last = jnp.take_along_axis(order, count[:, None] - 1, axis=1)
    order = jnp.where(jnp.arange(order.shape[1]) < count[:, None], order, last)
    staying, passing = jnp.divmod(order, needed.shape[2])
    return Visits(staying << HIGH | passing, count)


def _call(kernel: Kernel, arrays: Sequence[jax.Array], mask: IntervalMask, block: int, interpret: bool):
    q, _, v, *_ = arrays
    rows, heads, length, width = q.shape
    keys, values = v.shape[2:]
    sizes = choose_sizes(kernel, width, values, q.dtype, block)
    inputs, outputs, scratch = blocks(kernel, sizes, width, values, q.dtype)
    needed = needed_tiles(mask, keys, sizes[:2])
    visits = list_visits(needed.swapaxes(1, 2) if kernel == "dkv" else needed)
    whole = {"b": rows, "h": heads, "q": length, "k": keys, "x": values, "e": values, "c": width, "1": 1, "8": MASK_ROWS}

    def spec(part: Block) -> pl.BlockSpec:
        def index(b, h, *rest):
            (x, n), visits = (rest[:2] if kernel == "forward" else rest[1::-1]), Visits(*rest[2:])
            staying, passing = visits.staying(b, n), visits.passing(b, n)
            query, key = (passing, staying) if kernel == "dkv" else (staying, passing)
            at = {"b": b, "h": h, "q": query, "k": key, "x": x}
            return tuple(at.get(axis, 0) for axis in part.axes)

        lead = len(part.axes) - 2
        return pl.BlockSpec((None,) * lead + part.shape, index)

    def result(part: Block) -> jax.ShapeDtypeStruct:
        shape = tuple(whole[axis] for axis in part.axes)
        return jax.ShapeDtypeStruct(shape, part.dtype, manual_axis_type=jax.typeof(q).manual_axis_type)  # for shard_map

    steps, slices = visits.count.max(), values // sizes.values
    call = pl.pallas_call(
        KERNELS[kernel],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, heads, slices, steps) if kernel == "forward" else (rows, heads, steps, slices),
            in_specs=[spec(part) for part in inputs],
            out_specs=[spec(part) for part in outputs],
            scratch_shapes=[pltpu.VMEM(part.shape, part.dtype) for part in scratch],
        ),
        out_shape=[result(part) for part in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name=f"attention_{kernel}",
    )
    return call(*visits, *arrays)


def blocks(kernel: Kernel, sizes: Sizes, width: int, values: int, dtype) -> tuple[list[Block], list[Block], list[Block]]:
    """What a grid step holds: blocks of the inputs, of the outputs, and scratch."""
    queries, keys, part = sizes
    q, k = Block((queries, width), "bhqc", dtype), Block((keys, width), "bhkc", dtype)
    v, mask = Block((keys, part), "bhkx", dtype), Block((MASK_ROWS, queries), "b8q", INT)
    row, g = Block((1, queries), "bh1q", FLOAT), Block((queries, part), "bhqx", dtype)
    scratch = lambda *shape: Block(shape, "", FLOAT)
    if kernel == "forward":
        return [q, k, v, mask], [g, row], [scratch(1, queries), scratch(1, queries), scratch(part, queries)]
    inputs, tiles = [q, k, v, mask, row, row, g], [scratch(keys, queries), scratch(keys, queries)]
    if kernel == "dq":
        return inputs, [q], [*tiles, scratch(width, queries)]
    dv = Block((keys, values), "bhke", dtype)
    return inputs, [k, dv], [*tiles, scratch(keys, width), scratch(values // part, keys, part)]


def vmem_bytes(kernel: Kernel, sizes: Sizes, width: int, values: int, dtype) -> int:
    """VMEM of one kernel: blocks of inputs and outputs twice (the next is copied meanwhile), scratch, a tile in flight."""

    def padded(part: Block) -> int:
        *lead, sublanes, lanes = part.shape
        register = 32 // part.dtype.itemsize  # sublanes that share a register
        return math.prod(lead) * (-(-sublanes // register) * register) * (-(-lanes // LANES) * LANES) * part.dtype.itemsize

    inputs, outputs, scratch = blocks(kernel, sizes, width, values, jnp.dtype(dtype))
    tile = sizes.queries * sizes.keys * FLOAT.itemsize
    return 2 * sum(map(padded, inputs + outputs)) + sum(map(padded, scratch)) + TILES_IN_FLIGHT * tile


@functools.cache
def choose_sizes(kernel: Kernel, width: int, values: int, dtype, block: int = BLOCK) -> Sizes:
    """The sizes of the largest grid step that fits VMEM_LIMIT.

    Raises:
      ValueError: none fits.
    """
    lengths = [block >> i for i in range(3) if (block >> i) % LANES == 0]
    slices = [values] if values <= SLICE else []
    slices += [size for size in range(LANES, min(values, SLICE) + 1, LANES) if values % size == 0]
    every = [Sizes(*sizes) for sizes in itertools.product(lengths, lengths, slices)]
    fitting = [sizes for sizes in every if vmem_bytes(kernel, sizes, width, values, dtype) <= VMEM_LIMIT]
    if not fitting:
        raise ValueError(f"needs more than {VMEM_LIMIT} bytes of VMEM for heads of {width} and {values} in {dtype}")
    return max(fitting, key=math.prod)
