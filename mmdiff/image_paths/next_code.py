"""Codes of an image tokenizer as tokens among others, predicted one after another in raster order.

    image loss = mean over images of the mean over their codes of -log p(code | everything before it)          (nats)

p is a softmax over one vocabulary of text, markers and codes. Guidance acts on the logarithms of p.
Sources: LWM, arXiv 2402.08268; Chameleon, arXiv 2405.09818; LlamaGen, arXiv 2406.06525.

Letters: b rows, n codes of an image, v vocabulary, g branches of guidance.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.diffusion import guidance
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.training.loss import Losses, sums, text_nats

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model
    from mmdiff.sampling.image import Drawing
    from mmdiff.sampling.session import Options
    from mmdiff.sampling.text import Choice

HEEDED: tuple[str, ...] = ("guidance",)
VALIDATIONS = 1
MEASURED = "code_bits", math.log(2)


def noise(network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
    """None."""
    return ()


def losses(network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
    """See ImagePath."""
    model, clean = network.bind(params), jnp.zeros(rows.tokens.shape)
    hidden = model.hidden(rows.tokens, rows.is_patch, rows.patches, clean, rows.cell, rows.position, rows.mask)
    nats = text_nats(network, model, rows, hidden)
    return sums(rows, nats, nats)


def draw(model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
    """Ids int32 [b, n]; temperature, top_k, top_p and min_p hold for codes as for text."""
    from mmdiff.sampling.text import Choice

    vocabulary = model.vocabulary
    return _draw(model.network, vocabulary.codes_range, vocabulary.cols_range, drawing, Choice.of(options))


@functools.partial(jax.jit, static_argnames=("network", "codes", "sizes"))
def _draw(network: Network, codes: tuple[int, int], sizes: tuple[int, int], drawing: "Drawing", choice: "Choice") -> jax.Array:
    from mmdiff.sampling.text import choose

    ids = jnp.arange(network.vocabulary_size)
    allowed = ((ids >= codes[0]) & (ids < codes[1]))[None]

    def chosen(logits: jax.Array, column: jax.Array) -> jax.Array:
        count = len(drawing.keys)
        keys = jax.vmap(jax.random.fold_in)(drawing.keys, jnp.full(count, column))
        return choose(guidance.guided(logits[:count], logits[-count:], drawing.guide.scale), allowed, keys, choice)

    return code_by_code(network, codes[0], sizes, drawing, lambda model, hidden: model.text_logits(hidden), chosen)


def code_by_code(
    network: Network,
    first_code: int,
    sizes: tuple[int, int],
    drawing: "Drawing",
    said: Callable[[Any, jax.Array], jax.Array],
    chosen: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Ids int32 [b, n], each of which `chosen` makes of what is `said` at the position before it, and its number: of the
    model and hidden states [g b, d] an array [g b, .], and of that and int32 [] tokens int32 [b]."""
    from mmdiff.sampling.text import before_image, buffers, one_token

    model, canvas, branches = network.bind(drawing.params), drawing.canvas, len(drawing.caches)
    cache = jax.tree.map(lambda *c: jnp.concatenate(c), *drawing.caches)
    count, columns = canvas.position.shape[1:3]
    again = lambda a: jnp.tile(a, (branches, *[1] * (a.ndim - 1)))

    def advance(column, carry):
        heard, fresh, drawn = carry
        token = chosen(heard, column)
        position = jax.lax.dynamic_index_in_dim(jnp.asarray(canvas.position), column, axis=2, keepdims=False)
        cell = jax.lax.dynamic_index_in_dim(jnp.asarray(canvas.cell), column, axis=1, keepdims=False)
        place = position.reshape(branches * count, 2)
        hidden, fresh = one_token(model, cache, fresh, column, again(token), place, again(cell), is_patch=True)
        return said(model, hidden[:, 0]), fresh, drawn.at[:, column].set(token - first_code)

    first = said(model, before_image(model, cache, canvas, sizes))
    start = first, buffers(cache, columns), jnp.zeros((count, columns), jnp.int32)
    return jax.lax.fori_loop(0, columns, advance, start)[2]
