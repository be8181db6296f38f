"""What a training step costs, and what the devices could do at most."""

from collections.abc import Sequence

import jax

from mmdiff import config

# Dense bfloat16 peaks of one device in FLOP/s, from the makers' data sheets; matched in this order against device_kind.
PEAKS = {
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v4": 275e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(devices: Sequence[jax.Device]) -> float:
    """Peak of all devices together; 0 where it is not known, as for CPUs."""
    kind = devices[0].device_kind
    return len(devices) * next((peak for name, peak in PEAKS.items() if name in kind), 0.0)


def training_flops(cfg: config.Config, vocabulary_size: int) -> float:
    """Floating-point operations of one training step: matrix products, forward and backward (three times forward).

    Counted by hand, 2 per multiply-add, because XLA counts the body of a scan once; attention at full row length.
    """
    model, length = cfg.model, cfg.layout.row_length
    if model.block == "gau":
        gated = model.expansion * model.width
        layer = model.width * (2 * gated + model.key_width) + gated * model.width
        mix = length * (model.key_width + gated)
    else:
        inner = -(-8 * model.width // 3 // 64) * 64
        layer = 4 * model.width**2 + 3 * model.width * inner
        mix = 2 * length * model.width
    heads = model.width * (vocabulary_size + 2 * 3 * model.patch**2)
    return 3 * 2 * cfg.training.batch_size * length * (model.depth * (layer + mix) + heads)
