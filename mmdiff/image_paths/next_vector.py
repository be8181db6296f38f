"""Codes of an image tokenizer, the numbers of each of which are regressed on the codes before it: `next_code` by another loss.

    image loss = mean over images of the mean over their codes of |predicted - numbers of the next code|^2

What stands in the row, what reads what, and the tokenizer are those of `next_code`; the loss alone differs, so that the two
compare classification with regression and nothing else. Drawing takes the code nearest to every prediction: there is nothing
random in it, and where several codes are likely the prediction is their mean, which may be near to none of them.

The numbers travel where raw patches would, in 8 bits, the largest of all codes as 1 (Tokenizer.levels).
Source: what Jin et al., LaVIT, arXiv 2309.04669, compare their classification with; they regress features that were not
quantised.

Letters: b rows, n codes of an image, p numbers of a code, v codes.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.image_paths.next_code import code_by_code
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.tokenizers.codebook import nearest
from mmdiff.training.loss import Losses, normalise, sums, text_nats

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model
    from mmdiff.sampling.image import Drawing
    from mmdiff.sampling.session import Options

HEEDED: tuple[str, ...] = ()
VALIDATIONS = 1
MEASURED = "next_vector_error", 1.0


def noise(network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
    """None."""
    return ()


def losses(network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
    """See ImagePath."""
    model, clean, numbers = network.bind(params), jnp.zeros(rows.tokens.shape), normalise(rows.patches)
    hidden = model.hidden(rows.tokens, rows.is_patch, numbers, clean, rows.cell, rows.position, rows.mask)
    apart = jnp.square(model.predict(hidden[:, :-1], rows.cell[:, 1:]) - numbers[:, 1:]).sum(-1)
    error = jnp.where(rows.is_patch, jnp.pad(apart, ((0, 0), (1, 0))), 0.0)
    return sums(rows, text_nats(network, model, rows, hidden), error)


def draw(model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
    """Ids int32 [b, n]."""
    levels = normalise(jnp.asarray(model.tokenizer.levels(model.cfg.patch_values)))
    return _draw(model.network, model.vocabulary.codes_range[0], model.vocabulary.cols_range, drawing, levels)


@functools.partial(jax.jit, static_argnames=("network", "first_code", "sizes"))
def _draw(network: Network, first_code: int, sizes: tuple[int, int], drawing: "Drawing", levels: jax.Array) -> jax.Array:
    said = lambda model, hidden: model.predict(hidden[:, None], None)[:, 0]
    chosen = lambda predicted, column: first_code + nearest(predicted, levels)
    return code_by_code(network, first_code, sizes, drawing, said, chosen)
