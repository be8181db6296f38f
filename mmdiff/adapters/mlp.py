"""LLaVA 1.5's bridge, arXiv 2310.03744: every patch by itself, through two layers (mmdiff/adapters/linear.py)."""

from typing import Self

from flax import nnx

from mmdiff.adapters.linear import PerPatch
from mmdiff.config import FrontEnd
from mmdiff.parallel.sharding import Placement


class TwoLayers(PerPatch):
    @classmethod
    def of(cls, front: FrontEnd, width: int, rngs: nnx.Rngs, place: Placement) -> Self:
        return cls(front.tower.width, width, rngs, place, hidden=True)


ADAPTER = TwoLayers
