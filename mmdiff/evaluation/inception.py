"""Inception-v3 as the Frechet Inception Distance uses it: images to the 2048 features of its last pooling.

    uint8 [n, h, w, 3] -> bilinear to 299x299, not antialiased, half-pixel centres -> (x - 128) / 128
      -> 32 x 149^2 -> 32 x 147^2 -> 64 x 147^2 -> max 73^2 -> 80 -> 192 x 71^2 -> max 35^2
      -> A 256, 288, 288 -> B 768 x 17^2 -> C 768 four times -> D 1280 x 8^2 -> E 2048 twice -> mean over places

Every convolution is followed by a normalisation with stored moments (epsilon 0.001) and relu. What differs from the usual
Inception-v3: average pooling inside A, C and the first E leaves the padding out of its mean, and the last E takes the
maximum instead. Names of layers are those of torchvision.

Weights come from a file of the user's, known by its SHA-256: a wrong network would give plausible numbers. KNOWN is the
port of the original network that pytorch-fid and torch-fidelity use,

    https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth

read without PyTorch (mmdiff/evaluation/state_dict.py). Other files with these names (an .npz also) need their hash spelt
out. pytorch-fid itself scales by x / 127.5 - 1 and torch-fidelity resizes with other centres: see the protocol's words.

Shapes: NHWC, kernels [h, w, in, out], float32.
Sources: Szegedy et al. arXiv 1512.00567; FID arXiv 1706.08500.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.document import DataError
from mmdiff.evaluation.features import Features, digest
from mmdiff.evaluation.resize import resize
from mmdiff.evaluation.state_dict import read_arrays

WIDTH, SIDE, EPSILON = 2048, 299, 1e-3
KNOWN = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
KNOWN_NAME = "pt_inception-2015-12-05-6726825d.pth"
PARTS = {
    "conv.weight": "kernel",
    "bn.weight": "scale",
    "bn.bias": "bias",
    "bn.running_mean": "mean",
    "bn.running_var": "variance",
}


class Layer(NamedTuple):
    """A convolution; without `padded`, only places where the kernel lies inside."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


Fork = tuple[Layer, Layer]
Chain = tuple[Layer | Fork, ...]


