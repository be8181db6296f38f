"""SimVQ: a frozen random basis behind one trained linear map, so that every code moves with each update.

    (1) e_v = b_v W                          b ~ N(0, 1/d), frozen; W [d, d] trained, the identity at first
    (2) id = argmin_v |z - e_v|
    (3) loss = mean (stop(z) - e_id)^2 + commitment * mean (z - stop(e_id))^2

A codebook trained by its own loss moves only the codes that are chosen; here the codes that nobody chose move too, with
W, and do not die. W starts as the identity because a random rotation of an isotropic basis would change nothing. `decode`
gives e, not b. W has no bias: where all vectors lie to one side of the origin, most codes stay on the other, so centre z.

Shapes: z [..., d]; params {"map" W [d, d]}; state {"basis" b [V, d]}.
Source: Zhu et al., Addressing representation collapse in vector quantized models with one linear layer, arXiv 2411.02038.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mmdiff.config import Tokenizer, require
from mmdiff.tokenizers import codebook
from mmdiff.tokenizers.quantizers.base import Arrays, Learning, Quantized, squared_error, straight_through


def of(settings: Tokenizer) -> "SimVQ":
    """As configured."""
    return SimVQ(settings.codes, settings.code_width, commitment=settings.commitment)


@dataclasses.dataclass(frozen=True)
class SimVQ:
    """Nearest code of a linearly mapped random codebook."""

    size: int
    width: int
    commitment: float = 0.25

    def __post_init__(self):
        require(self.size >= 2, f"SimVQ.size={self.size} must be at least 2.")
        require(self.width >= 1, f"SimVQ.width={self.width} must be at least 1.")
        require(self.commitment >= 0, f"SimVQ.commitment={self.commitment} must not be negative.")

    @property
    def bits(self) -> float:
        return math.log2(self.size)

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        basis = jax.random.normal(key, (self.size, self.width)) / math.sqrt(self.width)
        return {"map": jnp.eye(self.width)}, {"basis": basis}

    def __call__(self, params: Arrays, state: Arrays, z: jax.Array, learning: Learning | None = None) -> Quantized:
        """See Quantizer; of `learning` only the weight makes a difference."""
        z, weight = jnp.asarray(z, jnp.float32), learning.weight if learning is not None else None
        table = _table(params, state)
        ids = codebook.nearest(z, table)
        code = jnp.take(table, ids, axis=0)
        loss = squared_error(code, z, weight) + self.commitment * squared_error(z, code, weight)
        return Quantized(straight_through(z, code), ids, loss, state)

    def decode(self, params: Arrays, state: Arrays, ids: jax.Array) -> jax.Array:
        return jnp.take(_table(params, state), ids, axis=0)


def _table(params: Arrays, state: Arrays) -> jax.Array:
    """(1)."""
    basis = jax.lax.stop_gradient(state["basis"])
    return jnp.matmul(basis, params["map"], precision=jax.lax.Precision.HIGHEST)
