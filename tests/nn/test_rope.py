"""Rotary positions: relative, two-dimensional, and plain RoPE on text."""

import jax.numpy as jnp
import numpy as np

from mmdiff.nn.rope import rotate, rotation

C, BASE = 16, 100.0
TOLERANCE = 2e-5


def turned(x, positions):
    """x [n, c] at positions [n, 2]."""
    angles = rotation(jnp.asarray(positions, jnp.float32)[None], x.shape[-1], BASE)
    return np.asarray(rotate(jnp.asarray(x, jnp.float32)[None, None], angles))[0, 0]


def test_dot_products_depend_on_differences_only_row_and_column_apart():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, C))
    score = lambda at_q, at_k: (turned(q, [at_q]) @ turned(k, [at_k]).T).item()
    base = score((3, 8), (1, 2))
    assert abs(score((13.5, 108), (11.5, 102)) - base) < 1e-4  # each coordinate moved by an amount of its own
    for other in (score((4, 8), (1, 2)), score((3, 9), (1, 2)), score((8, 3), (2, 1))):
        assert abs(other - base) > 1e-2


def test_text_is_one_dimensional_rotary():
    """At (p, p) the rotation by complex numbers of an ordinary RoPE, its frequencies shared by both halves."""
    rng = np.random.default_rng(1)
    x, p = rng.standard_normal((5, C)), np.array([0.0, 1.0, 2.0, 7.0, 30.0])
    frequencies = BASE ** (-np.tile(np.arange(C // 4), 2) / (C // 4))
    pairs = (x[:, : C // 2] + 1j * x[:, C // 2 :]) * np.exp(1j * p[:, None] * frequencies)
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    np.testing.assert_allclose(turned(x, np.stack([p, p], -1)), expected, atol=TOLERANCE)
    assert np.abs(turned(x, np.stack([p, p + 1], -1)) - expected).max() > 0.1


def test_lengths_are_kept():
    x = np.random.default_rng(2).standard_normal((4, C))
    there = turned(x, np.random.default_rng(3).uniform(0, 100, (4, 2)))
    np.testing.assert_allclose(np.linalg.norm(there, axis=-1), np.linalg.norm(x, axis=-1), rtol=TOLERANCE)