class Unit(nnx.Module):
    """Convolution, normalisation with stored moments, relu."""

    def __init__(self, inputs: int, layer: Layer):
        self.layer = layer
        self.kernel = nnx.Param(jnp.zeros((*layer.kernel, inputs, layer.width)))
        self.scale, self.bias = nnx.Param(jnp.ones(layer.width)), nnx.Param(jnp.zeros(layer.width))
        self.mean, self.variance = nnx.Param(jnp.zeros(layer.width)), nnx.Param(jnp.ones(layer.width))

    def __call__(self, x: jax.Array) -> jax.Array:
        padding = [(side // 2, side // 2) if self.layer.padded else (0, 0) for side in self.layer.kernel]
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.layer.stride,) * 2,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        gain = self.scale[...] * jax.lax.rsqrt(self.variance[...] + EPSILON)
        return jax.nn.relu((y - self.mean[...]) * gain + self.bias[...])


class Block(nnx.Module):
    """Chains of convolutions side by side, and a pooling with a convolution behind it if `pooled` is not 0.

    A fork ends a chain: both its layers read what stands before it, and their channels follow one another.
    """

    def __init__(self, inputs: int, chains: tuple[Chain, ...], pool: str, pooled: int = 0):
        self.chains = (*chains, (Layer("branch_pool", pooled),)) if pooled else chains
        self.pool, self.pooled = pool, pooled
        self.width = 0 if pooled else inputs
        for chain in self.chains:
            channels = inputs
            for step in chain:
                layers = (step,) if isinstance(step, Layer) else step
                for layer in layers:
                    setattr(self, layer.name, Unit(channels, layer))
                channels = sum(layer.width for layer in layers)
            self.width += channels

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = average_pool(x) if self.pool == "average" else max_pool(x, 1 if self.pooled else 2)
        found = []
        for chain in self.chains:
            last = bool(self.pooled) and chain is self.chains[-1]
            y = pooled if last else x
            for step in chain:
                layers = (step,) if isinstance(step, Layer) else step
                y = jnp.concatenate([getattr(self, layer.name)(y) for layer in layers], axis=-1)
            found.append(y)
        return jnp.concatenate(found if self.pooled else [*found, pooled], axis=-1)


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3; padded where the stride is 1."""
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def average_pool(x: jax.Array) -> jax.Array:
    """3x3, stride 1; places outside the picture do not count."""
    total = lambda a: jax.lax.reduce_window(a, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1)))


def block_a(inputs: int, pooled: int) -> Block:
    fives = Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))
    threes = Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3))
    return Block(inputs, ((Layer("branch1x1", 64),), fives, threes), "average", pooled)


def block_b(inputs: int) -> Block:
    threes = Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3), 2, False)
    return Block(inputs, ((Layer("branch3x3", 384, (3, 3), 2, False),), threes), "max")


def block_c(inputs: int, width: int) -> Block:
    wide, tall = (1, 7), (7, 1)
    once = Layer("branch7x7_1", width), Layer("branch7x7_2", width, wide), Layer("branch7x7_3", 192, tall)
    twice = (
        Layer("branch7x7dbl_1", width),
        Layer("branch7x7dbl_2", width, tall),
        Layer("branch7x7dbl_3", width, wide),
        Layer("branch7x7dbl_4", width, tall),
        Layer("branch7x7dbl_5", 192, wide),
    )
    return Block(inputs, ((Layer("branch1x1", 192),), once, twice), "average", 192)


def block_d(inputs: int) -> Block:
    threes = Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2, False)
    sevens = (
        Layer("branch7x7x3_1", 192),
        Layer("branch7x7x3_2", 192, (1, 7)),
        Layer("branch7x7x3_3", 192, (7, 1)),
        Layer("branch7x7x3_4", 192, (3, 3), 2, False),
    )
    return Block(inputs, (threes, sevens), "max")


def block_e(inputs: int, pool: str) -> Block:
    fork = lambda name: (Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1)))
    once = Layer("branch3x3_1", 384), fork("branch3x3_2")
    twice = Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")
    return Block(inputs, ((Layer("branch1x1", 320),), once, twice), pool, 192)


class Inception(nnx.Module):
    """See above: [n, 299, 299, 3] in [-1, 1] to [n, 2048]. Made with weights of zero; `fill` gives it some."""

    def __init__(self):
        self.Conv2d_1a_3x3 = Unit(3, Layer("Conv2d_1a_3x3", 32, (3, 3), 2, False))
        self.Conv2d_2a_3x3 = Unit(32, Layer("Conv2d_2a_3x3", 32, (3, 3), 1, False))
        self.Conv2d_2b_3x3 = Unit(32, Layer("Conv2d_2b_3x3", 64, (3, 3)))
        self.Conv2d_3b_1x1 = Unit(64, Layer("Conv2d_3b_1x1", 80))
        self.Conv2d_4a_3x3 = Unit(80, Layer("Conv2d_4a_3x3", 192, (3, 3), 1, False))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "max")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool(x, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((1, 2))


def fill(model: Inception, arrays: Mapping[str, np.ndarray]) -> None:
    """Give the model the weights of a state dictionary; those of its classifiers have no place and are left out.

    Raises:
      DataError: a weight is missing or has another shape.
    """
    for path, unit in nnx.iter_graph(model):
        if not isinstance(unit, Unit):
            continue
        for theirs, ours in PARTS.items():
            name = ".".join([*map(str, path), theirs])
            if name not in arrays:
                raise DataError(f"the weights hold no {name!r}: this is no state dictionary of Inception-v3.")
            value = np.asarray(arrays[name], np.float32)
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
            parameter = getattr(unit, ours)
            if value.shape != parameter[...].shape:
                raise DataError(f"the weights' {name!r} has shape {arrays[name].shape}, which Inception-v3 has not.")
            parameter[...] = jnp.asarray(value)


def load(path: Path, sha256: str | None = None) -> Features:
    """The extractor with the weights in a file.

    Args:
      sha256: what the file's hash must be; None: KNOWN.
    Raises:
      ConfigError: as of `check_file`. DataError: it holds no Inception-v3.
    """
    found = check_file(path, sha256)
    model = Inception()
    fill(model, read_arrays(path))
    return features(model, found[:16])


def check_file(path: Path, sha256: str | None = None) -> str:
    """The SHA-256 of a file of weights.

    Raises:
      ConfigError: the file cannot be read, or is another one than `sha256` says (None: KNOWN).
    """
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise config.ConfigError(f"weights {path} cannot be read ({error.strerror}).") from error
    if found != (sha256 or KNOWN).lower():
        wanted = f"the one asked for, {sha256}" if sha256 else f"{KNOWN_NAME}'s; give --weights-sha256 {found} if you mean it"
        raise config.ConfigError(f"weights {path}: its SHA-256 {found} is not {wanted}.")
    return found


def features(model: Inception, weights: str | None = None) -> Features:
    """The extractor of a filled model; `weights` is the hash to print, by default that of the parameters."""
    graph, state = nnx.split(model)

    @jax.jit
    def embed(state, images):
        x = resize(images.astype(jnp.float32), SIDE, SIDE, antialias=False)
        return nnx.merge(graph, state)((x - 128) / 128)

    if weights is None:
        leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(state))
        weights = digest("inception", {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
    resizing = f"bilinear, not antialiased, half-pixel centres, to {SIDE}x{SIDE}; (x - 128) / 128"
    return Features("inception", WIDTH, resizing, weights, lambda images: embed(state, images), batch=16)
