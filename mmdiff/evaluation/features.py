"""Feature extractors: what images are compared by (mmdiff/evaluation/distances.py).

    random      a convolutional network with random weights of a fixed seed      128 features
    patch_dct   spectra of 8x8 blocks                                            195 features
    encoder     a small network trained here on the run's own training images    128 features   mmdiff/evaluation/encoder.py
    inception   Inception-v3, from a file of weights that the user gives         2048 features  mmdiff/evaluation/inception.py

Only distances in `inception` may be called FID. The others need no download and compare runs on the same data with each
other, never with published numbers. Every extractor has a hash over its architecture and weights: numbers are comparable
where hashes are equal.

random: three 3x3 convolutions, the last two of stride 2 (32 channels), relu; features are twice the mean and the standard
deviation of each channel of the first and last layer over the picture. Weights are uniform with variance 2 / fan-in, made
from the raw bits of PCG64, whose stream NumPy guarantees, so that they are the same everywhere; every second kernel of the
first layer sums to zero, or all channels would see brightness before anything else.

patch_dct: with c_{bk} the orthonormal 8x8 cosine coefficient k of block b (blocks at every fourth pixel, so that edges
between patches fall inside some), in the opponent colours (r+g+b)/sqrt 3, (r-b)/sqrt 2, (r-2g+b)/sqrt 6,

    (1) features = mean_b c_{b0} / 8  (3),   log(1 + mean_b c_{bk}^2 / level^2) / 4 with c_{b0} centred  (3 x 64)

where the level is one of uint8: what rounding to pixels leaves is no signal.

Shapes: images are uint8 [h, w, 3], features float32 [n, d].
Sources: random features, Naeem et al. arXiv 2002.09797.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff.document import DataError
from mmdiff.evaluation.resize import resize

NAMES = ("random", "patch_dct", "encoder", "inception")
SIDES = (32, 64, 128)  # pixels to which `random` and `encoder` resize
RANDOM_SEED = 20240229
RANDOM_WIDTH = 32
BATCH = 64
BLOCK, STRIDE = 8, 4
LEVEL = 1 / 127.5
OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


@dataclasses.dataclass(frozen=True)
class Features:
    """An extractor; calling it on images gives their features."""

    name: str
    width: int
    resize: str
    """In words, for the protocol."""
    digest: str
    embed: Callable[[np.ndarray], jax.Array | np.ndarray]
    """uint8 [n, h, w, 3] to float32 [n, width]."""
    batch: int = BATCH

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Features float32 [n, width] of images uint8 [h, w, 3] of any sizes, in order."""
        found: list[np.ndarray] = []
        for batch in batches(images, self.batch):
            filled = np.concatenate([batch, np.repeat(batch[:1], self.batch - len(batch), axis=0)])  # one program per size
            found.append(np.asarray(self.embed(filled), np.float32)[: len(batch)])
        return np.concatenate(found) if found else np.zeros((0, self.width), np.float32)


def batches(images: Iterable[np.ndarray], size: int) -> Iterable[np.ndarray]:
    """Stacks of at most `size` consecutive images of one shape."""
    held: list[np.ndarray] = []
    for pixels in images:
        if held and (len(held) == size or held[0].shape != pixels.shape):
            yield np.stack(held)
            held = []
        held.append(pixels)
    if held:
        yield np.stack(held)


def digest(architecture: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Hash of an architecture, in words, and its weights: 16 hexadecimal digits."""
    found = hashlib.sha256(architecture.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], "<f4")
        found.update(f"{name}{array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def side_for(images: Sequence[np.ndarray]) -> int:
    """The smallest of SIDES that holds the largest image, or the largest of them."""
    longest = max(max(pixels.shape[:2]) for pixels in images)
    return next((side for side in SIDES if side >= longest), SIDES[-1])


def resizing(side: int) -> str:
    return f"bilinear, antialiased, to {side}x{side}"


def convolve(x: jax.Array, kernel, stride: int) -> jax.Array:
    """3x3 convolution of x [n, h, w, c] with zeros around it."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    exact = jax.lax.Precision.HIGHEST
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions, precision=exact)


def prepared(images: jax.Array, side: int) -> jax.Array:
    """uint8 [n, h, w, 3] to float32 [n, side, side, 3] in [-1, 1]."""
    return resize(images.astype(jnp.float32) / 127.5 - 1, side, side, antialias=True)


def random_features(side: int) -> Features:
    """The extractor `random` at a side of SIDES."""
    kernels = random_kernels()

    @jax.jit
    def embed(images):
        x = first = jax.nn.relu(convolve(prepared(images, side), kernels[0], 1))
        for kernel in kernels[1:]:
            x = jax.nn.relu(convolve(x, kernel, 2))
        return 2 * jnp.concatenate([f(a, (1, 2)) for a in (first, x) for f in (jnp.mean, jnp.std)], axis=-1)

    words = f"random seed {RANDOM_SEED} side {side} conv3x3 relu mean std of layers 1 and 3"
    named = {f"{i}": kernel for i, kernel in enumerate(kernels)}
    return Features("random", 4 * RANDOM_WIDTH, resizing(side), digest(words, named), embed)


@functools.cache
def random_kernels() -> tuple[np.ndarray, ...]:
    """Kernels float32 [3, 3, in, out] of the network `random`."""
    bits, kernels = np.random.PCG64(RANDOM_SEED), []
    for channels in (3, RANDOM_WIDTH, RANDOM_WIDTH):
        shape = (3, 3, channels, RANDOM_WIDTH)
        uniform = (bits.random_raw(int(np.prod(shape))) >> 11) * 2.0**-53  # [0, 1), exact in float64
        limit = np.sqrt(6 / (9 * channels))
        kernels.append(((2 * uniform - 1) * limit).astype(np.float32).reshape(shape))
    kernels[0][..., ::2] -= kernels[0][..., ::2].mean((0, 1, 2))
    return tuple(kernels)


def patch_dct_features() -> Features:
    """The extractor `patch_dct`."""
    words = f"patch_dct opponent colours block {BLOCK} stride {STRIDE} mean log1p energy {LEVEL:.6f}"
    return Features("patch_dct", 3 + 3 * BLOCK**2, "none", digest(words, {}), _spectra)


def cosines(size: int) -> np.ndarray:
    """The orthonormal DCT-II, float64 [frequency, place]."""
    frequency, place = np.arange(size)[:, None], np.arange(size)
    basis = np.cos(np.pi * (place + 0.5) * frequency / size) * np.sqrt(2 / size)
    basis[0] /= np.sqrt(2)
    return basis


def _spectra(images: np.ndarray) -> np.ndarray:
    """Equation (1)."""
    if min(images.shape[1:3]) < BLOCK:
        height, width = images.shape[1:3]
        raise DataError(f"patch_dct needs images of at least {BLOCK}x{BLOCK} pixels, not {height}x{width}; use other features.")
    x = (images.astype(np.float32) / 127.5 - 1) @ OPPONENT.T.astype(np.float32)
    blocks = np.lib.stride_tricks.sliding_window_view(x, (BLOCK, BLOCK), axis=(1, 2))[:, ::STRIDE, ::STRIDE]
    basis = cosines(BLOCK).astype(np.float32)
    found = (basis @ blocks @ basis.T).reshape(len(x), -1, 3, BLOCK**2)  # [n, blocks, colour, frequency]
    means = found[..., 0].mean(1)
    found[..., 0] -= means[:, None]
    energy = np.log1p((found**2).mean(1) / LEVEL**2).reshape(len(x), -1)
    return np.concatenate([means / 8, energy / 4], axis=-1)  # of the size that the kernel of KID is made for
