"""What accelerators can do at most, from their makers' data sheets. Figures are of one chip.

TPU: cloud.google.com/tpu/docs (system architecture); NVIDIA: data sheets, dense figures without sparsity. `link` is what
a chip can send over the interconnect, all links together; for GPUs NVLink within a node.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax


class Chip(NamedTuple):
    flops: float  # bfloat16, per second
    memory: float  # bytes
    bandwidth: float  # bytes per second, of that memory
    link: float  # bytes per second


# matched in this order against device_kind
CHIPS = {
    "TPU7x": Chip(2307e12, 192e9, 7380e9, 1200e9),
    "TPU v6": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 600e9),  # v5p
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9),
    "H100": Chip(989e12, 80e9, 3350e9, 450e9),
    "A100": Chip(312e12, 80e9, 2039e9, 300e9),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip behind a device, or None where it is not known, as for CPUs."""
    return next((chip for name, chip in CHIPS.items() if name in device.device_kind), None)


def peak_flops(devices: Sequence[jax.Device]) -> float:
    """Peak of all devices together; 0 where it is not known."""
    chip = chip_of(devices[0])
    return chips(devices) * chip.flops if chip else 0.0


def chips(devices: Sequence[jax.Device]) -> float:
    """Number of chips; two devices may be the cores of one."""
    return len(devices) / _cores(devices)


def _cores(devices: Sequence[jax.Device]) -> int:
    """Devices per chip: those that share their coordinates."""
    where = [(getattr(device, "coords", None), getattr(device, "slice_index", 0)) for device in devices]
    return 1 if where[0][0] is None else where.count(where[0])
