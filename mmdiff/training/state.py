"""Everything a run carries from one step to the next: the moving average of its parameters, and its fingerprints.

    (1) ema <- d ema + (1 - d) params,    d = min(decay, (1 + t) / (10 + t))                                  "ramp"
                                          d = (decay - decay^(t+1)) / (1 - decay^(t+1))                       "zero"

The average starts as a copy of the parameters; the warm-up of d lets it forget that random start. With "zero" it is, after
every update, the average of constant decay that starts at zero, divided by 1 - decay^(t+1) for what that lacks.

The fingerprint of an array with the 32-bit words w_i, i = 0, 1, ... in row-major order, is the sum modulo 2^32

    (2) sum_i mix(w_i xor mix(i + 1))            mix: the bijective finaliser of MurmurHash3

A change of one word always shows, any other change with probability 1 - 2^-32. It is computed where the array lives, and
a sum of integers does not depend on how the array is sharded.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from mmdiff.parallel.sharding import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree; `dataclasses.replace` makes the next one.

    step: int32 [], steps taken, skipped ones included; also the index of the next batch.
    params, ema: nested dicts of float32 arrays.
    opt_state: of the optax transformation; steps whose update was skipped leave it as it was.
    key: typed PRNG key []; never changes. Step t draws from `fold_in(key, t)`.
    skips: int32 [], skipped steps in a row. skipped: int32 [], in total.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    key: jax.Array
    skips: jax.Array
    skipped: jax.Array


def create(params: Any, tx: optax.GradientTransformation, seed: int, frozen: Collection[str] = ()) -> TrainState:
    """The state before the first step. No two leaves share a buffer, so a jitted step may donate all of it.

    `frozen`: parts of the parameters that never change, which the optimiser does not know.
    """
    trained = {name: part for name, part in params.items() if name not in frozen} if frozen else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(lambda p: jnp.array(p, copy=True), params),
        opt_state=tx.init(trained),
        key=jax.random.key(seed),
        skips=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )


def shardings(state: TrainState, axes: Any, mesh: Mesh) -> TrainState:
    """Where each leaf of the state lives: a NamedSharding for every array.

    Args:
      state: arrays or ShapeDtypeStructs.
      axes: names of every parameter's axes (Network.axes). The moving average and whatever of the optimiser's state has
        a parameter's path and shape lie as that parameter does; all else is whole on every device.
    """
    place = Placement(mesh)
    named = named_leaves(axes, is_leaf=lambda leaf: type(leaf) is tuple)

    def where(path: str, leaf) -> NamedSharding:
        inside = path.split("/")
        tails = ("/".join(inside[i:]) for i in range(len(inside)))
        names = next((named[tail] for tail in tails if tail in named), ())
        return place.sharding(leaf.shape, names if len(names) == len(leaf.shape) else (None,) * len(leaf.shape))

    leaves = [where(path, leaf) for path, leaf in named_leaves(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array, start: str = "ramp") -> Any:
    """The average after the update of step t = `step` (counted from 0), in float32; `start`: equation (1)."""
    t = jnp.asarray(step, jnp.float32)
    if start == "zero":
        left = -jnp.expm1((t + 1) * math.log(decay)) if decay > 0 else jnp.ones(())  # 1 - decay^(t+1)
        d = jnp.where(t > 0, 1 - (1 - jnp.float32(decay)) / left, 0.0)
    else:
        d = jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p.astype(jnp.float32), ema, params)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{path: leaf} in the order of the tree; paths as in `params/blocks/in/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def is_key(leaf: Any) -> bool:
    """Whether an array (or ShapeDtypeStruct) holds typed PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def fingerprint(x: jax.Array) -> int:
    """Equation (2), of any integer, float, bool or PRNG key array: equal for equal bits, wherever it is stored."""
    return int(np.asarray(_fingerprint(jax.random.key_data(x) if is_key(x) else x)))


@jax.jit
def _fingerprint(x):
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)  # 8-byte types gain an axis of 2 words
    index = jnp.ones((), jnp.uint32)  # row-major index + 1; no reshape, which would gather a sharded array
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        index = index + stride * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)


def _mix(h):
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
