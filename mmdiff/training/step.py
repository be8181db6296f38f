"""The training step: the loss of a batch (mmdiff/image_paths/ says which), its gradient, the guarded update.

Everything is a pure function of (params, rows, key): noise is drawn with global shapes from `fold_in(key, step)` and a named
purpose, so results do not depend on the number of devices.
"""

import ctypes
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mmdiff import config
from mmdiff.image_paths.base import image_path
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.tokenizers.training import make_tokenizer_step
from mmdiff.training.guard import apply_guarded
from mmdiff.training.loss import Losses, combine
from mmdiff.training.state import TrainState


def compile_train_step(
    network: Network | TokenizerNetwork,
    cfg: config.Config,
    tx: optax.GradientTransformation,
    state: TrainState,
    rows: Rows,
) -> jax.stages.Compiled:
    """`make_train_step` compiled for these arguments (arrays or ShapeDtypeStructs); the state is donated."""
    stays = None
    if network.mesh is not None:
        stays = (jax.tree.map(lambda leaf: leaf.sharding, state), None)
    compiled = jax.jit(make_train_step(network, cfg, tx), donate_argnums=0, out_shardings=stays).lower(state, rows).compile()
    if sys.platform == "linux":
        # glibc keeps what the compiler has freed, some 300 MB, unless asked
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return compiled


def make_train_step(
    network: Network | TokenizerNetwork, cfg: config.Config, tx: optax.GradientTransformation
) -> Callable[[TrainState, Rows], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure step `(state, rows) -> (state, metrics)`; jit it with the state donated.

    With `training.accumulate` = n the batch is worked through in n pieces whose gradients add up to exactly the
    gradient of the whole batch: every piece is divided by the weights of the whole batch.
    """
    if isinstance(network, TokenizerNetwork):
        return make_tokenizer_step(network, cfg, tx)
    pieces, diffusion, path = cfg.training.accumulate, cfg.diffusion, image_path(cfg.layout)

    def train_step(state: TrainState, rows: Rows):
        noise = path.noise(network, cfg, rows, jax.random.fold_in(state.key, state.step))
        text_weight = jnp.maximum(rows.text_weight[:, 1:].sum(), 1e-9)
        image_weight = jnp.maximum(rows.image_weight.sum(), 1e-9)

        # cut into layers once, not once per piece
        params = dict(network.separate(state.params) if network.unrolled else state.params)
        frozen = {name: params.pop(name) for name in network.frozen}

        def loss_of(params, piece):
            sums = path.losses(network, cfg, params | frozen, *piece)
            return sums.text / text_weight + diffusion.image_scale * sums.image / image_weight, sums

        grad_of = jax.value_and_grad(loss_of, has_aux=True)
        if pieces == 1:
            (_, sums), grads = grad_of(params, (rows, *noise))
        else:

            def cut(a):  # piece i takes rows i, i + n, ...: a batch split over devices stays split
                a = a.reshape(-1, pieces, *a.shape[1:]).swapaxes(0, 1)
                return network.place(a, None, "rows", *[None] * (a.ndim - 2))

            split = jax.tree.map(cut, (rows, *noise))

            def add(total, piece):
                (_, sums), grads = grad_of(params, piece)
                return jax.tree.map(jnp.add, total, (sums, network.stored(grads))), None

            zero = network.stored(jax.tree.map(jnp.zeros_like, params))
            nothing = jnp.zeros((), jnp.float32)
            (sums, grads), _ = jax.lax.scan(add, (Losses(nothing, nothing, nothing, nothing), zero), split)
        loss, metrics = combine(sums, diffusion)
        grads = network.stored(network.restack(grads))
        state, guarded = apply_guarded(state, grads, loss, tx, cfg.training.ema, cfg.training.ema_start)
        return state, metrics | guarded

    return train_step
