"""What every quantizer offers: vectors to ids and back, with a gradient for the encoder.

    (1) id = quantise(z), one of V            log2 V bits per vector
    (2) code = decode(id)
    (3) codes = code going forward, y going back       y = z, or what the quantizer says is a differentiable stand-in

(3) as a rule for derivatives: z + stop(code - z), as usually written, is `code` only to a rounding, while here it is the
very number that `decode` gives, so a decoder sees the same input in training and from stored ids.

A quantizer is a frozen dataclass of its configuration, hence hashable (a static argument of jit); all arrays are in two
pytrees that the caller keeps: `params`, trained by gradient, and `state`, which is not (no optimiser, no weight decay).

The quantizer that tokenizer.quantizer names is what `of(settings)` makes in the file of that name here: to add one, write its
file and say in mmdiff/config_tokenizer.py which settings it heeds.

Shapes: z [..., d], ids [...], weight [...], 1 where a position counts and 0 at padding. Everything is float32.
Source: straight-through gradients, van den Oord et al., VQ-VAE, arXiv 1711.00937.
"""

import importlib
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mmdiff.config import Tokenizer

Arrays = dict[str, jax.Array]


class Learning(NamedTuple):
    """That a quantizer is to learn from this batch."""

    key: jax.Array | None = None
    """Of what is drawn at random; the same on all devices."""
    weight: jax.Array | None = None
    """[...]; padding (weight 0) gets an id but no say in the loss and the state. None: all count."""
    restart: jax.Array | bool = True
    """Whether dead codes may start anew now."""


class Quantized(NamedTuple):
    """What a quantizer makes of a batch."""

    codes: jax.Array
    """float32 [..., d]: exactly `decode` of the ids with the params and state that were given; (3) for the encoder."""
    ids: jax.Array
    """int32 [...]."""
    loss: jax.Array
    """float32 []: all terms, weighted and added."""
    state: Arrays
    """The state after this batch; as it was given without learning."""


class Quantizer(Protocol):
    """One way to quantise vectors."""

    @property
    def size(self) -> int:
        """V, the number of codes."""

    @property
    def width(self) -> int:
        """d, the width of the vectors."""

    @property
    def bits(self) -> float:
        """log2 V."""

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        """(params, state); either may be empty."""

    def __call__(self, params: Arrays, state: Arrays, z: jax.Array, learning: Learning | None = None) -> Quantized:
        """Quantise z, of any float type; without `learning` the loss counts everything and the state stays."""

    def decode(self, params: Arrays, state: Arrays, ids: jax.Array) -> jax.Array:
        """Codes float32 [..., d] of ids."""


def make_quantizer(settings: Tokenizer) -> Quantizer:
    """The quantizer of a configuration."""
    return importlib.import_module(f"{__package__}.{settings.quantizer}").of(settings)


@jax.custom_jvp
def straight_through(y: jax.Array, code: jax.Array) -> jax.Array:
    """(3): the value of `code`, the derivative of `y`."""
    return code


@straight_through.defjvp
def _derivative(values, tangents):
    return values[1], tangents[0]


def mean(values: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Mean of values [...] over the positions that count; 0 if none does."""
    return values.mean() if weight is None else (values * weight).sum() / jnp.maximum(weight.sum(), 1)


def squared_error(x: jax.Array, target: jax.Array, weight: jax.Array | None) -> jax.Array:
    """mean (x - target)^2 over the d values and the positions that count; the target gets no gradient."""
    return mean(jnp.square(x - jax.lax.stop_gradient(target)).mean(-1), weight)
