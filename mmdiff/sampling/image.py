"""The image phase: every document whose image is due draws it, all solver steps in one compiled loop.

Each network evaluation runs only the n patches of the image against the cached context:

    X = z / alpha = x + sigma eps        u = sigma / (1 + sigma)        x_hat = to_x(network(alpha X, u | cache))

With guidance the batch holds each document twice, the second time with the cache of its unconditional prompt
(layout.drop_text); with autoguidance the weaker model draws beside this one, against a cache of its own. Known pixels
(inpainting) are clamped in x_hat; since X starts at known + sigma_max eps, this is the same as noising them anew at every
step. Letters: b rows (documents), n patches, p patch values.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config
from mmdiff.diffusion import guidance, prediction
from mmdiff.diffusion.schedule import make_schedule, time_of
from mmdiff.diffusion.solvers import Table, integrate
from mmdiff.layout import TIME, IntervalMask
from mmdiff.models.network import Network
from mmdiff.sampling.cache import Cache, capacity


class Canvas(NamedTuple):
    """Where and how big the images are; documents with fewer than n patches are padded."""

    position: np.ndarray  # float32 [g, b, n, 2]; g = 2 with guidance (unconditional second), else 1
    cell: np.ndarray  # int32 [b, n, 4]
    counts: np.ndarray  # int32 [b]
    known: "Known | None"
    start: np.ndarray  # float32 [g, b]; positions of the last tokens before the images


class Known(NamedTuple):
    """The image to inpaint."""

    pixels: np.ndarray  # float32 [b, n, p] in [-1, 1]
    repaint: np.ndarray  # bool [b, n, p]; True is drawn, False keeps `pixels`


class Guidance(NamedTuple):
    """See mmdiff/diffusion/guidance.py."""

    scale: np.float32
    lowest: np.float32  # noise levels between which it acts
    highest: np.float32
    rescale: np.float32


class Weak(NamedTuple):
    """The weaker model of autoguidance, and its reading of the documents."""

    params: Any
    cache: Cache


class Drawing(NamedTuple):
    """Documents about to draw an image, up to solver and grid.

    caches: the documents' context; with guidance also that of their unconditional prompts, of equal capacity.
    keys: [b] PRNG keys; noise of patch i does not depend on the padding.
    """

    params: Any
    caches: tuple[Cache, ...]
    canvas: Canvas
    keys: jax.Array
    guide: Guidance
    weak: Weak | None = None


@functools.partial(jax.jit, static_argnames=("network", "diffusion", "weaker"))
def draw(
    network: Network, diffusion: config.Diffusion, drawing: Drawing, table: Table, weaker: Network | None = None
) -> jax.Array:
    """Sample images: uint8 [b, n, p]. `table`: solver and grid (solvers.make_table). `weaker`: of the parameters `weak`."""
    return to_pixels(denoised(network, diffusion, drawing, table, weaker))


def denoised(
    network: Network, diffusion: config.Diffusion, drawing: Drawing, table: Table, weaker: Network | None = None
) -> jax.Array:
    """The same before rounding: float32 [b, n, p]."""
    params, caches, canvas, keys, guide, weak = drawing
    model, known = network.bind(params), canvas.known
    joined = caches[0] if len(caches) == 1 else jax.tree.map(lambda *c: jnp.concatenate(c), *caches)
    one = functools.partial(_predict, model, diffusion, caches[0], canvas, canvas.position[:1])
    both = functools.partial(_predict, model, diffusion, joined, canvas, canvas.position)
    real = jnp.arange(canvas.position.shape[2]) < canvas.counts[:, None]
    worse = None
    if weaker is not None and weak is not None:
        worse = functools.partial(_predict, weaker.bind(weak.params), diffusion, weak.cache, canvas, canvas.position[:1])

    def in_both(point: jax.Array, *at: jax.Array) -> jax.Array:
        if worse is None:
            good, bad = jnp.split(both(jnp.concatenate([point, point]), *at), 2)
        else:
            good, bad = one(point, *at), worse(point, *at)
        return guidance.rescaled(guidance.guided(good, bad, guide.scale), good, guide.rescale, real)

    def denoise(point: jax.Array, sigma: jax.Array, *length: jax.Array) -> jax.Array:
        if len(caches) == 1 and worse is None:
            x_hat = one(point, sigma, *length)
        else:
            inside = guidance.inside(sigma, (guide.lowest, guide.highest))
            x_hat = jax.lax.cond(inside, lambda: in_both(point, sigma, *length), lambda: one(point, sigma, *length))
        return x_hat if known is None else jnp.where(known.repaint, x_hat, known.pixels)

    shape = (canvas.position.shape[2], network.patch_values)

    def noise(step: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape))(keys)

    point = table.level[0] * noise(jnp.asarray(0))
    if known is not None:
        point = point + jnp.where(known.repaint, 0.0, known.pixels)
    return integrate(denoise, point, table, lambda step: noise(step + 1))


def block_mask(cache: Cache, count: jax.Array, length: int) -> IntervalMask:
    """The first `count` [b, 1] of `length` positions read the cache and each other; padding reads itself."""
    slots = capacity(cache)
    here = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (len(count), length))
    real = here < count
    return IntervalMask(
        context_start=jnp.zeros_like(here),
        context_end=jnp.where(real, cache.length[:, None], 0),
        block_start=slots + jnp.where(real, 0, here),
        block_end=slots + jnp.where(real, count, here + 1),
    )


def to_pixels(x: jax.Array) -> jax.Array:
    """[-1, 1] to uint8, rounded; the inverse of `normalise` on its own values."""
    return jnp.clip(jnp.rint((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _predict(
    model, diffusion: config.Diffusion, cache: Cache, canvas: Canvas, position, point, sigma, length=None
) -> jax.Array:
    """x_hat [b', n, p] of the noised patches `point` = X, with b' documents (2 b with guidance).

    `length`: of the step in noise time, for networks that are told it.
    """
    documents, patches = point.shape[:2]
    u = time_of(sigma)
    alpha, scale = make_schedule(diffusion)(u)
    z = point * alpha
    branches = len(position)
    count = jnp.tile(canvas.counts, branches)[:, None]
    position = position.reshape(documents, patches, 2)
    cell = jnp.tile(canvas.cell, (branches, 1, 1))
    first = int(model.cfg.time == "token")  # positions before the patches
    if first:
        real = (jnp.arange(patches) < count)[..., None]
        middle = jnp.sum(position * real, axis=1, keepdims=True) / count[..., None]
        position = jnp.concatenate([middle, position], axis=1)
        z, cell = (jnp.pad(a, ((0, 0), (1, 0), (0, 0))) for a in (z, cell))
        count = count + 1
    mask = block_mask(cache, count, patches + first)
    here = jnp.broadcast_to(jnp.arange(patches + first, dtype=jnp.int32), (documents, patches + first))
    is_patch = here >= first
    tokens = jnp.where(is_patch, 0, TIME)
    everywhere = lambda value: jnp.full(here.shape, value)
    step = None if length is None else everywhere(length)
    hidden = model.hidden(tokens, is_patch, z, everywhere(u), cell, position, mask, cache.layers, step)
    output, z = model.predict(hidden, cell)[:, first:], z[:, first:]
    # the smallest clip that keeps eps -> x finite: at sigma_max it must stay below 1 / (1 + sigma)
    return prediction.convert(output, z, alpha, scale, source=diffusion.prediction, target="x", clip=1e-4)
