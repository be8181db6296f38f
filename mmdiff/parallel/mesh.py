"""The device mesh: a grid of data x fsdp x tensor. What is split over which axis: mmdiff/parallel/sharding.py."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmdiff import config
from mmdiff.config import ConfigError
from mmdiff.parallel.sharding import Placement

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    settings: config.Mesh, training: config.Training | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arrange the devices (default: all of all processes) as `settings` says.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or the rows that `training` works on at a time do
        not divide over data x fsdp.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(settings, name) for name in AXES]
    fixed = int(np.prod([s for s in sizes if s != -1]))
    told = " x ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise ConfigError(
            f"{told} does not fit {len(devices)} devices: the sizes must multiply to it. Leave one at -1, for all that remain."
        )
    shape = tuple(len(devices) // fixed if s == -1 else s for s in sizes)
    parts = shape[0] * shape[1]
    if training is not None and training.batch_size // training.accumulate % parts:
        raise ConfigError(
            f"training.batch_size={training.batch_size} in training.accumulate={training.accumulate} pieces is "
            f"{training.batch_size // training.accumulate} rows at a time, which do not divide over the {parts} devices along "
            f"data x fsdp; use a multiple of {parts}."
        )
    # Auto axes: under Explicit ones, embedding look-ups and Muon raise sharding errors
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """The rows of a batch that this process's devices hold, in order."""
    held = _by_rows(mesh, (rows,)).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index for row in range(*index[0].indices(rows))})


def place_rows(batch: Any, mesh: Mesh, size: int | None = None) -> Any:
    """Host arrays to global arrays split over the devices.

    Args:
      batch: pytree of arrays [b, ...], a whole batch; with `size`, only the `local_rows` of a batch of that many rows.
    """
    where = None if size is None else {row: i for i, row in enumerate(local_rows(mesh, size))}

    def place(array):
        array = np.asarray(array)
        shape = (size or len(array), *array.shape[1:])

        def part(index):
            rows = range(*index[0].indices(shape[0]))
            return array[rows.start : rows.stop] if where is None else array[[where[row] for row in rows]]

        return jax.make_array_from_callback(shape, _by_rows(mesh, shape), part)

    return jax.tree.map(place, batch)


def _by_rows(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    return Placement(mesh).sharding(shape, ("rows", *[None] * (len(shape) - 1)))
