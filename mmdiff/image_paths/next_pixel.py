"""Pixels, predicted one after another in raster order: an exact likelihood, hence an upper bound on the entropy of images.

A pixel is red, green, blue, each one of 256 levels, scaled to [-1, 1]. Its distribution, given everything before it, is a
mixture of K logistics, discretised to the levels, whose later channels lean on the earlier ones:

    (1) p(r, g, b) = sum_k pi_k P(r | m_r) P(g | m_g + a r) P(b | m_b + c r + e g)            m, s, a, c, e depend on k
    (2) P(x | m) = F((x + 1/255 - m) / s) - F((x - 1/255 - m) / s), F(y) = 1 / (1 + exp(-y)); the ends take the tails

    image loss = mean over images of the mean over pixels and channels of -log p                               (nats)

The K means begin spread over the levels: with the head at zero they would else stay equal to each other.
Source: PixelCNN++, arXiv 1701.05517, section 2; in a transformer, Image Transformer, arXiv 1802.05751.

Letters: b rows, t positions, k components.
"""

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.image_paths.next_patch import patch_by_patch
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.models.patches import COMPONENTS
from mmdiff.training.loss import Losses, normalise, sums, text_nats

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model
    from mmdiff.sampling.image import Drawing
    from mmdiff.sampling.session import Options

HEEDED: tuple[str, ...] = ()
VALIDATIONS = 1
MEASURED = "image_bits_per_dim", math.log(2)
HALF = 1 / 255  # half the distance of two levels
LOG_SCALE = -2.0
LEAST_LOG_SCALE = -9.0  # PixelCNN++ stops at -7, where a level that is known for certain still costs 0.04 bits


class Mixture(NamedTuple):
    """Of a pixel; log_pi [..., k], the others [..., k, 3]."""

    log_pi: jax.Array
    mean: jax.Array
    log_scale: jax.Array
    lean: jax.Array  # a, c, e of (1)


def mixture(outputs: jax.Array) -> Mixture:
    """What the head says, float32 [..., MIXTURE_VALUES]."""
    cut = outputs.reshape(*outputs.shape[:-1], COMPONENTS, 10)
    spread = jnp.linspace(-1, 1, COMPONENTS)[:, None]
    log_scale = jnp.maximum(cut[..., 4:7] + LOG_SCALE, LEAST_LOG_SCALE)
    return Mixture(jax.nn.log_softmax(cut[..., 0]), cut[..., 1:4] + spread, log_scale, jnp.tanh(cut[..., 7:10]))


def log_likelihood(outputs: jax.Array, x: jax.Array) -> jax.Array:
    """log of (1): float32 [...] of head outputs [..., MIXTURE_VALUES] and pixels [..., 3] in [-1, 1]."""
    at = mixture(outputs)
    x = x[..., None, :]
    r, g = x[..., 0], x[..., 1]
    a, c, e = (at.lean[..., i] for i in range(3))
    mean = at.mean + jnp.stack([jnp.zeros_like(a), a * r, c * r + e * g], axis=-1)
    inverse = jnp.exp(-at.log_scale)
    above, below = (x + HALF - mean) * inverse, (x - HALF - mean) * inverse
    # log(F(above) - F(below)), where neither loses digits: with d = above - below,
    # F(above) - F(below) = F(above) F(-below) (1 - exp(-d))
    inside = jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below) + jnp.log(-jnp.expm1(-2 * HALF * inverse))
    each = jnp.where(x < -1 + HALF, jax.nn.log_sigmoid(above), jnp.where(x > 1 - HALF, jax.nn.log_sigmoid(-below), inside))
    return jax.nn.logsumexp(at.log_pi + each.sum(-1), axis=-1)


def drawn(outputs: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    """A pixel float32 [3] on the levels, from the mixture of one position; temperature 0 takes the means of the likeliest."""
    at = mixture(outputs)
    first, second = jax.random.split(key)
    warm = jnp.maximum(temperature, 1e-6)
    k = jnp.where(temperature > 0, jax.random.categorical(first, at.log_pi / warm), at.log_pi.argmax())
    noise = temperature * jnp.exp(at.log_scale[k]) * jax.random.logistic(second, (3,))
    level = lambda value: jnp.clip(jnp.rint((value + 1) * 127.5), 0, 255) / 127.5 - 1
    a, c, e = at.lean[k]
    r = level(at.mean[k, 0] + noise[0])
    g = level(at.mean[k, 1] + a * r + noise[1])
    return jnp.stack([r, g, level(at.mean[k, 2] + c * r + e * g + noise[2])])


def noise(network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
    """None."""
    return ()


def losses(network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
    """See ImagePath."""
    model, clean, x = network.bind(params), jnp.zeros(rows.tokens.shape), normalise(rows.patches)
    hidden = model.hidden(rows.tokens, rows.is_patch, x, clean, rows.cell, rows.position, rows.mask)
    return sums(rows, text_nats(network, model, rows, hidden), pixel_nats(model, rows, hidden, x) / 3)


def pixel_nats(model, rows: Rows, hidden: jax.Array, x: jax.Array) -> jax.Array:
    """-log p of each pixel x [b, t, 3] from the hidden state before it, float32 [b, t]; 0 elsewhere."""
    found = -log_likelihood(model.predict(hidden[:, :-1], rows.cell[:, 1:]), x[:, 1:])
    return jnp.where(rows.is_patch, jnp.pad(found, ((0, 0), (1, 0))), 0.0)


def draw(model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
    """Pixels uint8 [b, n, 3]; temperature holds for them as for text."""
    return _draw(model.network, model.vocabulary.cols_range, drawing, jnp.float32(options.temperature))


@functools.partial(jax.jit, static_argnames=("network", "sizes"))
def _draw(network: Network, sizes: tuple[int, int], drawing: "Drawing", temperature: jax.Array) -> jax.Array:
    def choose(outputs: jax.Array, column: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in)(drawing.keys, jnp.full(len(outputs), column))
        return jax.vmap(drawn, in_axes=(0, 0, None))(outputs, keys, temperature)

    return patch_by_patch(network, sizes, drawing, choose)
