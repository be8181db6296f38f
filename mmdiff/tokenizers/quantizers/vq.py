"""Vector quantisation: the nearest of V codes, which follow the vectors that choose them.

    (1) id = argmin_v |z - e_v|                         z and e of unit length if `normalise`
    (2) loss = commitment * mean (z - stop(e_id))^2     draws the encoder to its codes

The codes are moving averages (update="ema"), with n_v and m_v the count and the sum of the vectors of code v:

    (3) N <- decay N + (1 - decay) n        M <- decay M + (1 - decay) m
    (4) e_v <- M_v / L(N_v),  L(N_v) = (N_v + eps) sum N / (sum N + V eps)       where n_v > 0; otherwise e_v stays

(without the exception the smoothing L would draw an unused code to zero as its N vanishes), or they are trained by a
second loss term mean (stop(z) - e_id)^2 (update="loss").

A code is dead when N_v < restart * mean N. It becomes a vector z drawn from the batch, and e, M and N change together:

    (5) e_v <- z      N_v <- mean N      M_v <- N_v z

so that it has as long to live as a code with an average following. Only in training, and only of moving averages: what an
optimiser trains is not for the quantizer to overwrite.

The moving averages are float32: in bf16, (1 - decay) of a change is less than half a unit in the last place and is lost.

Shapes: z [..., d]; params {} or {"codes" [V, d]}; state {"codes" [V, d], "counts" N [V], "sums" M [V, d]} or {}.
Sources: van den Oord et al., VQ-VAE, arXiv 1711.00937; Razavi et al., VQ-VAE-2, arXiv 1906.00446; unit length, Yu et al.,
ViT-VQGAN, arXiv 2110.04627; restarts, Dhariwal et al., Jukebox, arXiv 2005.00341.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from mmdiff.config import Tokenizer, require
from mmdiff.tokenizers import codebook
from mmdiff.tokenizers.quantizers.base import Arrays, Learning, Quantized, squared_error, straight_through
from mmdiff.tokenizers.quantizers.rotation import rotate_to

SMOOTHING = 1e-5  # eps of (4)


def of(settings: Tokenizer) -> "VQ":
    """As configured."""
    return VQ(
        settings.codes,
        settings.code_width,
        decay=settings.decay,
        commitment=settings.commitment,
        normalise=settings.normalise,
        restart=settings.restart if settings.update == "ema" else 0.0,
        gradient=settings.gradient,
        update=settings.update,
    )


@dataclasses.dataclass(frozen=True)
class VQ:
    """Nearest code of a learnt codebook."""

    size: int
    width: int
    decay: float = 0.99
    commitment: float = 0.25
    normalise: bool = True
    restart: float = 0.1
    """Share of the average count below which a code is dead; 0: codes are never restarted."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    update: Literal["ema", "loss"] = "ema"

    def __post_init__(self):
        require(self.size >= 2, f"VQ.size={self.size} must be at least 2.")
        require(self.width >= 1, f"VQ.width={self.width} must be at least 1.")
        require(
            self.width > 1 or not self.normalise,
            "VQ.width=1 leaves two codes of unit length, 1 and -1; use a larger width, normalise=False or LFQ.",
        )
        require(0 <= self.decay < 1, f"VQ.decay={self.decay} must be at least 0 and below 1.")
        require(self.commitment >= 0, f"VQ.commitment={self.commitment} must not be negative.")
        require(0 <= self.restart < 1, f"VQ.restart={self.restart} must be at least 0 (no restarts) and below 1.")
        known = ("straight_through", "rotation")
        require(self.gradient in known, f"VQ.gradient={self.gradient!r} is unknown; known: {', '.join(known)}.")
        require(self.update in ("ema", "loss"), f"VQ.update={self.update!r} is unknown; known: ema, loss.")
        require(
            self.update == "ema" or self.restart == 0,
            f"VQ.restart={self.restart} needs VQ.update='ema'; with update='loss' set restart=0.",
        )

    @property
    def bits(self) -> float:
        return math.log2(self.size)

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        codes = jax.random.normal(key, (self.size, self.width)) / math.sqrt(self.width)
        if self.update == "loss":
            return {"codes": codes}, {}
        return {}, {"codes": codes, "counts": jnp.ones(self.size), "sums": codes}

    def __call__(self, params: Arrays, state: Arrays, z: jax.Array, learning: Learning | None = None) -> Quantized:
        """See Quantizer; learning with restarts needs a key."""
        z = self._of_length(jnp.asarray(z, jnp.float32))
        table = self._table(params, state)
        ids = codebook.nearest(z, table)
        code = jnp.take(table, ids, axis=0)
        weight = learning.weight if learning is not None else None
        loss = self.commitment * squared_error(z, code, weight)
        if self.update == "loss":
            loss += squared_error(code, z, weight)
        elif learning is not None:
            state = self._updated(state, jax.lax.stop_gradient(z), ids, learning)
        codes = rotate_to(z, code) if self.gradient == "rotation" else straight_through(z, code)
        return Quantized(codes, ids, loss, state)

    def decode(self, params: Arrays, state: Arrays, ids: jax.Array) -> jax.Array:
        return jnp.take(self._table(params, state), ids, axis=0)

    def _table(self, params: Arrays, state: Arrays) -> jax.Array:
        """The codes as compared and decoded."""
        codes = params["codes"] if self.update == "loss" else jax.lax.stop_gradient(state["codes"])
        return self._of_length(codes)

    def _of_length(self, x: jax.Array) -> jax.Array:
        return codebook.unit(x) if self.normalise else x

    def _updated(self, state: Arrays, z: jax.Array, ids: jax.Array, learning: Learning) -> Arrays:
        """(3) and (4), then (5)."""
        key, weight, restart = learning
        state = jax.lax.stop_gradient(state)
        n = codebook.counts(ids, self.size, weight)
        m = codebook.sums(z, ids, self.size, weight)
        counts = self.decay * state["counts"] + (1 - self.decay) * n
        sums = self.decay * state["sums"] + (1 - self.decay) * m
        smoothed = (counts + SMOOTHING) * counts.sum() / (counts.sum() + self.size * SMOOTHING)
        codes = jnp.where((n > 0)[:, None], sums / smoothed[:, None], state["codes"])
        if self.restart:
            if key is None:
                raise ValueError("VQ draws donors for dead codes in training: pass key=, or set restart=0.")
            usual = counts.mean()
            donor, restarted = codebook.donors(key, (counts < self.restart * usual) & restart, z, weight)
            codes = jnp.where(restarted[:, None], donor, codes)
            sums = jnp.where(restarted[:, None], usual * donor, sums)
            counts = jnp.where(restarted, usual, counts)
        return {"codes": codes, "counts": counts, "sums": sums}
