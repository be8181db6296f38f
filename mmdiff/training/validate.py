"""Validation on held-out rows: losses, text bits per byte, and the x-error on a fixed grid of noise levels.

    x_error(sigma) = sum |x_hat - x|^2 / sum |x|^2        over held-out images, with fixed noise

The x-error compares across predictions, losses, weightings and schedules, which the training loss does not.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config
from mmdiff.data.batches import Batches
from mmdiff.diffusion import prediction
from mmdiff.diffusion.schedule import time_of
from mmdiff.image_paths.base import image_path
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.parallel.mesh import place_rows
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.training.loss import Losses, corrupt, loss_sums, normalise

VALIDATED = {"x_error", "psnr", "text_bits_per_byte", "retrieval"}  # one of these is in the metrics of any validation
SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@functools.partial(jax.jit, static_argnames=("network", "diffusion"))
def measure(network: Network, diffusion: config.Diffusion, params: Any, rows: Rows, key: jax.Array, sigma: jax.Array):
    """Sums over one batch at one noise level: (Losses, squared x error, squared x)."""
    eps = jax.random.normal(key, rows.patches.shape, jnp.float32)
    u = jnp.where(rows.noised, time_of(sigma), 0.0)
    sums = loss_sums(network, diffusion, params, rows, u, eps)
    x = normalise(rows.patches)
    z, alpha, scale = corrupt(x, eps, u, diffusion)
    model = network.bind(params)
    hidden = model.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask)
    output = model.predict(hidden, rows.cell)
    x_hat = prediction.convert(output, z, alpha, scale, source=diffusion.prediction, target="x", clip=1e-4)
    noised = (rows.noised & rows.is_patch)[..., None]
    return sums, jnp.sum(jnp.where(noised, (x_hat - x) ** 2, 0)), jnp.sum(jnp.where(noised, x**2, 0))


def validate(
    network: Network | TokenizerNetwork,
    cfg: config.Config,
    params: Any,
    batches: Batches,
    rows: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Losses, `text_bits_per_byte` and `x_error` (mean over SIGMAS, and by level) on the first `rows` held-out rows; of
    tokenizers what mmdiff/tokenizers/validate.py says.

    `between` is called before each batch.
    """
    if isinstance(network, TokenizerNetwork):
        return network.validate(cfg, params, batches, rows, between)
    if cfg.layout.images != "denoised":
        return _validate_rest(network, cfg, params, batches, rows, between)
    nothing = jnp.zeros((), jnp.float32)
    totals, x_error = Losses(nothing, nothing, nothing, nothing), {s: np.zeros(2) for s in SIGMAS}
    text_bytes = 0
    for index, batch, added in _held_out(network, cfg, batches, rows, between):
        text_bytes += added
        for level, sigma in enumerate(SIGMAS):
            key = jax.random.fold_in(jax.random.key(index), level)
            sums, wrong, all_of = measure(network, cfg.diffusion, params, batch, key, jnp.float32(sigma))
            x_error[sigma] += np.asarray([wrong, all_of], np.float64)
            totals = jax.tree.map(jnp.add, totals, sums)
    # the image loss on this grid of levels is not the training loss, so it is not reported under such a name
    result = _about_text(totals, len(SIGMAS), text_bytes) if network.vocabulary_size else {}
    ratios = {sigma: wrong / max(all_of, 1e-9) for sigma, (wrong, all_of) in x_error.items()}
    result |= {f"x_error_{sigma:g}": float(ratio) for sigma, ratio in ratios.items()}
    result["x_error"] = float(np.mean(list(ratios.values())))
    return result


def _validate_rest(
    network: Network, cfg: config.Config, params: Any, batches: Batches, rows: int, between: Callable[[], None]
) -> dict[str, float]:
    """The same of a model that does not denoise: about the texts, and the image loss under the name that its path gives it."""
    path, nothing = image_path(cfg.layout), jnp.zeros((), jnp.float32)
    totals, text_bytes = Losses(nothing, nothing, nothing, nothing), 0
    for index, batch, added in _held_out(network, cfg, batches, rows, between):
        text_bytes += added
        for draw in range(path.VALIDATIONS):
            key = jax.random.fold_in(jax.random.key(index), draw)
            totals = jax.tree.map(jnp.add, totals, _losses(network, cfg, params, batch, key))
    result = _about_text(totals, path.VALIDATIONS, text_bytes)
    if float(totals.image_weight):
        name, unit = path.MEASURED
        result[name] = float(totals.image) / float(totals.image_weight) / unit
    return result


def _held_out(
    network: Network, cfg: config.Config, batches: Batches, rows: int, between: Callable[[], None]
) -> Iterator[tuple[int, Rows, int]]:
    """Number, rows and bytes of text of each batch of the first `rows` rows."""
    for index in range(max(1, min(rows, batches.rows_per_epoch()) // cfg.training.batch_size)):
        between()
        batch = batches.batch(index)
        text_bytes = _text_bytes(batches, batch)
        yield index, batch if network.mesh is None else place_rows(batch, network.mesh), text_bytes


@functools.partial(jax.jit, static_argnames=("network", "cfg"))
def _losses(network: Network, cfg: config.Config, params: Any, rows: Rows, key: jax.Array) -> Losses:
    path = image_path(cfg.layout)
    return path.losses(network, cfg, params, rows, *path.noise(network, cfg, rows, key))


def _about_text(totals: Losses, draws: int, text_bytes: int) -> dict[str, float]:
    """`totals` were added up over so many draws of noise, `text_bytes` over one."""
    bits = float(totals.text) / draws / math.log(2)
    loss = float(totals.text) / max(float(totals.text_weight), 1e-9)
    return {"validation_text_loss": loss, "text_bits_per_byte": bits / max(text_bytes, 1)}


def _text_bytes(batches: Batches, rows: Rows) -> int:
    """UTF-8 bytes of the texts that carry loss."""
    vocabulary = batches.vocabulary
    start, stop = vocabulary.text_range
    learnt = (rows.tokens >= start) & (rows.tokens < stop) & (rows.text_weight > 0)
    return len(vocabulary.decode(rows.tokens[learnt].tolist()).encode())
