"""Flamingo's perceiver resampler: however many features an image has, a fixed number of latents read them all.

    x        = features W                                           to the adapter's width (ours: the paper's widths are equal)
    latents += attention(q = norm latents, kv = [norm x; norm latents]);   latents += mlp(norm latents)       each layer
    v        = norm(latents) W_out

Linear layers inside have no bias. The class token is left out. Letters: n images, s = 1 + patches positions of the tower, f
its width, k latents, w the adapter's width, d the model's. Source: Alayrac et al., arXiv 2204.14198, section 3.1.1.
"""

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.adapters.base import Adapter, sizes
from mmdiff.adapters.layers import MLP, Attention, Norm, linear
from mmdiff.config import FrontEnd
from mmdiff.nn.layers import gather, parameter
from mmdiff.parallel.sharding import Placement


class ResamplerLayer(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, place: Placement):
        self.norm_features, self.norm_latents, self.norm_mlp = (Norm(width, rngs) for _ in range(3))
        self.attention = Attention(width, width, heads, rngs, place, bias=False)
        self.mlp = MLP(width, rngs, place, bias=False)

    def __call__(self, latents: jax.Array, x: jax.Array) -> jax.Array:
        """Latents [n, k, w] that read features [n, s - 1, w], and one another."""
        own = self.norm_latents(latents)
        latents = latents + self.attention(own, jnp.concatenate([self.norm_features(x), own], axis=1))
        return latents + self.mlp(self.norm_mlp(latents))


class Resampler(Adapter):
    def __init__(
        self, inputs: int, outputs: int, tokens: int, width: int, depth: int, heads: int, rngs: nnx.Rngs, place: Placement
    ):
        self.place, self.into = place, linear(inputs, width, rngs, place)
        self.latents = parameter(jax.random.normal(rngs.params(), (tokens, width)), (None, None))
        self.layers = nnx.List([ResamplerLayer(width, heads, rngs, place) for _ in range(depth)])
        self.norm, self.out = Norm(width, rngs), linear(width, outputs, rngs, place)

    @classmethod
    def of(cls, front: FrontEnd, width: int, rngs: nnx.Rngs, place: Placement) -> Self:
        return cls(*sizes(front, width), rngs, place)

    def __call__(self, features: jax.Array) -> jax.Array:
        """[n, s, f] to [n, k, d]."""
        x = self.into(features[:, 1:])
        table = gather(self.latents, x.dtype, self.place)
        latents = jnp.broadcast_to(table, (len(x), *table.shape))
        for layer in self.layers:
            latents = layer(latents, x)
        return self.out(self.norm(latents))


ADAPTER = Resampler
