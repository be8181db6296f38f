"""What a training step costs: by hand, and counted from the traced program."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mmdiff import config
from mmdiff.adapters.front_end import find, look
from mmdiff.image_paths.base import image_path
from mmdiff.layout import Rows, empty_row
from mmdiff.models.network import Network
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.tokenizers.semantic import SemanticNetwork


def training_flops(cfg: config.Config, vocabulary_size: int) -> float:
    """Floating-point operations of one training step: three times those counted in the traced forward pass, of which a frozen
    vision tower counts once.

    Attention in its dense form and at full row length; what the backward pass computes again does not count. The further
    evaluations of few-step training have no backward pass.
    """
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention="dense"))
    if cfg.model.network in config.TOKENIZERS:
        return _tokenizer_flops(cfg, vocabulary_size)
    network = Network.of(cfg, vocabulary_size)
    params = jax.eval_shape(network.init, jax.random.key(0))
    rows = _abstract_rows(cfg)
    path, plain = image_path(cfg.layout), dataclasses.replace(cfg, few_step=config.FewStep())
    key = jax.eval_shape(lambda: jax.random.key(0))
    once = _frozen_flops(network, rows)  # has no backward pass

    def counted(cfg: config.Config) -> float:
        noise = jax.eval_shape(functools.partial(path.noise, network, cfg), rows, key)
        return counted_flops(functools.partial(path.losses, network, cfg), params, rows, *noise)

    if cfg.few_step.objective == "none":
        return 3 * counted(cfg) - 2 * once
    return 2 * counted(plain) + counted(cfg)


def _abstract_rows(cfg: config.Config) -> Rows:
    """Shapes of a batch."""
    row = empty_row(cfg.layout.row_length, cfg.patch_values)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((cfg.training.batch_size, *a.shape), a.dtype), row)


def _frozen_flops(network: Network, rows: Rows) -> float:
    """The forward pass of a frozen vision tower over all images of a batch, as many as rows have room for."""
    if not network.frozen or network.size is None:
        return 0.0
    found = jax.eval_shape(functools.partial(find, grid=network.front.grid), rows.patches, rows.cell)
    pixels = jax.ShapeDtypeStruct((found.at.shape[0] * found.at.shape[1], *network.size, 3), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0))
    return counted_flops(lambda params, pixels: look(network.bind(params).tower, pixels, network.front), params, pixels)


def _tokenizer_flops(cfg: config.Config, vocabulary_size: int) -> float:
    """The same of a tokenizer without its discriminator and its perceptual distance; v2l's tower counts as the rest."""
    plain = dataclasses.replace(cfg.tokenizer, adversarial=0.0, adversarial_start=0, perceptual=0.0, perceptual_weights="")
    cfg = dataclasses.replace(cfg, tokenizer=plain)
    network = TokenizerNetwork.of(cfg, None, vocabulary_size)
    params, key = jax.eval_shape(network.init, jax.random.key(0)), jax.eval_shape(lambda: jax.random.key(0))
    rows, step = _abstract_rows(cfg), jax.ShapeDtypeStruct((), jnp.int32)
    once = counted_flops(network.looked, params, rows) if isinstance(network, SemanticNetwork) else 0.0
    return 3 * counted_flops(network.objective(cfg), params, rows, key, step) - 2 * once


def flops_by_hand(cfg: config.Config, vocabulary_size: int) -> float:
    """The same for the transformer in its usual form, from a formula: 2 per multiply-add of its matrix products."""
    model, length = cfg.model, cfg.layout.row_length
    if model.block == "gau":
        gated = model.expansion * model.width
        layer = model.width * (2 * gated + model.key_width) + gated * model.width
        mix = length * (model.key_width + gated)
    else:
        inner = -(-8 * model.width // 3 // 64) * 64
        layer = 4 * model.width**2 + 3 * model.width * inner
        mix = 2 * length * model.width
    raw = {"denoised": 2, "read": 1}.get(cfg.layout.images, 0)  # maps of raw patches: into the network, and out of it
    heads = model.width * (vocabulary_size + raw * 3 * model.patch**2)
    return 3 * 2 * cfg.training.batch_size * length * (model.depth * (layer + mix) + heads)


def counted_flops(function, *arguments) -> float:
    """Operations of the matrix products and convolutions in `function(*arguments)` as JAX traces it, loops multiplied out.

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
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]  # rhs_spec[0]: the axis of output features
        return 2.0 * per_output * math.prod(equation.outvars[0].aval.shape)
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
