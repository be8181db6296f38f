"""LLaVA's bridge: every patch of the tower by itself, through one linear layer or two.

    linear   v = x W + b                                   LLaVA, arXiv 2304.08485
    mlp      v = gelu(x W_1 + b_1) W_2 + b_2               LLaVA 1.5, arXiv 2310.03744

The class token is left out. Letters: n images, s = 1 + patches positions of the tower, f its width, d the model's.
"""

from typing import Self

import jax
from flax import nnx

from mmdiff.adapters.base import Adapter
from mmdiff.config import FrontEnd
from mmdiff.nn.layers import Linear
from mmdiff.parallel.sharding import Placement


class PerPatch(Adapter):
    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, place: Placement, *, hidden: bool):
        """`hidden`: with a layer between."""
        linear = lambda a: Linear(a, outputs, rngs, axes=(None, None), bias=True, place=place)
        self.first, self.hidden = linear(inputs), hidden
        if hidden:
            self.second = linear(outputs)

    @classmethod
    def of(cls, front: FrontEnd, width: int, rngs: nnx.Rngs, place: Placement) -> Self:
        return cls(front.tower.width, width, rngs, place, hidden=False)

    def __call__(self, features: jax.Array) -> jax.Array:
        """[n, s, f] to [n, s - 1, d]."""
        x = self.first(features[:, 1:])
        return self.second(jax.nn.gelu(x, approximate=False)) if self.hidden else x


ADAPTER = PerPatch
