"""Raw patches, each predicted from those before it as a vector: what regression instead of a distribution comes to.

    image loss = mean over images of the mean over patches, pixels and channels of |predicted - next patch|^2

Drawing feeds every prediction, rounded to pixels, back as the next input. There is nothing random in it, and where several
continuations are likely the prediction is their mean.
Source: the regression of the next embedding in Emu, arXiv 2307.05222, with the patch itself for an embedding.

Letters: b rows, t positions, n patches of an image, p patch values.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.training.loss import Losses, normalise, sums, text_nats

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model
    from mmdiff.sampling.image import Drawing
    from mmdiff.sampling.session import Options

HEEDED: tuple[str, ...] = ()
VALIDATIONS = 1
MEASURED = "next_patch_error", 1.0


def noise(network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
    """None."""
    return ()


def losses(network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
    """See ImagePath."""
    model, clean, x = network.bind(params), jnp.zeros(rows.tokens.shape), normalise(rows.patches)
    hidden = model.hidden(rows.tokens, rows.is_patch, x, clean, rows.cell, rows.position, rows.mask)
    error = jnp.mean(jnp.square(model.predict(hidden[:, :-1], rows.cell[:, 1:]) - x[:, 1:]), axis=-1)
    error = jnp.where(rows.is_patch, jnp.pad(error, ((0, 0), (1, 0))), 0.0)
    return sums(rows, text_nats(network, model, rows, hidden), error)


def draw(model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
    """Patches uint8 [b, n, p]."""
    return _draw(model.network, model.vocabulary.cols_range, drawing)


@functools.partial(jax.jit, static_argnames=("network", "sizes"))
def _draw(network: Network, sizes: tuple[int, int], drawing: "Drawing") -> jax.Array:
    from mmdiff.sampling.image import to_pixels

    return patch_by_patch(network, sizes, drawing, lambda predicted, column: normalise(to_pixels(predicted)))


def patch_by_patch(
    network: Network,
    sizes: tuple[int, int],
    drawing: "Drawing",
    choose: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Patches uint8 [b, n, p], each of which `choose` makes of what the head says at the position before it, and its number:
    float32 [b, v] and int32 [] to float32 [b, p] in [-1, 1]."""
    from mmdiff.sampling.image import to_pixels
    from mmdiff.sampling.text import before_image, buffers, one_token

    model, canvas, (cache,) = network.bind(drawing.params), drawing.canvas, drawing.caches
    count, columns = canvas.position.shape[1:3]
    position, cell = jnp.asarray(canvas.position)[0], jnp.asarray(canvas.cell)
    at = lambda array, column: jax.lax.dynamic_index_in_dim(array, column, axis=1, keepdims=False)
    nothing = jnp.zeros(count, jnp.int32)

    def advance(column, carry):
        said, fresh, image = carry
        z = choose(said, column)
        place, where = at(position, column), at(cell, column)
        hidden, fresh = one_token(model, cache, fresh, column, nothing, place, where, is_patch=True, z=z)
        return model.predict(hidden, where[:, None])[:, 0], fresh, image.at[:, column].set(z)

    first = model.predict(before_image(model, cache, canvas, sizes)[:, None], cell[:, :1])[:, 0]
    start = first, buffers(cache, columns), jnp.zeros((count, columns, network.patch_values))
    return to_pixels(jax.lax.fori_loop(0, columns, advance, start)[2])
