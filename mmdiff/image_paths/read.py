"""Raw patches that are read and never drawn: the model learns the texts alone.

The positions of an image read what came before them, patch by patch, and carry no loss; so do the markers before them, so
that a model of this kind does not ask for images. Source: Fuyu-8B, whose line breaks after each row of patches are here the
size tokens and two-dimensional positions.
"""

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
MEASURED = "image_loss", 1.0


def noise(network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
    """None."""
    return ()


def losses(network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
    """See ImagePath; the image loss is zero."""
    model, clean = network.bind(params), jnp.zeros(rows.tokens.shape)
    x = normalise(rows.patches)
    hidden = model.hidden(rows.tokens, rows.is_patch, x, clean, rows.cell, rows.position, rows.mask)
    return sums(rows, text_nats(network, model, rows, hidden), clean)


def draw(model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
    """Raises ConfigError."""
    raise config.ConfigError("this model reads images and draws none (layout.images='read'): leave IMG out of the prompts.")
