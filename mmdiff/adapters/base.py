"""What every front end offers: an adapter, and if need be a vision tower and weights of its own.

The adapter that front_end.kind names is `ADAPTER` in the file of that name here: to add one, write its file and say in
mmdiff/config_front_end.py which settings it heeds. The tower is a part of the network's parameters under the name `TOWER`, so
that checkpoints hold it; frozen (front_end.frozen) it has no gradient, no optimiser's state and no update.

Letters: n images, s = 1 + patches positions of the tower, f its width, k vectors of an image, d the model's width.
"""

import importlib
from typing import Any, Self

import jax
from flax import nnx

from mmdiff.config import FrontEnd
from mmdiff.parallel.sharding import Placement
from mmdiff.pretrained.encoder import VisionTower
from mmdiff.pretrained.tower import vision_config

TOWER = "tower"


class Adapter(nnx.Module):
    """Features of a tower to vectors of the model; `of` and `__call__` are to be written, the rest where the usual is not
    enough."""

    @classmethod
    def of(cls, front: FrontEnd, width: int, rngs: nnx.Rngs, place: Placement) -> Self:
        """With random weights; `width`: of the model."""
        raise NotImplementedError

    def __call__(self, features: jax.Array) -> jax.Array:
        """[n, s, f] to [n, k, d]."""
        raise NotImplementedError

    def see(self, features: jax.Array, tower: Any) -> jax.Array:
        """As `__call__`, of features of this tower, which `tower` made."""
        return self(features)

    @staticmethod
    def tower(front: FrontEnd, rngs: nnx.Rngs) -> VisionTower:
        """With random weights."""
        sizes, clip = front.tower, front.names == "clip"
        return VisionTower(vision_config(sizes), rngs, patch_bias=not clip, first_norm=clip)

    @staticmethod
    def trained(front: FrontEnd, width: int, tower: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters of the tower and of the adapter, as far as they come from front_end.init; `tower`: those from
        front_end.encoder.

        Raises:
          ConfigError, DataError: the folder does not hold what the configuration says.
        """
        raise NotImplementedError


def adapter(front: FrontEnd) -> type[Adapter]:
    """The class that a configuration names."""
    return importlib.import_module(f"{__package__}.{front.kind}").ADAPTER


def sizes(front: FrontEnd, width: int) -> tuple[int, int, int, int, int, int]:
    """Widths of tower and model, vectors of an image; width, depth and heads of an adapter with layers of its own."""
    return front.tower.width, width, front.tokens, front.width or width, front.depth, front.heads
