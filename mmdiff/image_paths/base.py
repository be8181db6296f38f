"""How images enter and leave a model: four choices behind one interface, on the same transformer, trainer and sampler.

    layout.images   stands in the row          reads its image     is learnt                     is drawn
    denoised        raw patches, noised block  all of it           by denoising                  by a solver
    masked_code     codes, noised block        all of it           where a code is masked        many codes at a time
    next_code       codes, in the stream       what came before    as the next token             code by code
    next_vector     codes, in the stream       what came before    by regression                 code by code
    next_pixel      pixels, in the stream      what came before    by its distribution           pixel by pixel
    next_patch      raw patches, in the stream what came before    by regression                 patch by patch
    next_embedding  vectors, in the stream     what came before    by regression                 vector by vector, then pixels
    read            raw patches or vectors     what came before    not                           never

Codes are those of data.tokenizer, in one vocabulary with the text; vectors those of `front_end` (mmdiff/adapters/).
What stands and how it reads is laid out by mmdiff/layout.py; the other two choices are a module of this package, with the
functions of `ImagePath`.
"""

from typing import TYPE_CHECKING, Any, Protocol

import jax

from mmdiff import config
from mmdiff.layout import Rows
from mmdiff.models.network import Network
from mmdiff.training.loss import Losses

if TYPE_CHECKING:
    from mmdiff.sampling.generate import Model
    from mmdiff.sampling.image import Drawing
    from mmdiff.sampling.session import Options


class ImagePath(Protocol):
    """What a module of this package offers."""

    HEEDED: tuple[str, ...]
    """Sampling options about images that mean something to it."""
    VALIDATIONS: int
    """Draws of noise over which validation averages its loss."""
    MEASURED: tuple[str, float]
    """How validation calls the image loss, and by what it divides it."""

    def noise(self, network: Network, cfg: config.Config, rows: Rows, key: jax.Array) -> tuple[jax.Array, ...]:
        """What is random about a batch, each array [b, ...]."""

    def losses(self, network: Network, cfg: config.Config, params: Any, rows: Rows, *noise: jax.Array) -> Losses:
        """Text and image loss of rows with this noise."""

    def draw(self, model: "Model", drawing: "Drawing", options: "Options") -> jax.Array:
        """What stands at the images' positions: uint8 patches [b, n, p], or ids of codes int32 [b, n]."""


def image_path(layout: config.Layout) -> ImagePath:
    """The one that a layout names."""
    from mmdiff.image_paths import denoised, masked_code, next_code, next_embedding, next_patch, next_pixel, next_vector, read

    paths: dict[str, ImagePath] = {
        "denoised": denoised,
        "masked_code": masked_code,
        "next_code": next_code,
        "next_vector": next_vector,
        "next_pixel": next_pixel,
        "next_patch": next_patch,
        "next_embedding": next_embedding,
        "read": read,
    }
    return paths[layout.images]
