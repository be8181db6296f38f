"""Likelihoods of documents: nats per byte of text, and a bound on the bits per channel value of images.

Text counts every text token, given all that stands before it; structure ([IMG], sizes, [/IMG], [EOS]) does not count.

Images count given what stands before them. With X = x + sigma eps, x in [-1, 1] in D channel values, and the log
signal-to-noise ratio eta = -2 log sigma, the variational bound of a diffusion model that starts at sigma_max and
stops at sigma_min is, in nats,

    (1) L(sigma_min) = prior + diffusion + reconstruction  >=  -log p(x)
    (2) prior          = KL(q(X_max | x) || N(0, sigma_max^2)) = |x|^2 / (2 sigma_max^2)
    (3) diffusion      = 1/2 int E |x - x_hat(X, sigma)|^2 / sigma^2 d eta,  eta from that of sigma_max to sigma_min
    (4) reconstruction = E -log softmax_k( -(X - level_k)^2 / (2 sigma_min^2) ) at x, over the 256 levels of uint8

(3) is a midpoint sum over a fixed grid of cells uniform in eta, with fixed noise; (4) depends on the level alone, so
its expectation is a table, by Gauss-Hermite quadrature. Where to stop is part of the model: a uniform mixture over the
cells' K edges, whose bound is

    (5) -log p(x) <= min over edges of L(sigma_min) + log K

so a network that is poor at little noise pays at most what coding those bits outright costs (8 bits in all). An
undertrained model therefore scores close to 8 bits per channel value, not hundreds.

Letters: b documents, t positions, p patch values.
Source: Kingma et al., Variational Diffusion Models, arXiv 2107.00630, equations 11 to 18.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config
from mmdiff.diffusion import prediction
from mmdiff.diffusion.schedule import time_of
from mmdiff.document import Document
from mmdiff.image_paths.next_pixel import pixel_nats
from mmdiff.layout import Rows, lay_out, learnt_images, pack, plan_images, stack, text_pieces
from mmdiff.models.network import Network
from mmdiff.training.loss import corrupt, normalise

GROUP = 16  # documents per call of the network
LENGTH_BUCKET = 64
LEVELS = np.arange(256) / 127.5 - 1.0
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(32)


class Grid(NamedTuple):
    """Noise levels of the bound, decreasing."""

    edges: np.ndarray  # float64 [n + 1]: where the process may stop
    middles: np.ndarray  # float64 [n]: where the network is asked
    width: float  # of a cell, in eta


def make_grid(levels: int, sigma_max: float = 80.0, sigma_min: float = 0.002) -> Grid:
    """`levels` cells of equal width in log sigma; sigma_min is the lowest level at which the process may stop."""
    edges = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), levels + 1))
    return Grid(edges, np.sqrt(edges[1:] * edges[:-1]), 2 * math.log(sigma_max / sigma_min) / levels)


def score(model, documents: Sequence[Document], *, levels: int = 32, seed: int = 0) -> list[dict[str, float]]:
    """Likelihoods of each document; a key is absent when the document has nothing of the kind.

    Args:
      model: as `mmdiff.load` returns it.
      documents: texts and images in any order; every one of them counts, whatever its `learn` says.
      levels: noise levels at which the network is asked; the error of the sum falls with their square.
      seed: of the noise, which is the same for every document.
    Returns:
      `text_nats_per_byte`, `text_bits_per_byte` (per UTF-8 byte) and `image_bits_per_dim` (bound (5), over all images
      of the document together, per pixel and channel). With layout.images="next_pixel" that is no bound but the likelihood;
      with "next_code" there is `image_code_bits` in its place, of all codes of the document; with others nothing of images.
    Raises:
      DataError, ConfigError: a document that cannot be laid out.
    """
    grid = make_grid(levels)
    results: list[dict[str, float]] = []
    for start in range(0, len(documents), GROUP):
        results += _score_group(model, documents[start : start + GROUP], grid, seed)
    return results


def image_bound(error: np.ndarray, pixels: np.ndarray, grid: Grid) -> float:
    """Bound (5) in nats.

    Args:
      error: [n], estimates of E |x - x_hat|^2 at the middles of the grid, summed over the channel values.
      pixels: uint8, any shape: the channel values.
    """
    x = LEVELS[pixels]
    prior = np.sum(x**2) / (2 * grid.edges[0] ** 2)
    cells = 0.5 * np.asarray(error, np.float64) / grid.middles**2 * grid.width
    diffusion = np.concatenate([[0.0], np.cumsum(cells)])
    counts = np.bincount(pixels.reshape(-1), minlength=256)
    reconstruction = reconstruction_table(tuple(grid.edges.tolist())) @ counts
    return float(prior + np.min(diffusion + reconstruction) + math.log(len(grid.edges)))


@functools.lru_cache(maxsize=4)
def reconstruction_table(sigmas: tuple[float, ...]) -> np.ndarray:
    """Equation (4) for every level of uint8, float64 [len(sigmas), 256]."""
    table = np.empty((len(sigmas), 256))
    for row, sigma in enumerate(sigmas):
        noisy = LEVELS[:, None] + sigma * NODES  # [256, nodes]
        logits = -((noisy[..., None] - LEVELS) ** 2) / (2 * sigma**2)
        highest = logits.max(-1)
        total = highest + np.log(np.exp(logits - highest[..., None]).sum(-1))
        own = -(NODES**2) / 2
        table[row] = (total - own) @ NODE_WEIGHTS / NODE_WEIGHTS.sum()
    return table


def _score_group(model, documents: Sequence[Document], grid: Grid, seed: int) -> list[dict[str, float]]:
    """As many documents as one call of the network takes."""
    rows = rows_of(model, documents)
    rows_wanted = len(rows.tokens)
    nats = np.full(rows_wanted, math.nan)  # of a model without text
    if model.network.vocabulary_size:
        nats = np.asarray(_token_nats(model.network, model.params, rows, model.vocabulary.text_range), np.float64)
    errors = np.zeros((len(grid.middles), rows_wanted))
    images, dtype = model.cfg.layout.images, np.float64
    if any(document.images for document in documents) and images == "denoised":
        for level, sigma in enumerate(grid.middles):
            key = jax.random.fold_in(jax.random.key(seed), level)
            errors[level] = _image_error(model.network, model.cfg.diffusion, model.params, rows, key, jnp.float32(sigma))
    if images == "denoised":
        return [_result(document, nats[i], errors[:, i], grid) for i, document in enumerate(documents)]
    results = [_result(Document(*document.texts), nats[i], errors[:, i], grid) for i, document in enumerate(documents)]
    if images == "next_pixel":
        bits = np.asarray(_pixel_nats(model.network, model.params, rows), dtype) / math.log(2)
    elif images == "next_code":
        bits = np.asarray(_token_nats(model.network, model.params, rows, model.vocabulary.codes_range), dtype) / math.log(2)
    else:
        return results
    for document, result, of_images in zip(documents, results, bits, strict=False):
        values = sum(image.pixels.size for image in document.images)
        if values and images == "next_pixel":
            result["image_bits_per_dim"] = float(of_images) / values
        elif values:
            result["image_code_bits"] = float(of_images)
    return results


def _result(document: Document, nats: float, error: np.ndarray, grid: Grid) -> dict[str, float]:
    result = {}
    size = sum(len(text.encode(errors="replace")) for text in document.texts)
    if size and math.isfinite(nats):
        result["text_nats_per_byte"] = float(nats) / size
        result["text_bits_per_byte"] = float(nats) / size / math.log(2)
    if document.images:
        pixels = np.concatenate([image.pixels.reshape(-1) for image in document.images])
        result["image_bits_per_dim"] = image_bound(error, pixels, grid) / math.log(2) / len(pixels)
    return result


def rows_of(model, documents: Sequence[Document]) -> Rows:
    """A row for each document, and copies of the first up to a power of two: few shapes, few programs."""
    laid = [_lay_out(model, document) for document in documents]
    grid = model.network.grid  # of networks for whole images, which must fill the row
    bucket = LENGTH_BUCKET if grid is None else grid[0] * grid[1]
    length = -(-max(len(row.tokens) for row in laid) // bucket) * bucket
    wanted = 1 << (len(laid) - 1).bit_length()
    return stack([pack([row], length) for row in laid + laid[:1] * (wanted - len(laid))])


def _lay_out(model, document: Document) -> Rows:
    """The document with one noised block for every image, whatever of it was to be learnt."""
    cfg = model.cfg
    for image in document.images:
        model.network.check_size(image.height, image.width)
    layout = dataclasses.replace(cfg.layout, context="clean", noised_copies=1)
    pieces = [p._replace(learn=True) for p in text_pieces(document, model.vocabulary, cfg.model.patch, model.tokenizer)]
    if not layout.markers:
        pieces = learnt_images(pieces)
    plans = plan_images(pieces, layout, trailing_context=False)
    return lay_out(pieces, plans, model.vocabulary, layout, patch_values=cfg.patch_values, positions=cfg.model.positions)[0]


@functools.partial(jax.jit, static_argnames=("network", "ids"))
def _token_nats(network: Network, params: Any, rows: Rows, ids: tuple[int, int]) -> jax.Array:
    """-log probability of each row's tokens with these ids (start, stop), [b].

    No text reads a noised block, so their noise is left out.
    """
    u = jnp.zeros(rows.tokens.shape)
    x = normalise(rows.patches)
    model = network.bind(params)
    hidden = model.hidden(rows.tokens, rows.is_patch, x, u, rows.cell, rows.position, rows.mask)
    counted = (rows.tokens >= ids[0]) & (rows.tokens < ids[1])
    nats = model.text_nats(hidden, jnp.roll(rows.tokens, -1, axis=1))
    return jnp.sum(nats[:, :-1] * counted[:, 1:], axis=1)


@functools.partial(jax.jit, static_argnames="network")
def _pixel_nats(network: Network, params: Any, rows: Rows) -> jax.Array:
    """-log probability of each row's pixels, [b]."""
    x, model = normalise(rows.patches), network.bind(params)
    u = jnp.zeros(rows.tokens.shape)
    hidden = model.hidden(rows.tokens, rows.is_patch, x, u, rows.cell, rows.position, rows.mask)
    return jnp.sum(pixel_nats(model, rows, hidden, x), axis=1)


@functools.partial(jax.jit, static_argnames=("network", "diffusion"))
def _image_error(
    network: Network, diffusion: config.Diffusion, params: Any, rows: Rows, key: jax.Array, sigma: jax.Array
) -> jax.Array:
    """|x - x_hat|^2 over each row's noised blocks at one noise level, [b]; the noise is the same for every row."""
    eps = jax.random.normal(key, rows.patches.shape[1:], jnp.float32)[None]
    u = jnp.where(rows.noised, time_of(sigma), 0.0)
    x = normalise(rows.patches)
    z, alpha, scale = corrupt(x, eps, u, diffusion)
    model = network.bind(params)
    output = model.predict(model.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask), rows.cell)
    x_hat = prediction.convert(output, z, alpha, scale, source=diffusion.prediction, target="x", clip=1e-4)
    return jnp.sum(jnp.where((rows.noised & rows.is_patch)[..., None], (x_hat - x) ** 2, 0.0), axis=(1, 2))
