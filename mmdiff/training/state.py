"""Everything a run carries from one step to the next, and the moving average of its parameters.

    ema <- d ema + (1 - d) params,    d = min(decay, (1 + t) / (10 + t))

The warm-up of d lets the average forget the random start: it starts as a copy of the parameters, and early steps weigh
as much as they are worth.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


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


def create(params: Any, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. No two leaves share a buffer, so a jitted step may donate all of it."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(lambda p: jnp.array(p, copy=True), params),
        opt_state=tx.init(params),
        key=jax.random.key(seed),
        skips=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """The average after the update of step t = `step` (counted from 0), in float32."""
    t = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p.astype(jnp.float32), ema, params)
