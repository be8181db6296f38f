"""Conversions between prediction spaces, and the loss."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import config
from mmdiff.diffusion import loss, prediction, schedule

SPACES = ["x", "eps", "v"]
PAIRS = list(itertools.product(SPACES, SPACES))
KINDS = ["flow", "cosine", "ddpm"]
WEIGHTINGS = ["none", "min_snr", "soft_min_snr", "sigmoid"]
VALUES = {"none": 5.0, "min_snr": 5.0, "soft_min_snr": 0.5, "sigmoid": -2.0}


def noised(kind="flow", u=None, n=64, p=12):
    """x, eps, z [n, p] and alpha, sigma [n, 1]."""
    rng = np.random.default_rng(0)
    x, eps = jnp.asarray(rng.standard_normal((2, n, p)), jnp.float32)
    u = rng.uniform(0.06, 0.94, (n, 1)) if u is None else np.full((n, 1), u)
    alpha, sigma = schedule.make_schedule(config.Diffusion(schedule=kind))(jnp.asarray(u, jnp.float32))
    return x, eps, alpha * x + sigma * eps, alpha, sigma


def diffusion(source="x", target="v", weighting="none", **others):
    return config.Diffusion(prediction=source, loss=target, weighting=weighting, weighting_value=VALUES[weighting], **others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_perfect_prediction_converts_to_the_truth(source, target, kind):
    x, eps, z, alpha, sigma = noised(kind)
    output = prediction.truth(x, eps, source)
    seen = prediction.convert(output, z, alpha, sigma, source=source, target=target, clip=0.05)
    np.testing.assert_allclose(seen, prediction.truth(x, eps, target), atol=1e-4)


def test_conversions_of_the_flow_are_jits_table():
    """JiT Table 1, in its own time t = 1 - u and its own velocity w = x - eps = -v."""
    x, eps, z, alpha, u = noised("flow")
    t, guess = 1 - u, jnp.sin(7 * x) + eps  # any prediction, not a perfect one
    table = {
        ("x", "eps"): (z - t * guess) / (1 - t),
        ("x", "v"): -(guess - z) / (1 - t),
        ("eps", "x"): (z - (1 - t) * guess) / t,
        ("eps", "v"): -(z - guess) / t,
        ("v", "x"): (1 - t) * -guess + z,
        ("v", "eps"): z - t * -guess,
    }
    for (source, target), known in table.items():
        seen = prediction.convert(guess, z, alpha, u, source=source, target=target, clip=1e-3)
        np.testing.assert_allclose(seen, known, rtol=1e-4, atol=1e-4)


def test_v_loss_of_an_x_prediction_is_jits():
    """mean ((x_hat - z)/max(u, .05) - (x - z)/max(u, .05))^2, on both sides of the clip."""
    for u in (0.0, 0.02, 0.05, 0.4, 1.0):
        x, eps, z, alpha, sigma = noised("flow", u)
        x_hat = x + 0.1 * jnp.cos(z)
        known = jnp.mean(((z - x_hat) / max(u, 0.05) - (z - x) / max(u, 0.05)) ** 2, -1)
        np.testing.assert_allclose(loss.image_error(x_hat, x, eps, alpha, sigma, diffusion()), known, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("u", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_loss_is_the_difference_of_two_clipped_conversions(source, target, u):
    x, eps, z, alpha, sigma = noised("cosine", u)
    truth = prediction.truth(x, eps, source)
    output = truth + jnp.sin(5 * x)
    sides = [prediction.convert(o, z, alpha, sigma, source=source, target=target, clip=0.05) for o in (output, truth)]
    known = jnp.mean((sides[0] - sides[1]) ** 2, -1)
    seen = loss.image_error(output, x, eps, alpha, sigma, diffusion(source, target))
    np.testing.assert_allclose(seen, known, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_perfect_prediction_has_no_loss_and_every_loss_is_finite(source, target, weighting):
    config_ = diffusion(source, target, weighting)
    for kind, u in itertools.product(KINDS, (0.0, 0.3, 1.0)):
        x, eps, _, alpha, sigma = noised(kind, u, n=2)
        truth = prediction.truth(x, eps, source)
        np.testing.assert_array_equal(loss.image_error(truth, x, eps, alpha, sigma, config_), 0)
        value, slope = jax.value_and_grad(lambda *a: loss.image_error(*a, config_).sum())(truth + 1, x, eps, alpha, sigma)
        assert np.isfinite(value) and np.all(np.isfinite(slope))
        if u == 0.3:
            assert value > 1e-3  # an imperfect prediction is noticed


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weighting_means_the_same_in_every_space(kind, weighting):
    """Published weights, each in its own loss space, for one and the same guess of the image."""
    x, eps, z, alpha, sigma = noised(kind)
    value = VALUES[weighting]
    snr, u = (alpha / sigma) ** 2, sigma / (alpha + sigma)
    of_x = {
        "min_snr": jnp.minimum(snr, value),
        "soft_min_snr": 1 / (1 / snr + value**2),
        "sigmoid": snr * jax.nn.sigmoid(value - jnp.log(snr)),
    }[weighting]
    of_eps = {
        "min_snr": jnp.minimum(value / snr, 1),
        "soft_min_snr": of_x / snr,
        "sigmoid": jax.nn.sigmoid(value - jnp.log(snr)),
    }[weighting]
    weights = {"x": of_x, "eps": of_eps, "v": of_x * u**2}
    guess = x + 0.3 * jnp.cos(z)
    known = jnp.mean(of_x * (guess - x) ** 2, -1)
    for source, target in PAIRS:
        output = prediction.convert(guess, z, alpha, sigma, source="x", target=source, clip=1e-3)
        in_target = prediction.convert(guess, z, alpha, sigma, source="x", target=target, clip=1e-3)
        by_hand = jnp.mean(weights[target] * (in_target - prediction.truth(x, eps, target)) ** 2, -1)
        np.testing.assert_allclose(by_hand, known, rtol=1e-3)
        seen = loss.image_error(output, x, eps, alpha, sigma, diffusion(source, target, weighting))
        np.testing.assert_allclose(seen, known, rtol=1e-3)
    unweighted = loss.image_error(guess, x, eps, alpha, sigma, diffusion("x", "v"))
    assert jnp.max(jnp.abs(unweighted / known - 1)) > 0.5  # the weighting is not a no-op


def test_loss_spaces_differ_without_a_weighting():
    x, eps, _z, alpha, sigma = noised("flow", 0.25)
    errors = [loss.image_error(x + 0.1, x, eps, alpha, sigma, diffusion("x", target))[0] for target in SPACES]
    np.testing.assert_allclose(errors, [0.01, 0.01 * 9, 0.01 * 16], rtol=1e-4)


def test_sum_is_the_mean_times_the_values_and_the_error_is_float32():
    x, eps, _, alpha, sigma = noised()
    mean = loss.image_error(eps, x, eps, alpha, sigma, diffusion())
    total = loss.image_error(eps, x, eps, alpha, sigma, diffusion(reduction="sum"))
    assert mean.shape == (64,)
    np.testing.assert_allclose(total, 12 * mean, rtol=1e-5)
    assert loss.image_error(eps.astype(jnp.bfloat16), x, eps, alpha, sigma, diffusion()).dtype == jnp.float32


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr"])
def test_a_weighting_value_that_cannot_work_is_refused(weighting):
    x, eps, _, alpha, sigma = noised()
    with pytest.raises(config.ConfigError, match="weighting_value=0.0 must be positive"):
        loss.image_error(eps, x, eps, alpha, sigma, config.Diffusion(weighting=weighting, weighting_value=0.0))
