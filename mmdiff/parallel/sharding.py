"""Which array axis is split over which axis of the device mesh.

Parameters and activations name their axes; one table says where a named axis goes:

    rows         data, fsdp    activations: every device works on its own rows
    width        fsdp          parameters: stored in parts, gathered for the layer that is about to run
    heads        tensor        attention heads: q, k, v and the output projection
    expansion    tensor        the inner width of GAU and SwiGLU
    vocabulary   tensor        embedding table, language head, logits

Everything else is whole on every device. An axis that its mesh axes do not divide is split over the leading ones that
do, or stays whole. The program is written for whole arrays; XLA inserts the communication (global-view jit).
"""

import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "expansion": ("tensor",),
    "vocabulary": ("tensor",),
}
STORED = "width"  # the axis that is split in storage only

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Applies the table on one mesh; without a mesh it leaves everything as it is. Hashable."""

    mesh: Mesh | None = None

    def spec(self, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """The mesh axes of each axis of an array."""
        entries = []
        for size, name in zip(shape, axes, strict=True):
            taken: list[str] = []
            for axis in RULES[name] if name is not None else ():
                count = math.prod(self.mesh.shape[a] for a in (*taken, axis)) if self.mesh is not None else 1
                if size % count:
                    break
                taken.append(axis)
            entries.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
        return PartitionSpec(*entries)

    def sharding(self, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
        """The same as a sharding; only with a mesh."""
        if self.mesh is None:
            raise ValueError("a sharding needs a mesh.")
        return NamedSharding(self.mesh, self.spec(shape, axes))

    @property
    def split(self) -> bool:
        """Whether there is more than one device."""
        return self.mesh is not None and self.mesh.size > 1

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`x`, told to XLA to lie so; call it inside jit."""
        if not self.split:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, axes))

    def gathered(self, parameter: jax.Array, axes: Axes) -> jax.Array:
        """A parameter made whole along its stored axis, for use in the layer that runs now."""
        return self(parameter, *(None if name == STORED else name for name in axes))


NOWHERE = Placement()
