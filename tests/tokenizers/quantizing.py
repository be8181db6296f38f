"""What the tests of the quantizers share: one of each kind, vectors for it, and equality to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.tokenizers.quantizers.base import Learning
from mmdiff.tokenizers.quantizers.bsq import BSQ
from mmdiff.tokenizers.quantizers.fsq import FSQ
from mmdiff.tokenizers.quantizers.lfq import LFQ
from mmdiff.tokenizers.quantizers.simvq import SimVQ
from mmdiff.tokenizers.quantizers.vq import VQ

ALL = [
    VQ(13, 4),
    VQ(13, 4, normalise=False, gradient="rotation"),
    VQ(13, 4, normalise=False, update="loss", restart=0),
    VQ(13, 4, gradient="rotation", update="loss", restart=0),
    SimVQ(13, 4),
    FSQ((8, 5, 3)),
    LFQ(5),
    BSQ(5),
]
EMA = [q for q in ALL if isinstance(q, VQ) and q.update == "ema"]
each = pytest.mark.parametrize("quantizer", ALL, ids=str)


@functools.partial(jax.jit, static_argnames=("quantizer", "train"))
def quantise(quantizer, params, state, z, key=None, train=True, weight=None):
    return quantizer(params, state, z, Learning(key, weight) if train else None)


def made(quantizer, seed=0):
    """Params off their starting point, state, and vectors [6, 8, d]."""
    params, state = quantizer.init(jax.random.key(seed))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(seed + 1), p.shape), params)
    return params, state, jax.random.normal(jax.random.key(seed + 2), (6, 8, quantizer.width))


def same_bits(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b))


def gradients(quantizer, of):
    """Of a number made of a Quantized, for params, state and z."""
    params, state, z = made(quantizer)

    def number(params, state, z):
        return of(quantizer(params, state, z, Learning(jax.random.key(0))))

    return jax.jit(jax.grad(number, (0, 1, 2)))(params, state, z)


def fsq_preimage(quantizer, ids):
    """Vectors in the middle of the cells of the ids."""
    levels = np.asarray(quantizer.levels)
    k = np.stack(np.unravel_index(np.asarray(ids), levels, order="F"), -1) - levels // 2
    half, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
    return jnp.asarray(np.arctanh((k + offset) / half) - np.arctanh(offset / half), jnp.float32)
