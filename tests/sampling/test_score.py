"""The likelihoods of score.py against densities known exactly."""

import math

import jax
import numpy as np
import pytest

import mmdiff
from mmdiff import Document, Image, config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model
from mmdiff.sampling.score import LEVELS, image_bound, make_grid, reconstruction_table, score

WIDE = 0.25  # standard deviation of the test data, many levels wide


def bound_of(denoise, pixels):
    """Bits per value of `image_bound` with a denoiser of independent values."""
    grid, rng, x = make_grid(64), np.random.default_rng(0), LEVELS[pixels]
    errors = []
    for sigma in grid.middles:
        point = x + sigma * rng.standard_normal(x.shape)
        errors.append(np.sum((denoise(point, sigma) - x) ** 2))
    return image_bound(np.asarray(errors), pixels, grid) / math.log(2) / pixels.size


def mixture_denoise(point, sigma, means=(-0.4, 0.4), std=0.1):
    """E[x | X] for an even mixture of two Gaussians."""
    means = np.asarray(means)
    variance = std**2 + sigma**2
    logits = -((point[..., None] - means) ** 2) / (2 * variance)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return (weight * (means + std**2 / variance * (point[..., None] - means))).sum(-1)


def mixture_bits(pixels, means=(-0.4, 0.4), std=0.1):
    """-log2 of the exact probability of each level, averaged."""
    weights = sum(np.exp(-((LEVELS - mean) ** 2) / (2 * std**2)) for mean in means)
    return float(-np.mean(np.log2((weights / weights.sum())[pixels])))


def draw_levels(rng, x):
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def test_bound_of_an_exact_gaussian_denoiser_is_its_exact_density():
    rng = np.random.default_rng(1)
    pixels = draw_levels(rng, WIDE * rng.standard_normal(200000))
    exact = mixture_bits(pixels, means=(0.0,), std=WIDE)
    bound = bound_of(lambda point, sigma: WIDE**2 / (WIDE**2 + sigma**2) * point, pixels)
    assert exact - 0.01 < bound < exact + 0.015
    wrong = bound_of(lambda point, sigma: 0.6 * WIDE**2 / (WIDE**2 + sigma**2) * point, pixels)
    assert wrong > exact + 0.1  # the check can fail


def test_bound_of_an_exact_mixture_denoiser_is_its_exact_density():
    rng = np.random.default_rng(2)
    pixels = draw_levels(rng, rng.choice([-0.4, 0.4], 200000) + 0.1 * rng.standard_normal(200000))
    exact = mixture_bits(pixels)
    assert exact - 0.01 < bound_of(mixture_denoise, pixels) < exact + 0.015
    gaussian = bound_of(lambda point, sigma: 0.17 / (0.17 + sigma**2) * point, pixels)
    assert gaussian > exact + 0.1  # the best linear denoiser does not know the two modes


def test_reconstruction_is_free_without_noise_and_eight_bits_under_much():
    table = reconstruction_table((0.0005, 1000.0)) / math.log(2)
    np.testing.assert_allclose(table[0], 0.0, atol=1e-6)
    np.testing.assert_allclose(table[1], 8.0, atol=1e-3)


@pytest.fixture(scope="module")
def model():
    cfg = config.Config(model=config.Model(width=64, depth=2, patch=4, key_width=16), layout=config.Layout(row_length=96))
    vocabulary = Vocabulary.bytes()
    return Model(cfg, Network(cfg.model, vocabulary.size).init(jax.random.key(0)), vocabulary)


def picture(seed=0):
    return Image(np.random.default_rng(seed).integers(0, 256, (8, 12, 3)).astype(np.uint8))


def test_a_model_that_knows_nothing_scores_what_the_equations_say(model):
    """A fresh model gives every token the same probability and always predicts x_hat = 0."""
    image = picture()
    (found,) = score(model, [Document("café", image, "x")], levels=16)
    tokens, size = 6, 6  # byte pieces: one per UTF-8 byte
    assert found["text_nats_per_byte"] == pytest.approx(tokens * math.log(model.vocabulary.size) / size, rel=1e-5)
    assert found["text_bits_per_byte"] == pytest.approx(found["text_nats_per_byte"] / math.log(2))
    grid, x = make_grid(16), LEVELS[image.pixels]
    want = image_bound(np.full(16, np.sum(x**2)), image.pixels, grid) / math.log(2) / image.pixels.size
    assert found["image_bits_per_dim"] == pytest.approx(want, rel=1e-4)
    assert 7.9 < want < 8.1  # the mixture over where to stop: coding the bits outright


def test_keys_are_absent_when_there_is_nothing_to_score(model):
    text, image = model.score([Document("only text"), Document(picture())], levels=4)
    assert set(text) == {"text_nats_per_byte", "text_bits_per_byte"}
    assert set(image) == {"image_bits_per_dim"}


def test_scores_do_not_depend_on_neighbours_or_on_what_was_to_be_learnt(model):
    document = Document("a", picture(), "b", picture(1))
    frozen = Document(mmdiff.Text("a", learn=False), Image(picture().pixels, learn=False), "b", picture(1))
    fresh = model.network.init(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.05 * jax.random.normal(jax.random.key(1), a.shape), fresh)
    trained = Model(model.cfg, params, model.vocabulary)
    alone = score(trained, [document], levels=4)[0]
    among = score(trained, [Document("a longer text in front"), document, frozen], levels=4)
    assert among[1] == pytest.approx(alone, rel=1e-4)
    assert among[2] == pytest.approx(alone, rel=1e-4)
    other = score(trained, [Document("a", picture(1), "b", picture())], levels=4)[0]
    assert other["text_nats_per_byte"] != pytest.approx(alone["text_nats_per_byte"], rel=1e-4)  # "b" reads the image
