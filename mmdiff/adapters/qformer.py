"""BLIP-2's Q-Former behind a front end: its queries, which read the image and one another, in the model's width.

    v = Q-Former(features) W                        queries in no order: each reads all others (mmdiff/nn/qformer.py)

It may have been trained by itself before (mmdiff/adapters/qformer_losses.py); here there is no text in it. All positions of
the tower are read, the class token too.

Letters: n images, s positions of the tower, f its width, k queries, d the model's width. Source: Li et al., arXiv 2301.12597.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.adapters.layers import linear
from mmdiff.nn.qformer import QFormer
from mmdiff.parallel.sharding import Placement


class QFormerAdapter(nnx.Module):
    def __init__(
        self, inputs: int, outputs: int, tokens: int, width: int, depth: int, heads: int, rngs: nnx.Rngs, place: Placement
    ):
        self.former = QFormer(width, inputs, depth, heads, tokens, rngs)
        self.out = linear(width, outputs, rngs, place)

    def __call__(self, features: jax.Array) -> jax.Array:
        """[n, s, f] to [n, k, d]."""
        count = self.former.queries.shape[0]
        return self.out(self.former(features, jnp.ones((1, count, count), bool))[0].astype(features.dtype))
