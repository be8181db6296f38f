"""A step whose loss or gradient is not finite changes nothing but the counters.

    ok = isfinite(loss) and isfinite(|grads|)        |.| the global L2 norm, before clipping

`optax.apply_if_finite` is no substitute: after its `max_consecutive_errors` it applies the non-finite update and the
parameters are lost. Here a bad update is never applied; the loop stops the run (`check_diverged`) with the last good
parameters still in the state. What is skipped is the whole update, the moving average and the optimiser's step count
included, so the learning rate in use is `schedule(state.step - state.skipped)`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmdiff.training.state import TrainState, update_ema


class Diverged(RuntimeError):
    """Too many steps in a row had no finite loss and gradient."""


def apply_guarded(
    state: TrainState,
    grads: Any,
    loss: jax.Array,
    tx: optax.GradientTransformation,
    ema_decay: float,
    ema_start: str = "ramp",
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update, or none if `loss` (any shape) or the gradient norm is not finite.

    Parts of the parameters without gradients are frozen: no update, no weight decay and no average touches them. Pure
    and jittable. A finite gradient whose float32 norm overflows counts as not finite.

    Returns:
      the next state, and float32 [] `grad_norm` (before clipping) with int32 [] `skips` and `skipped`.
    """
    norm = optax.tree.norm(grads)
    ok = jnp.isfinite(norm) & jnp.all(jnp.isfinite(loss))
    own, average = (_trained(tree, grads) for tree in (state.params, state.ema))
    updates, opt_state = tx.update(grads, state.opt_state, own)
    params = optax.apply_updates(own, updates)
    ema = update_ema(average, params, ema_decay, state.step, ema_start)

    def choose(new, old):  # a select fuses with the update; lax.cond would copy both trees
        return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)

    skips = jnp.where(ok, 0, state.skips + 1)
    skipped = state.skipped + jnp.where(ok, 0, 1)
    state = dataclasses.replace(
        state,
        step=state.step + 1,  # always: the step names the batch, and a bad batch must not come again
        params=_joined(state.params, choose(params, own)),
        ema=_joined(state.ema, choose(ema, average)),
        opt_state=choose(opt_state, state.opt_state),
        skips=skips,
        skipped=skipped,
    )
    return state, {"grad_norm": norm, "skips": skips, "skipped": skipped}


def _trained(tree: Any, grads: Any) -> Any:
    return {name: tree[name] for name in grads} if isinstance(grads, dict) else tree


def _joined(tree: Any, trained: Any) -> Any:
    return tree | trained if isinstance(trained, dict) else trained


def check_diverged(skips: int, max_skips: int, step: int) -> None:
    """Called by the loop with host values.

    Raises:
      Diverged: `skips` has reached `max_skips`.
    """
    if skips >= max_skips:
        raise Diverged(
            f"step {step}: no finite loss and gradient for {skips} steps in a row; none of them was applied. "
            "Lower optimizer.learning_rate, or raise optimizer.warmup."
        )
