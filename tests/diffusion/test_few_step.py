"""Few-step objectives against the exact flow map of a Gaussian, in closed form: the truth has no error, and only the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.diffusion.few_step import step_errors

STD = np.array([1.0, 0.5, 0.1])
OBJECTIVES = ("meanflow", "difference", "shortcut")
# (u, h): a long step, none, a short one, one that ends at the data
TIMES = np.array([[0.9, 0.8, 0.6, 0.3]]), np.array([[0.7, 0.0, 0.1, 0.3]])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def spread(u):
    """Standard deviation of z at time u, for data of standard deviation STD."""
    return jnp.sqrt((1 - u) ** 2 * STD**2 + u**2)


def velocity(z, u):
    return z * jax.jvp(spread, (u,), (jnp.ones_like(u),))[1] / spread(u)


def exact(z, u, h, tilt=0.0):
    """The mean velocity from u to u - h; with `tilt`, not quite."""
    u, h = u[..., None], h[..., None]
    along = z * (1 - spread(u - h) / spread(u)) / jnp.where(h > 1e-12, h, 1.0)
    return jnp.where(h > 1e-12, along, velocity(z, u)) + tilt * jnp.sin(3 * h) * z, "the rest"


def points():
    return jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 3))), *map(jnp.asarray, TIMES)


def errors(objective, average, truth=None, moving=None):
    z, u, h = points()
    truth = velocity(z, u[..., None]) if truth is None else truth
    return step_errors(objective, average, z, u, h, truth, jnp.ones(u.shape, bool) if moving is None else moving)


@pytest.mark.parametrize(("objective", "least"), [("meanflow", 1e-28), ("difference", 1e-4), ("shortcut", 1e-28)])
def test_the_exact_flow_map_has_no_error_and_another_one_has(objective, least):
    error, rest = errors(objective, exact)
    assert rest == "the rest" and float(error.max()) < least
    wrong = errors(objective, functools.partial(exact, tilt=0.3))[0]
    assert wrong[0, 1] < 1e-28 and float(wrong[0, [0, 2, 3]].min()) > 3 * least  # it is right only where h = 0


def test_a_wrong_tangent_shows():
    """A step's length grows with u while its end stays: taking it as fixed, so that the end moves along, shows."""
    z, u, h = points()
    v = velocity(z, u[..., None])
    mean, slope = jax.jvp(lambda z, u: exact(z, u, h)[0], (z, u), (v, jnp.ones_like(u)))
    assert np.abs(mean + h[..., None] * slope - v)[0, 0].max() > 0.05


def test_without_a_step_it_is_the_ordinary_velocity_loss():
    """Any network: where h = 0 only U - (z - x)/u counts, and the derivative, whatever it is, does not."""
    z, u, _ = points()
    network = lambda z, u, h: (jnp.sin(5 * z) * u[..., None] + h[..., None], None)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(z.shape))
    truth = (z - x) / u[..., None]
    by_hand = np.mean((network(z, u, 0 * u)[0] - truth) ** 2, axis=-1)
    for objective in OBJECTIVES:
        error = step_errors(objective, network, z, u, 0 * u, truth, jnp.ones(u.shape, bool))[0]
        np.testing.assert_allclose(error, by_hand, rtol=1e-12)


def test_the_difference_is_the_derivative():
    smooth = lambda z, u, h: (jnp.sin(z) * (1 + u[..., None]) * jnp.cos(2 * h[..., None]), None)
    one, other = (errors(objective, smooth, truth=0.0)[0] for objective in ("meanflow", "difference"))
    np.testing.assert_allclose(one, other, rtol=0.1)
    assert np.abs(one - other).max() > 1e-6  # two ways to compute it, not one


@pytest.mark.parametrize("objective", ["difference", "shortcut"])
def test_what_does_not_move_is_left_alone(objective):
    """Clean patches and text enter every evaluation as they are."""
    seen = []

    def average(z, u, h):
        seen.append((z, u))
        return exact(z, u, h)

    errors(objective, average, moving=jnp.array([[True, False, True, False]]))
    z, u, _ = points()
    for other_z, other_u in seen:
        np.testing.assert_array_equal(other_z[:, 1::2], z[:, 1::2])
        np.testing.assert_array_equal(other_u[:, 1::2], u[:, 1::2])
    assert any(np.abs(other_z - z)[:, ::2].max() > 0 for other_z, _ in seen)


def test_what_does_not_move_has_no_derivative():
    """The first patch is on its path or not: without the derivative its error is that of no step."""
    moving = jnp.array([[True, False, True, False]])
    assert errors("meanflow", exact, moving=moving)[0][0, 0] < 1e-28 < 1e-4 < errors("meanflow", exact, moving=~moving)[0][0, 0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_the_network_itself_is_learnt(objective):
    """The gradient reaches U(z, u, h) alone: what it is compared with counts as given."""
    z, u, h = points()

    def loss(scales):
        average = lambda z, u, h: (scales[0] * exact(z, u, h)[0], None)
        return step_errors(objective, average, z, u, h, 0.0, jnp.ones(u.shape, bool))[0].sum()

    def by_hand(scale):
        average = lambda z, u, h: (scale * exact(z, u, h)[0], None)
        mean = exact(z, u, h)[0]
        given = {  # the wrong of each objective, less scale * mean
            "meanflow": lambda: scale * _slope(z, u, h, scale),
            "difference": lambda: _remainder(objective, average, z, u, h) - scale * mean,
            "shortcut": lambda: _remainder(objective, average, z, u, h) - scale * mean,
        }[objective]()
        return 2 * np.sum(np.mean((scale * mean + given) * mean, axis=-1))

    np.testing.assert_allclose(jax.grad(loss)(jnp.array([0.7]))[0], by_hand(0.7), rtol=1e-9)


def _slope(z, u, h, scale):
    v = scale * exact(z, u, 0 * h)[0]
    ones = jnp.ones_like(u)
    return h[..., None] * jax.jvp(lambda z, u, h: exact(z, u, h)[0], (z, u, h), (v, ones, ones))[1]


def _remainder(objective, average, z, u, h):
    """U plus or minus what it is compared with, from the definitions."""
    mean, column = average(z, u, h)[0], h[..., None]
    if objective == "shortcut":
        first = average(z, u, h / 2)[0]
        second = average(z - column / 2 * first, u - h / 2, h / 2)[0]
        return mean - jnp.where(column > 0, (first + second) / 2, 0.0)
    d = jnp.where(h > 0, jnp.minimum(0.01, h), 0.01)
    before = average(z - d[..., None] * average(z, u, 0 * h)[0], u - d, jnp.maximum(h - d, 0))[0]
    return mean + column * (mean - before) / d[..., None]


def test_unknown_objective_is_named():
    with pytest.raises(ValueError, match="unknown few-step objective 'consistency'"):
        errors("consistency", exact)
