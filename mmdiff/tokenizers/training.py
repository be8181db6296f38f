"""What a tokenizer learns: to give back the image, through its codes.

    z = encode(x);   q = quantise(z);   x_hat = decode(q)
    (1) error      = mean over pixels and channels of (x_hat - x)^2, or |x_hat - x|
    (2) loss       = error + quantizer's own terms + perceptual * distance + adversarial * weight * fool + judge

`perceptual`, `weight`, `fool` and `judge` are in mmdiff/tokenizers/discriminator.py; the last three count from step
`adversarial_start` on. Halves and discriminator take their steps together: what `judge` says to the discriminator and `fool`
to the decoder does not reach the other. Codebooks are updated with the whole batch, after the guard, and are
their own moving average.

Padding counts for nothing. Letters: n images.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mmdiff import config
from mmdiff.layout import Rows
from mmdiff.tokenizers.discriminator import balance, judged, perceptual, read_vgg
from mmdiff.tokenizers.network import UNTRAINED, Bound, Objective, TokenizerNetwork
from mmdiff.tokenizers.quantizers.base import Learning
from mmdiff.training.guard import apply_guarded
from mmdiff.training.state import TrainState

PURPOSE = 3  # of random numbers, beside those of training/step.py
LAST_TENTH = 0.9  # of the training: no code starts anew after it


class Parts(NamedTuple):
    """Terms of the loss, each a mean over images."""

    error: jax.Array
    quantizer: jax.Array
    perceptual: jax.Array
    fool: jax.Array
    judge: jax.Array


def losses(
    network: TokenizerNetwork,
    params: Any,
    images: jax.Array,
    weight: jax.Array,
    *,
    key: jax.Array | None = None,
    adversarial: jax.Array | float = 0.0,
    restart: jax.Array | bool = True,
    weights=None,
) -> tuple[jax.Array, tuple[Parts, Any]]:
    """Equation (2) of images [n, h, w, 3] that count as `weight` [n] says.

    Args:
      key: of dead codes' new starts. adversarial: weight of the discriminator now. weights: of VGG-16, or None.
    Returns:
      the loss, its parts and the codebook after this batch.
    """
    settings, model = network.tokenizer, network.bind(params)
    total = jnp.maximum(weight.sum(), 1e-9)
    mean = lambda per_image: jnp.sum(per_image * weight) / total
    z = model.encode(images)
    counts = jnp.broadcast_to(weight[:, None], z.shape[:2])
    quantised = model.quantise(z, Learning(key, counts, restart))
    features = model.module.decoder.features(quantised.codes)
    made = model.module.decoder.pixels(features)

    def fidelity(made: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        error = mean(image_error(settings.error, made, images))
        distance = mean(perceptual(weights, images, made)) if weights is not None else jnp.zeros(())
        return error + settings.perceptual * distance, (error, distance)

    if not settings.adversarial:
        loss, (error, distance) = fidelity(made)
        parts = Parts(error, quantised.loss, distance, jnp.zeros(()), jnp.zeros(()))
        return loss + quantised.loss, (parts, quantised.state)
    discriminator = model.module.discriminator
    fooled = lambda made: -mean(discriminator(made).reshape(len(made), -1).mean(-1))
    still = jax.lax.stop_gradient(made)
    (_, (error, distance)), towards = jax.value_and_grad(fidelity, has_aux=True)(still)
    fool, against = jax.value_and_grad(fooled)(still)
    _, pull_back = jax.vjp(*_last_layer(model, jax.lax.stop_gradient(features)))
    scale = adversarial * balance(pull_back(towards)[0], pull_back(against)[0])
    # a loss whose gradient at the image is the one wanted, without going through the discriminator's parameters
    direction = jax.lax.stop_gradient(towards + scale * against)
    pulled = jnp.sum(direction * made)
    judge = mean(judged(discriminator(images), discriminator(still))) * (adversarial > 0)
    value = error + settings.perceptual * distance + scale * fool
    loss = jax.lax.stop_gradient(value - pulled) + pulled + quantised.loss + judge
    return loss, (Parts(error, quantised.loss, distance, fool, judge), quantised.state)


def image_error(kind: str, made: jax.Array, images: jax.Array) -> jax.Array:
    """Equation (1) for each image, [n]."""
    apart = jnp.abs(made - images) if kind == "l1" else jnp.square(made - images)
    return apart.reshape(len(apart), -1).mean(-1)


def _last_layer(model: Bound, features: jax.Array):
    """Images as a function of the parameters of the decoder's last layer, and these parameters."""
    decoder = model.module.decoder
    graph, params = nnx.split(decoder.out)
    return lambda params: decoder.pixels(features, nnx.merge(graph, params)), params


def objective(network: TokenizerNetwork, cfg: config.Config) -> Objective:
    """Equation (2) as `TokenizerNetwork.objective`."""
    settings, last = cfg.tokenizer, LAST_TENTH * cfg.training.steps
    weights = read_vgg(Path(settings.perceptual_weights)) if settings.perceptual else None

    def loss_of(params: Any, rows: Rows, key: jax.Array, step: jax.Array):
        images, weight = network.images(rows)
        now = settings.adversarial * (step >= settings.adversarial_start)
        loss, (parts, codebook) = losses(
            network, params, images, weight, key=key, adversarial=now, restart=step < last, weights=weights
        )
        metrics = {"image_loss": parts.error, "quantizer_loss": parts.quantizer}
        if settings.adversarial:
            metrics |= {"fool": parts.fool, "judge": parts.judge}
        if settings.perceptual:
            metrics |= {"perceptual": parts.perceptual}
        return loss, (metrics, codebook)

    return loss_of


def make_tokenizer_step(
    network: TokenizerNetwork, cfg: config.Config, tx: optax.GradientTransformation
) -> Callable[[TrainState, Rows], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure step `(state, rows) -> (state, metrics)`."""
    grad_of = jax.value_and_grad(network.objective(cfg), has_aux=True)

    def train_step(state: TrainState, rows: Rows):
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), PURPOSE)
        (loss, (metrics, codebook)), grads = grad_of(state.params, rows, key, state.step)
        before = state
        state, guarded = apply_guarded(state, grads, loss, tx, cfg.training.ema, cfg.training.ema_start)
        good = guarded["skips"] == 0
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), codebook, before.params[UNTRAINED])
        still = lambda params: {name: params[name] for name in network.frozen}
        state = dataclasses.replace(
            state,
            params=state.params | still(before.params) | {UNTRAINED: kept},
            ema=state.ema | still(before.ema) | {UNTRAINED: jax.tree.map(jnp.copy, kept)},
        )
        return state, {"loss": loss} | metrics | guarded

    return train_step


def trained_alone(tx: optax.GradientTransformation, network: TokenizerNetwork) -> optax.GradientTransformation:
    """`tx` without room for the frozen parts of a tokenizer."""
    if not network.frozen:
        return tx
    return optax.masked(tx, lambda params: {name: name not in network.frozen for name in params})
