"""What a training step costs: by hand, and counted from the traced program."""

import math
from typing import Any

import jax

from mmdiff import config


def training_flops(cfg: config.Config, vocabulary_size: int) -> float:
    """Floating-point operations of one training step: matrix products, forward and backward (three times forward).

    Counted by hand, 2 per multiply-add; attention at full row length, nothing recomputed.
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


def counted_flops(function, *arguments) -> float:
    """Operations of the matrix products in `function(*arguments)` as JAX traces it, loops multiplied out.

    XLA's own count takes the body of a scan once. Loops of unknown length (`while`) count as running once, of a
    conditional the most expensive branch counts. What a kernel computes by itself is not seen.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Any) -> float:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(left[axis] for axis in contracted) * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        return max(_flops(branch.jaxpr) for branch in params["branches"])
    inner = sum(_flops(getattr(value, "jaxpr", value)) for value in params.values() if _is_jaxpr(value))
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":  # its body is what one device does
        return math.prod(params["mesh"].shape.values()) * inner
    return inner


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")
