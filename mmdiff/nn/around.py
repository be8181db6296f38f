"""What every layer is told beside its input: where its positions are, what they may read, and what time it is for them."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from mmdiff import config
from mmdiff.layout import IntervalMask
from mmdiff.nn.layers import Linear, parameter, parts
from mmdiff.nn.rope import mixed_frequencies, mixed_rotation, rotate
from mmdiff.nn.strided import View
from mmdiff.parallel.sharding import NOWHERE, Placement

TIME_WIDTH = 128  # of the time as scale, shift and gate read it


class Around(NamedTuple):
    position: jax.Array  # float32 [b, t, 2]
    angles: Any  # Rotation of model.rope="axial", the same for all layers; else None
    mask: IntervalMask
    time: Any = None  # [b, t, TIME_WIDTH], with model.time="adaln"
    view: View | None = None  # with model.sparse


class Turn(nnx.Module):
    """The rotation of one layer's queries and keys [b, h, t, c]."""

    def __init__(self, cfg: config.Model, heads: int, width: int, rngs: nnx.Rngs):
        self.kind = cfg.rope
        if cfg.rope == "mixed":
            frequencies = mixed_frequencies(rngs.params(), heads, width, cfg.rope_base)
            self.frequencies = parameter(frequencies, ("heads" if heads > 1 else None, None, None))

    def __call__(self, around: Around, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.kind == "none":
            return q, k
        mixed = self.kind == "mixed"
        angles = mixed_rotation(around.position, self.frequencies[...]) if mixed else around.angles
        return rotate(q, angles), rotate(k, angles)


class Modulation(nnx.Module):
    """adaLN-Zero: h <- h (1 + scale) + shift before a branch, x <- x + gate branch(h) behind it; the gates start at 0.

    Source: Peebles and Xie, DiT, arXiv 2212.09748. The times of a row differ by position, so scale, shift and gate do too;
    they are linear in TIME_WIDTH smooth features, which all layers share.
    """

    def __init__(self, cfg: config.Model, branches: int, rngs: nnx.Rngs, place: Placement = NOWHERE):
        outputs = (3 * branches, cfg.width)
        self.linear = Linear(TIME_WIDTH, outputs, rngs, axes=(None, None, "width"), gain=0.0, bias=True, place=place)

    def __call__(self, time: jax.Array) -> list[jax.Array]:
        """[b, t, TIME_WIDTH] to scale, shift and gate [b, t, d] of each branch in turn."""
        return parts(self.linear(time))
