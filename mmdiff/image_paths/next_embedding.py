"""Vectors of a front end, each predicted from those before it, and pixels denoised from them: Emu.

    [IMG] <rows> <cols> v_1 .. v_K [/IMG]        v = causal former of the tower's features (mmdiff/adapters/causal_former.py)
    (1) d(a, b)    = mean over the width of (a - b)^2, or 1 - cos(a, b)                         front_end.regression
    (2) regression = mean over K + 1 positions of d(head(hidden before a position), what stands there), [/IMG] the last of them
    (3) image loss = mean over images of regression + the diffusion loss of the pixels, given v

Targets, and what the pixels are denoised from, are stop_gradient(v): the causal former learns through the model that reads
its vectors, not by making them easy to predict. With cosines vectors and predictions have root mean square 1, since nothing
else is said about their length.

Drawing predicts K vectors one after another, each fed back as the next input, and denoises pixels from them, given no text;
sampling.steps are those of the denoising. What later texts read is the drawn image, through the tower again.

The loss is of the paper, not of its released code, which leaves it out. Ours: the norm before the head, the sizes behind
[IMG], a denoiser that is trained here, beside the model (mmdiff/tokenizers/pixel_decoder.py), in place of a pretrained one,
and no guidance. Source: Sun et al., Emu, arXiv 2307.05222.

Letters: b rows, t positions, k vectors of an image, i images of a row, d width.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.adapters.front_end import begins, find
from mmdiff.diffusion.times import stratified
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.models.transfusion import Embedded
from mmdiff.training.loss import Losses, normalise, sums, text_nats

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model
    from mmdiff.sampling.image import Drawing
    from mmdiff.sampling.session import Options

HEEDED: tuple[str, ...] = ("steps",)
VALIDATIONS = 4
MEASURED = "image_loss", 1.0


def noise(network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
    """Of the denoiser: numbers r [b, t] where an image begins, evenly over those of the batch, and noise [b, t, s] that stands
    as the slices of pixels do."""
    one, two = jax.random.split(key)
    eps = jax.random.normal(two, rows.patches.shape, jnp.float32)
    return stratified(begins(rows.cell), one), network.place(eps, "rows", None, None)


def losses(network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
    """See ImagePath."""
    r, eps = noise
    model, clean, z = network.bind(params), jnp.zeros(rows.tokens.shape), normalise(rows.patches)
    embedded = model.embed(rows.tokens, rows.is_patch, z, clean, rows.cell)
    hidden = model.stack(embedded, rows.position, rows.mask)[0]
    regression = regressed(network, model, rows, embedded.x, hidden)
    found, noised = (find(a, rows.cell, network.front.grid) for a in (z, eps))
    row = jnp.arange(len(z))[:, None, None]
    vectors = jax.lax.stop_gradient(embedded.x)[row, jnp.minimum(found.at, z.shape[1] - 1)]
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    first = jnp.minimum(found.at[..., 0], z.shape[1] - 1)
    pixels, eps = (model.image.pixels(flat(one.slices)) for one in (found, noised))
    denoised = model.image.decoder.losses(pixels, flat(vectors), flat(r[row[..., 0], first]), eps)
    each = jnp.broadcast_to(denoised.reshape(*found.at.shape[:2], 1), found.at.shape)
    error = regression.at[row, found.at].add(each, mode="drop")
    return sums(rows, text_nats(network, model, rows, hidden), error)


def regressed(network: Network, model, rows: Rows, x: jax.Array, hidden: jax.Array) -> jax.Array:
    """Error (2) at the positions of images, zero elsewhere: float32 [b, t]; its mean over an image is that of K + 1 positions.

    x: what stands at all positions [b, t, d]. hidden: final states there.
    """
    target = jax.lax.stop_gradient(x.astype(jnp.float32))
    apart = distance(network.front.regression, model.image.predict(hidden[:, :-1], None), target[:, 1:])
    apart = jnp.pad(apart, ((0, 0), (1, 0)))
    (rows_, cols), length = network.front.grid, x.shape[1]
    count = rows_ * cols
    end = jnp.arange(length) - (rows.cell[..., 0] * cols + rows.cell[..., 1]) + count  # where [/IMG] stands
    last = jnp.take_along_axis(apart, jnp.clip(end, 0, length - 1), axis=1)
    return jnp.where(rows.is_patch, (count * apart + last) / (count + 1), 0.0)


def distance(kind: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """(1): [..., d] to [...]."""
    if kind == "l2":
        return jnp.square(a - b).mean(-1)
    length = lambda x: jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), 1e-12))
    return 1 - (a * b).sum(-1) / (length(a) * length(b))


def draw(model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
    """Slices of pixels, uint8 [b, k, s]."""
    return _draw(model.network, model.vocabulary.cols_range, drawing, options.steps)


@functools.partial(jax.jit, static_argnames=("network", "sizes", "steps"))
def _draw(network: Network, sizes: tuple[int, int], drawing: "Drawing", steps: int) -> jax.Array:
    from mmdiff.sampling.image import to_pixels

    model = network.bind(drawing.params)
    decoder = model.image.decoder
    decoder.sampling = dataclasses.replace(decoder.sampling, steps=steps)
    # image by image, so that each has its own noise
    one = lambda condition, key: decoder.draw(condition[None], key)[0]
    drawn = jax.vmap(one)(predicted(network, sizes, drawing), drawing.keys)
    return model.image.slices(to_pixels(drawn))


def predicted(network: Network, sizes: tuple[int, int], drawing: "Drawing") -> jax.Array:
    """K vectors for each document, one after another: float32 [b, k, d]."""
    from mmdiff.sampling.text import before_image, buffers, one_embedded

    model, canvas, (cache,) = network.bind(drawing.params), drawing.canvas, drawing.caches
    count, columns = canvas.position.shape[1:3]
    position = jnp.asarray(canvas.position)[0]

    def advance(column, carry):
        vector, fresh, made = carry
        place = jax.lax.dynamic_index_in_dim(position, column, axis=1, keepdims=False)
        standing = Embedded(vector[:, None].astype(network.compute_type))
        hidden, fresh = one_embedded(model, cache, fresh, column, standing, place, jnp.zeros((count, 4), jnp.int32))
        return model.image.predict(hidden, None)[:, 0], fresh, made.at[:, column].set(vector)

    first = model.image.predict(before_image(model, cache, canvas, sizes)[:, None], None)[:, 0]
    start = first, buffers(cache, columns), jnp.zeros((count, columns, network.cfg.width))
    return jax.lax.fori_loop(0, columns, advance, start)[2]
