"""The one place where a V2L decoder reads the image's global words: in its middle.

    x <- softmax(q k^T / sqrt(c)) v W_out            q of the map x, k and v of the words' embeddings

As in the code published with the V2L Tokenizer (Zhu et al., arXiv 2403.07874) this takes the place of x: what the local codes
said passes on only as far as it decides which words a position reads. With tokenizer.residual it is added to x instead, as an
attention layer usually is: an ablation of ours, which says what that costs.

Letters: n images, t positions, k words, d width, e width of a word's embedding, h heads, c width of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.models.image_layers import dense
from mmdiff.parallel.sharding import Placement

HEADS = 8


class ReadWords(nnx.Module):
    """[n, ..., d] and words [n, k, e] to [n, ..., d]."""

    def __init__(self, cfg: config.Model, width: int, word_width: int, residual: bool, rngs: nnx.Rngs, place: Placement):
        inner = HEADS * cfg.head_width
        self.residual = residual
        self.q = dense(width, inner, rngs, place)
        self.k, self.v = (dense(word_width, inner, rngs, place) for _ in range(2))
        self.out = dense(inner, width, rngs, place)

    def __call__(self, x: jax.Array, words: jax.Array) -> jax.Array:
        flat, words = x.reshape(len(x), -1, x.shape[-1]), words.astype(x.dtype)
        split = lambda a: a.reshape(*a.shape[:2], HEADS, -1)
        q, k, v = split(self.q(flat)), split(self.k(words)), split(self.v(words))
        scores = jnp.einsum("nthc,nkhc->nhtk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        mixed = jnp.einsum("nhtk,nkhc->nthc", jax.nn.softmax(scores).astype(v.dtype), v)
        read = self.out(mixed.reshape(*flat.shape[:2], -1)).reshape(x.shape)
        return x + read if self.residual else read
