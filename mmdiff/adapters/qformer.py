"""BLIP-2's Q-Former behind a front end: its queries, which read the image and one another, in the model's width.

    v = Q-Former(features) W                        queries in no order: each reads all others (mmdiff/nn/qformer.py)

It may have been trained by itself before (mmdiff/adapters/qformer_losses.py); here there is no text in it. All positions of
the tower are read, the class token too.

Letters: n images, s positions of the tower, f its width, k queries, d the model's width. Source: Li et al., arXiv 2301.12597.
"""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.adapters.base import Adapter, sizes
from mmdiff.adapters.layers import linear
from mmdiff.config import FrontEnd, require
from mmdiff.nn.qformer import QFormer
from mmdiff.parallel.sharding import Placement
from mmdiff.pretrained.load import Rule, load_module, read_config
from mmdiff.pretrained.tower import on_host

OWN = [Rule(r"former/(.*)", "{}")]
TEXT = [r"(?!former/).*"]  # what the Q-Former learnt from texts with


class QFormerAdapter(Adapter):
    def __init__(
        self, inputs: int, outputs: int, tokens: int, width: int, depth: int, heads: int, rngs: nnx.Rngs, place: Placement
    ):
        self.former = QFormer(width, inputs, depth, heads, tokens, rngs)
        self.out = linear(width, outputs, rngs, place)

    @classmethod
    def of(cls, front: FrontEnd, width: int, rngs: nnx.Rngs, place: Placement) -> Self:
        return cls(*sizes(front, width), rngs, place)

    def __call__(self, features: jax.Array) -> jax.Array:
        """[n, s, f] to [n, k, d]."""
        count = self.former.queries.shape[0]
        return self.out(self.former(features, jnp.ones((1, count, count), bool))[0].astype(features.dtype))

    @staticmethod
    def trained(front: FrontEnd, width: int, tower: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        found, wide = read_config(front.init), front.width or width
        wanted = {"tokens": front.tokens, "width": wide, "depth": front.depth, "heads": front.heads}
        wanted |= {"skipped": front.skipped, "features": front.tower.width}
        for name, value in wanted.items():
            field = "tower.width" if name == "features" else name
            require(
                found.get(name) == value,
                f"front_end.{field}={value}, and the Q-Former in {front.init} was trained with {found.get(name)}: set it "
                f"to that.",
            )
        shape = wide, front.tower.width, front.depth, front.heads, front.tokens
        former = load_module(lambda: QFormer(*shape, nnx.Rngs(0)), front.init, OWN, ignored=TEXT)
        return tower, {"former": on_host(former)}


ADAPTER = QFormerAdapter
