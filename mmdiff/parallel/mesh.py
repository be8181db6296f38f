"""The device mesh: one axis, `data`; rows are split over it, everything else is replicated."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmdiff.config import ConfigError


def make_mesh(batch_size: int) -> Mesh:
    """All devices along `data`.

    Raises:
      ConfigError: the batch does not divide over the devices.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise ConfigError(
            f"training.batch_size={batch_size} is not divisible by the {len(devices)} devices; use a multiple of them."
        )
    # Auto axes: under Explicit ones, embedding look-ups and Muon raise sharding errors
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def place_rows(batch, mesh: Mesh):
    """Host arrays [b, ...] to global arrays split over `data`."""
    return jax.device_put(batch, by_rows(mesh))
