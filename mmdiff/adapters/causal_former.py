"""Emu's causal former: T5's decoder on learned queries, each of which reads those before it and the whole image.

    v = T5(queries, context = norm(features) W) W_out                 token i does not depend on later queries

so that an image becomes a sequence that can be predicted from left to right (mmdiff/image_paths/next_embedding.py). Ours: the
linear map of the features to the decoder's width, and the division of fresh query weights by the root of a head's width,
since T5's scores are not divided by it.

Letters: n images, s positions of the tower, f its width, k queries, w the decoder's width, d the model's.
Sources: Sun et al., Emu, arXiv 2307.05222; T5, arXiv 1910.10683.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.adapters.base import Adapter, sizes
from mmdiff.adapters.layers import Norm, linear
from mmdiff.config import FrontEnd
from mmdiff.nn.layers import gather, parameter
from mmdiff.parallel.sharding import Placement
from mmdiff.pretrained.t5 import T5Decoder


class CausalFormer(Adapter):
    def __init__(
        self, inputs: int, outputs: int, tokens: int, width: int, depth: int, heads: int, rngs: nnx.Rngs, place: Placement
    ):
        self.place, head = place, width // heads
        sizes = {"d_model": width, "d_kv": head, "d_ff": 4 * width, "num_layers": depth, "num_heads": heads}
        self.norm, self.into = Norm(inputs, rngs), linear(inputs, width, rngs, place)
        self.queries = parameter(jax.random.normal(rngs.params(), (tokens, width)), (None, None))
        self.decoder = T5Decoder(sizes, rngs)
        for layer in self.decoder.layers:
            for attention in (layer.own, layer.cross):
                attention.q.kernel[...] = attention.q.kernel[...] * head**-0.5
        self.out = linear(width, outputs, rngs, place)

    @classmethod
    def of(cls, front: FrontEnd, width: int, rngs: nnx.Rngs, place: Placement) -> Self:
        return cls(*sizes(front, width), rngs, place)

    def __call__(self, features: jax.Array) -> jax.Array:
        """[n, s, f] to [n, k, d]."""
        context = self.into(self.norm(features))
        table = gather(self.queries, context.dtype, self.place)
        queries = jnp.broadcast_to(table, (len(context), *table.shape))
        return self.out(self.decoder(queries, context).astype(context.dtype))


ADAPTER = CausalFormer
