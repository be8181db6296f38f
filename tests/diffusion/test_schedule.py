"""Schedules and training times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import config
from mmdiff.diffusion import schedule, times

KINDS = ["flow", "cosine", "ddpm"]
R = jnp.asarray((np.arange(4000) + 0.5) / 4000, jnp.float32)


def make(kind):
    return schedule.make_schedule(config.Diffusion(schedule=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_u_is_the_share_of_noise(kind):
    u = jnp.linspace(0, 1, 101)
    alpha, sigma = make(kind)(u)
    np.testing.assert_allclose(sigma / (alpha + sigma), u, atol=1e-6)
    if kind == "flow":
        np.testing.assert_allclose(alpha + sigma, 1, atol=1e-6)
    else:
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("u", [0.0, 1e-6, 0.5, 1.0])
def test_finite_with_finite_gradients_at_both_ends(kind, u):
    alpha_and_sigma = jax.jvp(lambda u: make(kind)(schedule.shift_time(u, 3.0)), (u,), (1.0,))
    assert np.all(np.isfinite(alpha_and_sigma))
    assert np.isfinite(jax.grad(schedule.DDPM().index_of)(u))


def test_cosine_is_the_angle():
    theta = jnp.linspace(0.01, 1.5, 50)
    u = jnp.tan(theta) / (1 + jnp.tan(theta))
    alpha, sigma = make("cosine")(u)
    np.testing.assert_allclose(alpha, jnp.cos(theta), atol=1e-6)
    np.testing.assert_allclose(sigma, jnp.sin(theta), atol=1e-6)


def test_ddpm_table():
    """sigma/alpha of alpha_t = prod sqrt(1 - 0.02 k/1000) at t = 1, 10, 50, 100, 250, 500, 750, 1000."""
    levels = schedule.DDPM_LEVELS[np.array([1, 10, 50, 100, 250, 500, 750, 1000]) - 1]
    known = [0.00447218, 0.03317653, 0.16073804, 0.3261159, 0.93535612, 3.36850759, 16.92352414, 154.26939708]
    np.testing.assert_allclose(levels, known, rtol=1e-6)


def test_ddpm_index_inverts_the_table():
    ddpm = schedule.DDPM()
    u = jnp.asarray(schedule.time_of(schedule.DDPM_LEVELS), jnp.float32)
    np.testing.assert_allclose(ddpm.index_of(u), np.arange(1000), atol=0.05)
    between = schedule.time_of(np.sqrt(schedule.DDPM_LEVELS[499] * schedule.DDPM_LEVELS[500]))
    np.testing.assert_allclose(ddpm.index_of(jnp.float32(between)), 499.5, atol=0.01)
    np.testing.assert_array_equal(ddpm.index_of(jnp.array([0.0, 1.0])), [0, 999])


@pytest.mark.parametrize("shift", [0.25, 2.0, 3.0])
def test_shift_multiplies_the_noise_level(shift):
    u = jnp.linspace(0.02, 0.98, 200)
    shifted = schedule.shift_time(u, shift)
    np.testing.assert_allclose(shifted / (1 - shifted), shift * u / (1 - u), rtol=1e-4)
    np.testing.assert_array_equal(schedule.shift_time(jnp.array([0.0, 1.0]), shift), [0, 1])
    np.testing.assert_allclose(schedule.time_of(shift * u / (1 - u)), shifted, rtol=1e-5)


def test_logit_normal_times():
    u = times.sample_times(config.Diffusion(time_mean=-0.8, time_std=0.8), R)
    logit = np.log((1 - u) / u)
    np.testing.assert_allclose([logit.mean(), logit.std()], [-0.8, 0.8], atol=2e-3)
    np.testing.assert_allclose(np.median(u), 1 / (1 + np.exp(-0.8)), atol=1e-3)  # JiT trains mostly on noise


def test_uniform_times():
    uniform = {
        kind: np.asarray(times.sample_times(config.Diffusion(schedule=kind, time_sampling="uniform"), R)) for kind in KINDS
    }
    np.testing.assert_array_equal(uniform["flow"], R)
    angle = np.arctan(uniform["cosine"] / (1 - uniform["cosine"]))
    np.testing.assert_allclose(angle, np.asarray(R) * np.pi / 2, atol=1e-5)
    index = np.asarray(schedule.DDPM().index_of(jnp.asarray(uniform["ddpm"]))).round()
    np.testing.assert_array_equal(index, np.arange(4000) // 4)
    level = uniform["ddpm"] / (1 - uniform["ddpm"])
    assert np.median(level) == pytest.approx(3.37, abs=0.02)  # half of DDPM training is almost pure noise


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_times_are_shifted_and_stay_in_range(kind, sampling):
    diffusion = config.Diffusion(schedule=kind, time_sampling=sampling, shift=2.0)
    plain = config.Diffusion(schedule=kind, time_sampling=sampling)
    r = jnp.concatenate([R, jnp.array([0.0, 1.0])])
    u = times.sample_times(diffusion, r)
    assert jnp.all((u >= 0) & (u <= 1))
    np.testing.assert_allclose(u, schedule.shift_time(times.sample_times(plain, r), 2.0), atol=1e-6)
    assert jnp.mean(u) > jnp.mean(times.sample_times(plain, r)) + 0.02
