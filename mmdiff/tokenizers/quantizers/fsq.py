"""Finite scalar quantisation: each of d values is rounded to one of L levels; no codebook, nothing to train.

Per value, with half = (L - 1)(1 + eps)/2, and offset = 1/2 for even L, 0 for odd L:

    (1) b = half * tanh(z + atanh(offset / half)) - offset            z = 0 gives b = 0
    (2) k = round(b),  -floor(L/2) <= k <= ceil(L/2) - 1              L values
    (3) code = k / floor(L/2)                                         for even L, -1 ... 1 - 2/L
    (4) id = sum_i (k_i + floor(L_i/2)) L_1 ... L_(i-1)               the first value changes fastest

The gradient is that of b / floor(L/2): rounding is passed straight through, tanh is not. V is the product of the levels;
ids are integer arithmetic throughout: a sum in bf16 gets half of them wrong at V = 1000 and nearly all at V = 64000.

Shapes: z [..., d] with d = len(levels); params and state are {}; the loss is 0.
Source: Mentzer et al., Finite scalar quantization, arXiv 2309.15505 (which prints tan for atanh in (1)).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.config import Tokenizer, require
from mmdiff.tokenizers.quantizers.base import Arrays, Learning, Quantized, straight_through

LEVELS = {
    256: (8, 6, 5),
    1024: (8, 5, 5, 5),
    4096: (7, 5, 5, 5, 5),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
}
"""Levels for about that many codes (240, 1000, 4375, 15360, 64000), from the paper."""

EPS = 1e-3  # keeps the outermost levels within reach of tanh
MOST = 1000  # more levels, and EPS would round to a level that does not exist


def of(settings: Tokenizer) -> "FSQ":
    """As configured."""
    return FSQ(settings.levels)


@dataclasses.dataclass(frozen=True)
class FSQ:
    """Rounding to a fixed grid."""

    levels: tuple[int, ...]

    def __post_init__(self):
        told = f"FSQ.levels={self.levels}"
        require(isinstance(self.levels, tuple) and len(self.levels) > 0, f"{told} must be a tuple, for example (8, 6, 5).")
        require(min(self.levels) >= 3, f"{told} must each be at least 3; for two levels per value use LFQ.")
        require(max(self.levels) <= MOST, f"{told} must each be at most {MOST}; use more values with fewer levels.")
        require(self.size < 2**31, f"{told} give {self.size} codes, more than int32 can number; use fewer.")

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        return len(self.levels)

    @property
    def bits(self) -> float:
        return math.log2(self.size)

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        return {}, {}

    def __call__(self, params: Arrays, state: Arrays, z: jax.Array, learning: Learning | None = None) -> Quantized:
        """See Quantizer; nothing but z makes a difference."""
        bounded = self._bounded(jnp.asarray(z, jnp.float32))
        ids = ((jnp.round(bounded).astype(jnp.int32) + self._below) * self._steps).sum(-1, dtype=jnp.int32)
        codes = straight_through(bounded / self._below, self.decode(params, state, ids))
        return Quantized(codes, ids, jnp.zeros(()), state)

    def decode(self, params: Arrays, state: Arrays, ids: jax.Array) -> jax.Array:
        k = ids[..., None] // self._steps % np.asarray(self.levels, np.int32) - self._below
        return k.astype(jnp.float32) / self._below

    def _bounded(self, z: jax.Array) -> jax.Array:
        """(1)."""
        levels = np.asarray(self.levels)
        half = (levels - 1) * (1 + EPS) / 2
        offset = np.where(levels % 2, 0, 0.5)
        shift = np.arctanh(offset / half)
        return np.float32(half) * jnp.tanh(z + np.float32(shift)) - np.float32(offset)

    @property
    def _below(self) -> np.ndarray:
        """floor(L/2), the number of levels below 0."""
        return np.asarray(self.levels, np.int32) // 2

    @property
    def _steps(self) -> np.ndarray:
        """L_1 ... L_(i-1), what one level of value i adds to the id."""
        return np.cumprod((1, *self.levels[:-1]), dtype=np.int32)
