"""Lookup-free quantisation: the signs of d values are the bits of the id.

    (1) code_i = 1 if z_i > 0, else -1              id = sum_i [z_i > 0] 2^(i-1)           V = 2^d
    (2) loss = commitment * mean (z - stop(code))^2 + entropy * (S - B)

S asks each vector to be sure of its code, B the batch to use all codes. With probabilities of the codes that are a softmax
of -|z - code|^2 over all V of them, the d bits of one vector are independent, and sums over V codes become sums over d bits:

    (3) p_i = P(bit i) = sigmoid(4 z_i)             h(p) = -p ln p - (1 - p) ln(1 - p)
    (4) S = mean over vectors of sum_i h(p_i)       the entropy of one vector's distribution, exact, in nats
    (5) B = sum_i h(mean over vectors of p_i)       the entropy of the batch, if bits were independent in the batch too

(5) is an upper bound of the entropy of the batch's mean distribution, equal to it when the bits of the batch's codes are
independent: it sees a bit that is always the same, but not two bits that always agree. S - B lies between -d ln 2 and 0.
The means run over the positions that count, of the whole batch; a small batch makes B too small.

Shapes: z [..., d]; params and state are {}.
Sources: Yu et al., MAGVIT-v2, arXiv 2310.05737; factorised entropy, Zhao et al., BSQ, arXiv 2406.07548.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mmdiff.config import Tokenizer, require
from mmdiff.tokenizers.quantizers.base import Arrays, Learning, Quantized, mean, squared_error, straight_through

SMALLEST = 1e-7  # a mean probability is kept this far from 0 and 1, where h has no finite slope


def of(settings: Tokenizer) -> "LFQ":
    """As configured."""
    return LFQ(settings.code_width, entropy=settings.entropy, commitment=settings.commitment)


@dataclasses.dataclass(frozen=True)
class LFQ:
    """One bit per value."""

    width: int
    entropy: float = 0.1
    commitment: float = 0.1

    def __post_init__(self):
        require(1 <= self.width <= 30, f"LFQ.width={self.width} must be between 1 and 30: an id is an int32.")
        require(self.entropy >= 0, f"LFQ.entropy={self.entropy} must not be negative.")
        require(self.commitment >= 0, f"LFQ.commitment={self.commitment} must not be negative.")

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
        z, weight = jnp.asarray(z, jnp.float32), learning.weight if learning is not None else None
        ids = jnp.left_shift((z > 0).astype(jnp.int32), jnp.arange(self.width)).sum(-1, dtype=jnp.int32)
        code = self.decode(params, state, ids)
        loss = self.commitment * squared_error(z, code, weight) + self.entropy * entropy_gap(z, weight)
        return Quantized(straight_through(z, code), ids, loss, state)

    def decode(self, params: Arrays, state: Arrays, ids: jax.Array) -> jax.Array:
        bits = jnp.right_shift(ids[..., None], jnp.arange(self.width)) & 1
        return 2 * bits.astype(jnp.float32) - 1


def entropy_gap(z: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """S - B of (4) and (5), in nats."""
    logits = 4 * z
    p = jax.nn.sigmoid(logits)
    each = p * jax.nn.softplus(-logits) + (1 - p) * jax.nn.softplus(logits)  # h(p), without the logarithm of a rounded 0
    average = jax.vmap(mean, in_axes=(-1, None))(p, weight)
    return mean(each.sum(-1), weight) - binary_entropy(average).sum()


def binary_entropy(p: jax.Array) -> jax.Array:
    """h(p) in nats."""
    p = jnp.clip(p, SMALLEST, 1 - SMALLEST)
    return -p * jnp.log(p) - (1 - p) * jnp.log1p(-p)
