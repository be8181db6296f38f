"""Codes of an image tokenizer, predicted where they are masked; drawn many at a time.

A noised block is the image with m = ceil(n cos(pi r / 2)) of its n codes, chosen at random, in place of which [MASK] stands;
r is uniform over the batch. Its positions read one another.

    image loss = mean over images of the mean over masked codes of -log p(code | the rest of the block, the stream)   (nats)

Drawing starts from masks alone. In each of K steps every masked code is drawn from p, and all are masked again but the most
certain: after step k, floor(n cos(pi k / 2K)) are left. How certain is log p of what was drawn, plus 4.5 (1 - k/K) times a
Gumbel number. Guidance acts on the logarithms of p.
Sources: MaskGIT, arXiv 2202.04200; in one model with text Show-o, arXiv 2408.12528.

Letters: b rows, t positions, n codes of an image, v vocabulary.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.diffusion import guidance
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.training.loss import Losses, block_numbers, sums

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model
    from mmdiff.sampling.image import Drawing
    from mmdiff.sampling.session import Options
    from mmdiff.sampling.text import Choice

HEEDED: tuple[str, ...] = ("steps", "guidance")
VALIDATIONS = 8
MEASURED = "code_bits", math.log(2)
PURPOSES = {"ratios": 0, "order": 1}
CHOICE_TEMPERATURE = 4.5
NEVER = -1e30


def noise(network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
    """Which positions are masked: bool [b, t]."""
    numbers = block_numbers(rows, jax.random.fold_in(key, PURPOSES["ratios"]))
    order = jax.random.uniform(jax.random.fold_in(key, PURPOSES["order"]), rows.tokens.shape)
    return (masked(rows, jnp.cos(numbers * math.pi / 2), order),)


def masked(rows: Rows, ratio: jax.Array, order: jax.Array) -> jax.Array:
    """In each noised block the ceil(ratio n) positions with the smallest `order`; all arrays [b, t]."""
    here = jnp.broadcast_to(jnp.arange(rows.tokens.shape[1]), rows.tokens.shape)
    block = jnp.where(rows.noised, rows.block_start, here)  # grows along the row: sorting leaves every block where it is
    rank = jnp.argsort(jnp.lexsort((order, block), axis=-1), axis=-1) - block
    size = rows.block_end - rows.block_start
    return rows.noised & (rank < jnp.ceil(ratio * size))


def losses(network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
    """See ImagePath."""
    (hide,) = noise
    model, clean = network.bind(params), jnp.zeros(rows.tokens.shape)
    tokens = jnp.where(hide, mask_token(network), rows.tokens)
    hidden = model.hidden(tokens, rows.is_patch, rows.patches, clean, rows.cell, rows.position, rows.mask)
    # one pass of the head: a block's positions are asked for their own code, those of the stream for the next token
    nats = model.text_nats(hidden, jnp.where(rows.noised, rows.tokens, jnp.roll(rows.tokens, -1, axis=1)))
    text = jnp.pad(nats[:, :-1], ((0, 0), (1, 0)))
    row = jnp.arange(len(hide))[:, None]
    count = jnp.zeros(hide.shape).at[row, rows.block_start].add(jnp.where(hide, 1.0, 0.0))
    share = (rows.block_end - rows.block_start) / jnp.maximum(jnp.take_along_axis(count, rows.block_start, axis=-1), 1.0)
    return sums(rows, text, jnp.where(hide, nats * share, 0.0))


def mask_token(network: Network) -> int:
    """The id of [MASK], the last of the vocabulary."""
    return network.vocabulary_size - 1


def draw(model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
    """Ids int32 [b, n] after options.steps evaluations; temperature, top_k, top_p and min_p hold for codes as for text."""
    from mmdiff.sampling.text import Choice

    return _draw(model.network, model.vocabulary.codes_range, drawing, Choice.of(options), jnp.int32(options.steps))


@functools.partial(jax.jit, static_argnames=("network", "codes"))
def _draw(network: Network, codes: tuple[int, int], drawing: "Drawing", choice: "Choice", steps: jax.Array) -> jax.Array:
    from mmdiff.sampling.image import block_mask
    from mmdiff.sampling.text import choose

    model, canvas, branches = network.bind(drawing.params), drawing.canvas, len(drawing.caches)
    cache = jax.tree.map(lambda *c: jnp.concatenate(c), *drawing.caches)
    documents, length = canvas.position.shape[1:3]
    again = lambda a: jnp.tile(a, (branches, *[1] * (a.ndim - 1)))
    position, cell = jnp.asarray(canvas.position).reshape(-1, length, 2), again(jnp.asarray(canvas.cell))
    counts = jnp.asarray(canvas.counts)
    mask = block_mask(cache, again(counts)[:, None], length)
    real = jnp.arange(length) < counts[:, None]
    z = jnp.zeros((branches * documents, length, network.patch_values))
    clean, everywhere = jnp.zeros(z.shape[:2]), jnp.ones(z.shape[:2], bool)
    ids = jnp.arange(network.vocabulary_size)
    allowed = ((ids >= codes[0]) & (ids < codes[1]))[None]

    def advance(step, tokens):
        hidden = model.hidden(again(tokens), everywhere, z, clean, cell, position, mask, cache.layers)
        logits = model.text_logits(hidden)
        logits = guidance.guided(logits[:documents], logits[-documents:], drawing.guide.scale)
        keys = jax.vmap(jax.random.fold_in)(drawing.keys, jnp.full(documents, step))
        # numbers of position i do not depend on the padding
        each = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(length)))(keys)
        two = jax.vmap(jax.vmap(jax.random.split))(each)
        flat = logits.reshape(-1, logits.shape[-1])
        token = choose(flat, allowed, two[..., 0].reshape(-1), choice).reshape(tokens.shape)
        likely = jnp.take_along_axis(jax.nn.log_softmax(jnp.where(allowed, logits, NEVER)), token[..., None], -1)[..., 0]
        hidden_now = (tokens == mask_token(network)) & real
        done = (step + 1) / steps
        certain = likely + CHOICE_TEMPERATURE * (1 - done) * jax.vmap(jax.vmap(jax.random.gumbel))(two[..., 1])
        # the cosine of 60 degrees is below a half in float32
        left = jnp.where(step + 1 == steps, 0, jnp.floor(counts * jnp.cos(done * math.pi / 2) + 1e-4))
        order = jnp.argsort(jnp.where(hidden_now, certain, jnp.inf), axis=-1)
        rank = jnp.argsort(order, axis=-1)  # 0: the least certain
        return jnp.where(hidden_now & (rank >= left[:, None]), token, tokens)

    start = jnp.full((documents, length), mask_token(network), jnp.int32)
    return jax.lax.fori_loop(0, steps, advance, start) - codes[0]
