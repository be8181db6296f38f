"""What an autoencoder's images are judged by while it learns: a discriminator of local windows, and features of VGG-16.

    D(x)        conv stride 2, then LAYERS - 1 times [conv stride 2, group norm], leaky relu behind each; conv to one score
    (1) judge   1/2 mean relu(1 - D(x)) + 1/2 mean relu(1 + D(x_hat))                    what D minimises (hinge)
    (2) fool    -mean D(x_hat)                                                           what the autoencoder minimises
    (3) weight  |d(error) / dW| / (|d(fool) / dW| + 1e-4), at most 1e4                   W: the decoder's last layer
    (4) perceptual distance = sum over 5 layers of mean over places of |f(x)/|f(x)| - f(x_hat)/|f(x_hat)||^2

(3) makes the two gradients of equal length where they enter the decoder. (4) is LPIPS without its learned weights for
channels, on the same layers of VGG-16 (relu 1_2, 2_2, 3_3, 4_3, 5_3); numbers of it are not LPIPS. Its weights come from a
file of the user's with torchvision's names (features.0.weight, ...).

Shapes: images float32 [n, h, w, 3] in [-1, 1].
Sources: PatchGAN arXiv 1611.07004; (3) VQ-GAN arXiv 2012.09841; (4) LPIPS arXiv 1801.03924.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.document import DataError
from mmdiff.evaluation.state_dict import read_arrays
from mmdiff.models.image_layers import Conv, GroupNorm
from mmdiff.parallel.sharding import Placement

LAYERS, MOST = 3, 1e4
VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG_MEAN, VGG_STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

Weights = list[list[tuple[jax.Array, jax.Array]]]
"""Kernels [3, 3, in, out] and biases of VGG's convolutions, by resolution."""


class Discriminator(nnx.Module):
    """Images to a score for each window of some 30 pixels: float32 [n, h / 8, w / 8]."""

    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement):
        widths = [cfg.width * min(2**layer, 4) for layer in range(LAYERS)]
        self.convs = nnx.Dict(
            {f"{i}": Conv(a, b, rngs, place, stride=2) for i, (a, b) in enumerate(zip([3, *widths], widths, strict=False))}
        )
        self.norms = nnx.Dict({f"{i}": GroupNorm(width) for i, width in enumerate(widths) if i})
        self.out = Conv(widths[-1], 1, rngs, place)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i in range(LAYERS):
            x = self.convs[f"{i}"](x)
            x = jax.nn.leaky_relu(self.norms[f"{i}"](x) if i else x, 0.2)
        return self.out(x)[..., 0]


def judged(real: jax.Array, made: jax.Array) -> jax.Array:
    """Equation (1) of scores [n, ...], for each image: [n]."""
    return (jax.nn.relu(1 - real) + jax.nn.relu(1 + made)).reshape(len(real), -1).mean(-1) / 2


def balance(error: Any, fool: Any) -> jax.Array:
    """Equation (3) of the gradients at the last layer (pytrees)."""
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
    return jax.lax.stop_gradient(jnp.minimum(norm(error) / (norm(fool) + 1e-4), MOST))


def read_vgg(path: Path) -> Weights:
    """The convolutions of VGG-16 from a file with torchvision's names.

    Raises:
      DataError: no such file, or a convolution is missing or has another shape.
    """
    arrays, found, number, inputs = read_arrays(path), [], 0, 3
    for widths in VGG:
        layers = []
        for width in widths:
            kernel, bias = (arrays.get(f"features.{number}.{kind}") for kind in ("weight", "bias"))
            if kernel is None or bias is None or kernel.shape != (width, inputs, 3, 3) or bias.shape != (width,):
                shape = None if kernel is None else kernel.shape
                raise DataError(
                    f"{path}: features.{number}.weight must be {(width, inputs, 3, 3)} with its bias, found {shape}: give "
                    "torchvision's VGG-16."
                )
            layers.append((jnp.asarray(kernel.transpose(2, 3, 1, 0), jnp.float32), jnp.asarray(bias, jnp.float32)))
            number, inputs = number + 2, width  # a relu stands between
        found.append(layers)
        number += 1  # pooling
    return found


def perceptual(weights: Weights, x: jax.Array, y: jax.Array) -> jax.Array:
    """Equation (4) for each image: float32 [n]."""
    total = jnp.zeros(len(x))
    for a, b in zip(_features(weights, x), _features(weights, y), strict=True):
        unit = lambda f: f * jax.lax.rsqrt(jnp.sum(jnp.square(f), -1, keepdims=True) + 1e-10)
        total = total + jnp.sum(jnp.square(unit(a) - unit(b)), -1).mean((1, 2))
    return total


def _features(weights: Weights, images: jax.Array) -> list[jax.Array]:
    """Activations [n, h', w', c] at the end of each resolution that the image is large enough for."""
    x, found = ((images + 1) / 2 - VGG_MEAN) / VGG_STD, []
    for level, layers in enumerate(weights):
        if level:
            if min(x.shape[1:3]) < 2:
                break
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for kernel, bias in layers:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias)
        found.append(x)
    return found
