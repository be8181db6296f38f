"""Binary spherical quantisation: lookup-free quantisation of directions.

    (1) u = z / |z|,  code_i = 1 / sqrt d if u_i > 0, else -1 / sqrt d         id = sum_i [u_i > 0] 2^(i-1)       V = 2^d
    (2) loss = commitment * mean (u - stop(code))^2 + entropy * (S - B)

Codes and what they stand for have length 1, so no vector is far from its code, |u - code| < sqrt(2 - 2 / sqrt d), and none
can grow. S and B are those of LFQ for sqrt d u (lfq.py): probabilities of the codes are a softmax of -tau |u - code|^2, where
the paper leaves tau to be chosen, and ours is d: at a code, each bit is as sure as LFQ's.

Shapes: z [..., d]; params and state are {}. Source: Zhao et al., BSQ, arXiv 2406.07548.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mmdiff.config import Tokenizer, require
from mmdiff.tokenizers import codebook
from mmdiff.tokenizers.quantizers.base import Arrays, Learning, Quantized, squared_error, straight_through
from mmdiff.tokenizers.quantizers.lfq import LFQ, entropy_gap


def of(settings: Tokenizer) -> "BSQ":
    """As configured."""
    return BSQ(settings.code_width, entropy=settings.entropy, commitment=settings.commitment)


@dataclasses.dataclass(frozen=True)
class BSQ:
    """One bit per value of a direction."""

    width: int
    entropy: float = 0.1
    commitment: float = 0.25

    def __post_init__(self):
        require(2 <= self.width <= 30, f"BSQ.width={self.width} must be between 2 and 30: an id is an int32.")
        require(self.entropy >= 0, f"BSQ.entropy={self.entropy} must not be negative.")
        require(self.commitment >= 0, f"BSQ.commitment={self.commitment} must not be negative.")

    @property
    def size(self) -> int:
        return 2**self.width

    @property
    def bits(self) -> float:
        return float(self.width)

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        return {}, {}

    def __call__(self, params: Arrays, state: Arrays, z: jax.Array, learning: Learning | None = None) -> Quantized:
        """See Quantizer; of `learning` only the weight makes a difference."""
        u, weight = codebook.unit(jnp.asarray(z, jnp.float32)), learning.weight if learning is not None else None
        ids = LFQ(self.width)(params, state, u).ids
        code = self.decode(params, state, ids)
        gap = entropy_gap(math.sqrt(self.width) * u, weight)
        loss = self.commitment * squared_error(u, code, weight) + self.entropy * gap
        return Quantized(straight_through(u, code), ids, loss, state)

    def decode(self, params: Arrays, state: Arrays, ids: jax.Array) -> jax.Array:
        return LFQ(self.width).decode(params, state, ids) / math.sqrt(self.width)
