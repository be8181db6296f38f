"""No quantisation: the continuous twin of a tokenizer, which separates what its narrow middle costs from what rounding costs.

Codes are the vectors themselves; there are no ids (all 0), and no bits to count. Shapes: z [..., d].
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mmdiff.config import Tokenizer
from mmdiff.tokenizers.quantizers.base import Arrays, Learning, Quantized


def of(settings: Tokenizer) -> "Continuous":
    """As configured."""
    return Continuous(settings.code_width)


@dataclasses.dataclass(frozen=True)
class Continuous:
    width: int
    size = 0

    @property
    def bits(self) -> float:
        return math.inf

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        return {}, {}

    def __call__(self, params: Arrays, state: Arrays, z: jax.Array, learning: Learning | None = None) -> Quantized:
        """See Quantizer."""
        z = jnp.asarray(z, jnp.float32)
        return Quantized(z, jnp.zeros(z.shape[:-1], jnp.int32), jnp.zeros(()), state)

    def decode(self, params: Arrays, state: Arrays, ids: jax.Array) -> jax.Array:
        raise ValueError("a tokenizer with tokenizer.quantizer='none' has no ids to decode.")
