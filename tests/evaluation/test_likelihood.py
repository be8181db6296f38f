"""The ODE's likelihood against densities known exactly."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from mmdiff import Document, Image, config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.evaluation.likelihood import bits_per_dim, document_nats, image_bits_per_dim_ode, ode_nats
from mmdiff.evaluation.task import Task
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model
from tests.diffusion.mixtures import gauss4, patch48, ring8

from .oracle import Listed

SIGMA_MIN = 0.05


def exact_nats(mixture, x, sigma):
    """-log density of the mixture blurred by sigma; x [n, d]."""
    parts = [
        np.log(w) + scipy.stats.norm.logpdf(x, m, np.sqrt(c + sigma**2)).sum(-1)
        for w, m, c in zip(mixture.weights, mixture.means, mixture.variances, strict=True)
    ]
    return -scipy.special.logsumexp(parts, axis=0)


def draw(mixture, count, sigma=SIGMA_MIN):
    rng = np.random.default_rng(0)
    part = rng.choice(len(mixture.weights), count, p=mixture.weights)
    return mixture.means[part] + np.sqrt(mixture.variances[part] + sigma**2) * rng.standard_normal((count, mixture.dim))


def nats_of(mixture, x, **options):
    with jax.enable_x64(True):
        how = {"steps": 200, "sigma_min": SIGMA_MIN, "sigma_max": 2000.0} | options
        return np.asarray(ode_nats(mixture.denoise, jnp.asarray(x), **how))


def centred(mixture):
    """The sampler's noise has mean 0 and the data's own mean shows in it as mean / sigma_max; here it should not."""
    return dataclasses.replace(mixture, means=mixture.means - mixture.weights @ mixture.means)


@pytest.mark.parametrize("mixture", [gauss4(), ring8(), patch48()], ids=["gauss4", "ring8", "patch48"])
def test_the_exact_denoiser_gives_the_exact_density_of_every_point(mixture):
    mixture = centred(mixture)
    x = draw(mixture, 6)
    want, found = exact_nats(mixture, x, SIGMA_MIN), nats_of(mixture, x)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 * mixture.dim)
    assert np.abs(found - exact_nats(mixture, x, 2 * SIGMA_MIN)).min() > 0.01  # of another density it is not


def test_a_wrong_denoiser_costs_bits():
    mixture = ring8()
    x = draw(mixture, 200)
    exact = exact_nats(mixture, x, SIGMA_MIN).mean()

    class Wrong:
        def denoise(self, point, sigma):
            return 0.8 * mixture.denoise(point, sigma)

    assert nats_of(mixture, x, steps=60).mean() == pytest.approx(exact, abs=1e-3)
    assert nats_of(Wrong(), x, steps=60).mean() > exact + 0.3


def test_random_probes_have_no_bias_and_the_trace_matters():
    mixture = patch48()
    x = np.repeat(draw(mixture, 1), 300, axis=0)
    exact = nats_of(mixture, x[:1], steps=40)[0]
    signs = jax.random.rademacher(jax.random.key(1), (1, *x.shape))
    one = nats_of(mixture, x, steps=40, probes=signs)
    assert abs(one.mean() - exact) < 4 * one.std() / math.sqrt(len(one))
    assert one.std() > 1e-3
    assert nats_of(mixture, x[:1], steps=40, probes=signs[:, :64].swapaxes(0, 1))[0] == pytest.approx(one[:64].mean(), rel=1e-3)


def test_the_error_falls_with_the_fourth_power_of_the_step():
    mixture = ring8()
    x = draw(mixture, 6)
    best = nats_of(mixture, x, steps=640)
    errors = [np.abs(nats_of(mixture, x, steps=n) - best).max() for n in (80, 160)]
    assert 10 < errors[0] / errors[1] < 24


def test_the_defaults_are_exact_to_two_thousandths_of_a_bit_in_single_precision():
    """32 steps, sigma from 0.002 to 80, on data with details of a few levels of uint8."""
    mixture = patch48()
    x = draw(mixture, 8, 0.002).astype(np.float32)
    found = ode_nats(mixture.denoise, jnp.asarray(x), sigma_min=0.002, sigma_max=80.0)
    want = exact_nats(mixture, x, 0.002)
    np.testing.assert_allclose(bits_per_dim(np.asarray(found), 48), bits_per_dim(want, 48), atol=0.002)


def test_uniform_noise_costs_eight_bits():
    assert bits_per_dim(7 * math.log(256 / 127.5), 7) == pytest.approx(8.0)


def test_values_that_are_not_counted_change_nothing():
    mixture = gauss4()
    x = jnp.asarray(draw(mixture, 3), jnp.float32)
    wide = jnp.concatenate([x, 7 * jnp.ones((3, 2))], axis=1)
    counted = jnp.broadcast_to(jnp.arange(6) < 4, wide.shape)
    padded = lambda point, sigma: jnp.pad(mixture.denoise(point[:, :4], sigma), ((0, 0), (0, 2)), constant_values=5.0)
    ends = {"sigma_min": 0.01, "sigma_max": 80.0}
    found = ode_nats(padded, wide, counted=counted, **ends)
    np.testing.assert_allclose(found, ode_nats(mixture.denoise, x, **ends), rtol=1e-5)


def made(markers=True, **model):
    cfg = config.Config(
        model=config.Model(width=64, depth=1, patch=4, key_width=16, **model),
        layout=config.Layout(row_length=96, markers=markers),
    )
    vocabulary = Vocabulary.bytes()
    return Model(cfg, Network.of(cfg, vocabulary.size).init(jax.random.key(0)), vocabulary)


def document_bits(model, documents, **options):
    return [bits_per_dim(*found) for found in document_nats(model, documents, 0.01, **options)]


def picture(seed=0):
    return Image(np.random.default_rng(seed).integers(0, 256, (8, 12, 3)).astype(np.uint8))


@pytest.mark.parametrize("markers", [True, False], ids=["captioned", "images alone"])
def test_a_network_that_knows_nothing_costs_what_a_gaussian_of_sigma_min_says(markers):
    """A fresh model predicts x_hat = 0, whose ODE scales X up to sigma_max: p(x) = N(x; 0, sigma_min^2 I)."""
    image = picture()
    (found,) = document_bits(made(markers), [Document("a", image)])
    x = image.pixels / 127.5 - 1
    want = np.mean(x**2) / (2 * 0.01**2) + 0.5 * math.log(2 * math.pi) + math.log(0.01)
    assert found == pytest.approx(bits_per_dim(want, 1), rel=1e-3)


@pytest.mark.parametrize("block", ["gau", "attention"])
def test_likelihoods_do_not_depend_on_neighbours_but_on_what_stands_before(block):
    fresh = made(block=block)
    shaken = jax.tree.map(
        lambda a: a + 0.05 * jax.random.normal(jax.random.key(1), a.shape), fresh.network.init(jax.random.key(0))
    )
    model = Model(fresh.cfg, shaken, fresh.vocabulary)
    document = Document("a red", picture(), "b")
    alone = document_bits(model, [document], steps=16)[0]
    among = document_bits(model, [document, Document(picture(1))], steps=16)
    later = document_bits(model, [Document("a red", picture(), "other words")], steps=16)[0]
    assert among[0] == pytest.approx(alone, rel=1e-5)
    assert later == pytest.approx(alone, rel=1e-5)
    before = document_bits(model, [Document("blue!", picture(), "b")], steps=16)[0]
    assert before != pytest.approx(alone, rel=1e-5)


def test_a_mixture_over_stops_costs_little_more_than_its_best_one():
    """A fresh model is better the earlier it stops; stopped at 0.1 it says N(x; 0, 0.1^2 I)."""
    documents = [Document("a", picture()), Document("only text"), Document(picture(1))]
    task = Task(made(), count=3, given=Listed(documents))
    found = image_bits_per_dim_ode(task)
    assert task.notes["ode"]["stops"] == pytest.approx([0.01, 0.03, 0.1]) and task.notes["ode"]["documents"] == 2
    by_stop = [found[f"image_bits_per_dim_ode_{stop}"] for stop in ("0.01", "0.03", "0.1")]
    assert by_stop[0] > by_stop[1] > by_stop[2]
    assert found["image_bits_per_dim_ode"] == pytest.approx(by_stop[2] + math.log2(3) / (8 * 12 * 3), rel=1e-5)
