"""Sampling grids and guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.diffusion import grids, guidance


def test_uniform_logsnr():
    np.testing.assert_allclose(grids.make_grid("uniform_logsnr", 5, 100.0, 0.01), [100, 10, 1, 0.1, 0.01, 0], rtol=1e-12)
    np.testing.assert_allclose(grids.make_grid("uniform_logsnr", 1, 100.0, 0.01), [100, 0], rtol=1e-12)


def test_uniform_u():
    sigmas = grids.make_grid("uniform_u", 4, 4.0, 0.01)
    np.testing.assert_allclose(sigmas / (1 + sigmas), [0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-12)


def test_ddpm_table():
    alpha = np.cumprod(np.sqrt(1 - 0.02 * np.arange(1, 1001) / 1000))
    levels = np.sqrt(1 / alpha**2 - 1)
    np.testing.assert_allclose(grids.make_grid("ddpm_table", 1000, 80.0, 0.01), [*levels[::-1], 0])
    np.testing.assert_allclose(grids.make_grid("ddpm_table", 4, 80.0, 0.01), [*levels[[999, 749, 499, 249]], 0])


def test_shift_multiplies_every_level():
    plain, shifted = (grids.make_grid("uniform_u", 8, 80.0, 0.01, shift) for shift in (1.0, 3.0))
    np.testing.assert_allclose(shifted, 3 * plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddpm_table", 1001, 80.0, 0.01), "1000 levels"),
        (("karras", 4, 80.0, 0.01), "unknown grid 'karras'"),
        (("uniform_u", 0, 80.0, 0.01), "at least 1 interval"),
        (("uniform_u", 4, 0.01, 80.0), "below sigma_max"),
        (("uniform_u", 4, 80.0, 0.01, 0.0), "must be positive"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grids.make_grid(*arguments)


def test_guidance_extrapolates_and_is_exact_at_scale_one():
    cond, uncond = jnp.array([0.1, 1e-8, -3.0]), jnp.array([1e6, 2.0, 5.0])
    np.testing.assert_array_equal(guidance.guided(cond, uncond, 1.0), cond)
    np.testing.assert_allclose(guidance.guided(jnp.array([3.0]), jnp.array([1.0]), 2.5), [6.0])
    np.testing.assert_allclose(guidance.guided(jnp.array([3.0]), jnp.array([1.0]), 0.0), [1.0])


def test_guidance_interval_is_closed():
    assert guidance.inside(0.2, (0.2, 3.0)) and guidance.inside(3.0, (0.2, 3.0))
    assert not guidance.inside(0.19, (0.2, 3.0)) and not guidance.inside(3.1, (0.2, 3.0))
    np.testing.assert_array_equal(guidance.inside(jnp.array([0.0, 1.0, 80.0]), (0.0, float("inf"))), True)
