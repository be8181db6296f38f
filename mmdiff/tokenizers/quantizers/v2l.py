"""Codes that are words: an image as a few words about all of it, and one subword of a language model for each of its places.

    (1) local    e_v = b_v W + s                      b frozen: embeddings of the language model's vocabulary; W, s trained
                 id = argmin_v |z / |z| - e_v|
    (2) global   the k words g nearest to the image's own vector f, of length 1: smallest |f - g|, nearest first
    (3) loss     = 0.33 mean (stop(z) - e_id)^2 + commitment mean (z - stop(e_id))^2

What is quantised is [f k times; z at l places], so that the codes of an image are one row: its k global ids, then its local
ones. Ids are of one vocabulary, 0 .. v - 1 local and v .. v + g - 1 global, and `decode` knows all of them at every place: a
model that draws codes may put any word anywhere. Bits: k log2 g + l log2 v.

g is not mapped and f is not trained, nor is b; |g| < 1, since they are means of unit vectors, and (2) heeds that. Source: Zhu
et al., arXiv 2403.07874, and the code published with it, where commitment is 1. Ours: W and s start such that the codes have
mean 0 and mean square length 1, z's length; there W is random, and where embeddings all lie to one side, as text embeddings
do, most codes are then far from every z.

Shapes: z [..., k + l, e]; params {"map" W [e, e], "shift" s [e]}; state {"local" b [v, e], "global" g [g, e], "tower"}.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.config import Tokenizer, require
from mmdiff.pretrained.tower import Tower, named, numbered
from mmdiff.tokenizers import codebook
from mmdiff.tokenizers.quantizers.base import Arrays, Learning, Quantized, squared_error, straight_through
from mmdiff.tokenizers.v2l.words import read_words

MAP_WEIGHT = 0.33


def of(settings: Tokenizer) -> "V2L":
    """As configured."""
    return V2L(
        settings.codes,
        settings.global_codes,
        settings.global_tokens,
        settings.code_width,
        settings.tower,
        settings.words,
        commitment=settings.commitment,
    )


@dataclasses.dataclass(frozen=True)
class V2L:
    """See above."""

    local: int
    global_: int
    count: int
    width: int
    tower: config.Tower
    words: str
    """File that `given` takes the frozen part from; nothing else needs it."""
    commitment: float = 1.0

    @property
    def size(self) -> int:
        return self.local + self.global_

    @property
    def bits(self) -> float:
        """Of a local code."""
        return math.log2(self.local)

    @property
    def global_bits(self) -> float:
        return self.count * math.log2(self.global_)

    def init(self, key: jax.Array) -> tuple[Arrays, Any]:
        """Zeros for words and tower, so that shapes need no file; `given` has what they are, and where the map starts."""
        tower = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Tower(self.tower, nnx.Rngs(0)))))
        empty = {"local": jnp.zeros((self.local, self.width)), "global": jnp.zeros((self.global_, self.width))}
        empty |= {"tower": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), named(tower))}
        return {"map": jnp.eye(self.width), "shift": jnp.zeros(self.width)}, empty

    def given(self) -> tuple[Arrays, Any]:
        """(params, state) with the words and the tower of the file.

        Raises:
          DataError: it is no file of words. ConfigError: one of other sizes.
        """
        words = read_words(self.words)
        for name, found, field in (
            ("codes", words.local.shape[0], self.local),
            ("code_width", words.local.shape[1], self.width),
            ("global_codes", words.global_.shape[0], self.global_),
            ("tower", words.tower, self.tower),
        ):
            require(found == field, f"tokenizer.{name}={field}, and {self.words} has {found}: set it to that.")
        state = words.arrays()

        @jax.jit  # with the words as a constant: another program adds in another order, and a run would begin with other bits
        def start() -> Arrays:
            centre = state["local"].mean(0)
            scale = jax.lax.rsqrt(jnp.square(state["local"] - centre).sum(-1).mean())
            return {"map": scale * jnp.eye(self.width), "shift": -scale * centre}

        return start(), state

    def seen(self, state: Any, images: jax.Array, z: jax.Array) -> jax.Array:
        """[f k times; z] of images [n, h, w, 3] in [-1, 1] and z [n, l, e]."""
        graph = nnx.graphdef(nnx.eval_shape(lambda: Tower(self.tower, nnx.Rngs(0))))
        _, whole = nnx.merge(graph, numbered(state["tower"]))(images)
        return jnp.concatenate([jnp.broadcast_to(whole[:, None], (len(z), self.count, self.width)), z], axis=1)

    def __call__(self, params: Arrays, state: Any, z: jax.Array, learning: Learning | None = None) -> Quantized:
        """See Quantizer; of `learning` only the weight makes a difference."""
        z, weight = jnp.asarray(z, jnp.float32), learning.weight if learning is not None else None
        weight = weight[..., self.count :] if weight is not None else None
        words = jax.lax.stop_gradient(state["global"])
        products = jnp.einsum("...e,ge->...g", jax.lax.stop_gradient(z[..., 0, :]), words, precision=jax.lax.Precision.HIGHEST)
        nearest = jax.lax.top_k(products - jnp.square(words).sum(-1) / 2, self.count)[1].astype(jnp.int32)
        places = codebook.unit(z[..., self.count :, :])
        table = _table(params, state)
        ids = codebook.nearest(places, table)
        code = jnp.take(table, ids, axis=0)
        loss = MAP_WEIGHT * squared_error(code, places, weight) + self.commitment * squared_error(places, code, weight)
        codes = jnp.concatenate([jnp.take(words, nearest, axis=0), straight_through(places, code)], axis=-2)
        return Quantized(codes, jnp.concatenate([self.local + nearest, ids], axis=-1), loss, state)

    def decode(self, params: Arrays, state: Any, ids: jax.Array) -> jax.Array:
        return jnp.take(jnp.concatenate([_table(params, state), state["global"]]), ids, axis=0)


def _table(params: Arrays, state: Any) -> jax.Array:
    """(1)."""
    basis = jax.lax.stop_gradient(state["local"])
    return jnp.matmul(basis, params["map"], precision=jax.lax.Precision.HIGHEST) + params["shift"]
