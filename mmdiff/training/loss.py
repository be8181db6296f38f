"""The loss.

    z = alpha x + sigma eps                                u drawn per noised block, clean patches at u = 0
    text loss  = mean over weighted tokens of -log p(token_t | positions before t)                      (nats)
    image loss = mean over images of the mean over patches, copies, pixels and channels of the error in loss space
    loss       = text + image_scale * image

Few-step training (few_step.objective) changes the image loss alone: mmdiff/diffusion/few_step.py. Other image paths
(layout.images) have other image losses: mmdiff/image_paths/.

A batch without text or without images contributes zero to that term. Letters: b rows, t positions, p patch values,
v vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.data.vocabulary import text_start
from mmdiff.diffusion import guidance
from mmdiff.diffusion.few_step import step_errors
from mmdiff.diffusion.loss import image_error
from mmdiff.diffusion.schedule import make_schedule
from mmdiff.diffusion.times import sample_times
from mmdiff.layout import Rows, without_words
from mmdiff.models.network import Network

GOLDEN = 0.6180339887498949  # fractional part of the golden ratio
BALANCE = 0.01  # few-step errors of an image are divided by themselves plus this, so that none rules a batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """Sums over a batch and what to divide them by; sums of pieces of a batch add up."""

    text: jax.Array
    text_weight: jax.Array
    image: jax.Array
    image_weight: jax.Array


def normalise(patches: jax.Array) -> jax.Array:
    """uint8 to float32 in [-1, 1]."""
    return patches.astype(jnp.float32) / 127.5 - 1.0


def block_numbers(rows: Rows, key: jax.Array) -> jax.Array:
    """A number from (0, 1) for each noised block, float32 [b, t], the same at all its positions.

    They form a low-discrepancy sequence over the batch (a random start plus multiples of the golden ratio), which evens out
    how often each noise level is seen. Source: the idea of Kingma et al., VDM, arXiv 2107.00630, appendix I.1.
    """
    length = rows.tokens.shape[-1]
    starts = rows.noised & (rows.block_start == jnp.arange(length))
    rank = jnp.cumsum(starts.reshape(-1)).reshape(starts.shape)
    # float32 keeps rank * GOLDEN exact enough below a million blocks; the fraction is taken per batch anyway
    r = (jax.random.uniform(key) + (rank * GOLDEN) % 1.0) % 1.0
    # the whole block takes its first position's number
    return jnp.take_along_axis(jnp.clip(r, 1e-6, 1 - 1e-6), rows.block_start, axis=-1)


def block_times(rows: Rows, key: jax.Array, diffusion: config.Diffusion) -> jax.Array:
    """Noise time of each position, float32 [b, t]: one per noised block (of its `block_numbers`), 0 elsewhere."""
    u = sample_times(diffusion, block_numbers(rows, key))
    return jnp.where(rows.noised, jnp.minimum(u, rows.max_u), 0.0)


def block_steps(rows: Rows, u: jax.Array, key: jax.Array, cfg: config.Config) -> tuple[jax.Array, jax.Array]:
    """Times u and step lengths h, float32 [b, t], from the times of `block_times`; h is 0 where a block only denoises.

    A step lies between the block's time and another one, drawn independently: from the larger down to the smaller.
    """
    others, chances = jax.random.split(key)
    other = sample_times(cfg.diffusion, jnp.clip(jax.random.uniform(others, u.shape), 1e-6, 1 - 1e-6))
    chosen = jax.random.uniform(chances, u.shape) < cfg.few_step.share
    other, chosen = (jnp.take_along_axis(a, rows.block_start, axis=-1) for a in (other, chosen))
    other = jnp.minimum(other, rows.max_u)
    chosen = chosen & rows.noised
    return jnp.where(chosen, jnp.maximum(u, other), u), jnp.where(chosen, jnp.abs(u - other), 0.0)


def corrupt(x: jax.Array, eps: jax.Array, u: jax.Array, diffusion: config.Diffusion):
    """z = alpha x + sigma eps at the times u [b, t]; returns (z, alpha, sigma) with a trailing axis."""
    alpha, sigma = make_schedule(diffusion)(u[..., None])
    return alpha * x + sigma * eps, alpha, sigma


def loss_sums(network: Network, diffusion: config.Diffusion, params: Any, rows: Rows, u: jax.Array, eps: jax.Array) -> Losses:
    """Text and image loss of rows whose blocks are noised by `eps` [b, t, p] at times `u` [b, t]."""
    x = normalise(rows.patches)
    z, alpha, sigma = corrupt(x, eps, u, diffusion)
    model = network.bind(params)
    hidden = model.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask)
    error = image_error(model.predict(hidden, rows.cell), x, eps, alpha, sigma, diffusion)
    return _sums(network, diffusion, model, rows, hidden, error)


def few_step_sums(
    network: Network, cfg: config.Config, params: Any, rows: Rows, u: jax.Array, h: jax.Array, eps: jax.Array
) -> Losses:
    """The same with the error of steps of length h [b, t] (mmdiff/diffusion/few_step.py) in place of the image loss.

    With few_step.guidance the velocity to be learnt is the guided one, the worse one being the network's own without text.
    Source: MeanFlow, arXiv 2505.13447, section 4.2.
    """
    x = normalise(rows.patches)
    z, _, _ = corrupt(x, eps, u, cfg.diffusion)
    model = network.bind(params)
    divisor = lambda u: jnp.maximum(u, cfg.diffusion.clip)[..., None]

    def average(z, u, h, rows=rows):
        hidden = model.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask, step=h)
        return (z - model.predict(hidden, rows.cell)) / divisor(u), hidden

    truth = (z - x) / divisor(u)
    if cfg.few_step.guidance != 1:
        textless, order = without_words(rows, text_start(cfg.layout.max_grid))
        moved = jnp.take_along_axis(z, order[..., None], axis=1), jnp.take_along_axis(u, order, axis=1)
        there = average(*moved, jnp.zeros_like(u), textless)[0]
        worse = jnp.take_along_axis(there, jnp.argsort(order, axis=-1)[..., None], axis=1)
        acts = guidance.inside(u / (1 - u), cfg.few_step.guidance_interval)[..., None]
        truth = jnp.where(acts, guidance.guided(truth, jax.lax.stop_gradient(worse), cfg.few_step.guidance), truth)
    error, hidden = step_errors(cfg.few_step.objective, average, z, u, h, truth, rows.noised)
    if cfg.few_step.objective != "shortcut":  # whose error vanishes where it agrees with itself, and would then rule
        error = error / (jax.lax.stop_gradient(block_mean(rows, error)) + BALANCE)
    return _sums(network, cfg.diffusion, model, rows, hidden, error)


def block_mean(rows: Rows, values: jax.Array) -> jax.Array:
    """The mean of `values` [b, t] over the noised block that each position belongs to."""
    row = jnp.arange(len(values))[:, None]
    at_start = lambda a: jnp.zeros_like(values).at[row, rows.block_start].add(jnp.where(rows.noised, a, 0.0))
    mean = at_start(values) / jnp.maximum(at_start(jnp.ones_like(values)), 1.0)
    return jnp.take_along_axis(mean, rows.block_start, axis=-1)


def _sums(network: Network, diffusion: config.Diffusion, model, rows: Rows, hidden: jax.Array, error: jax.Array) -> Losses:
    """Losses from the final hidden states and the error of each patch [b, t]."""
    nats = text_nats(network, model, rows, hidden)
    image_weight = rows.image_weight
    if diffusion.reduction == "sum":  # over the patches of an image too; the copies of one image are still averaged
        copies = jnp.maximum(1.0, jnp.round(1.0 / jnp.maximum(image_weight * _patch_count(rows), 1e-9)))
        error = error * jnp.where(rows.noised, 1.0 / jnp.maximum(image_weight * copies, 1e-9), 0.0)
    return sums(rows, nats, jnp.where(rows.noised, error, 0.0))


def text_nats(network: Network, model, rows: Rows, hidden: jax.Array) -> jax.Array:
    """-log probability of each position's token from the hidden states [b, t, d] before it, float32 [b, t]; the first is 0."""
    if not network.vocabulary_size:
        return jnp.zeros(rows.tokens.shape)
    following = jnp.roll(rows.tokens, -1, axis=1)  # the first token comes round to the last, where nothing is asked
    return jnp.pad(model.text_nats(hidden, following)[:, :-1], ((0, 0), (1, 0)))


def sums(rows: Rows, nats: jax.Array, error: jax.Array) -> Losses:
    """Losses from the nats of each token and the error of each position of an image, both [b, t]."""
    return Losses(
        text=jnp.sum(nats * rows.text_weight),
        text_weight=jnp.sum(rows.text_weight[:, 1:]),
        image=jnp.sum(error * rows.image_weight),
        image_weight=jnp.sum(rows.image_weight),
    )


def _patch_count(rows: Rows) -> jax.Array:
    return (rows.cell[..., 2] * rows.cell[..., 3]).astype(jnp.float32)


def combine(losses: Losses, diffusion: config.Diffusion) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums to (loss, metrics)."""
    text = losses.text / jnp.maximum(losses.text_weight, 1e-9)
    image = losses.image / jnp.maximum(losses.image_weight, 1e-9)
    loss = text + diffusion.image_scale * image
    return loss, {"loss": loss, "text_loss": text, "image_loss": image}
