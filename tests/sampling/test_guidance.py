"""Autoguidance and the rescaling of guidance, against whole rows and closed forms; text guidance: test_uncached.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.diffusion import guidance
from mmdiff.document import IMG, Document
from mmdiff.sampling import image
from mmdiff.sampling.generate import Model

from .reference import Reference

TOLERANCE = 1e-5
ONE_STEP = {"image_size": (4, 6), "max_tokens": 0, "steps": 1, "solver": "ddim"}


@pytest.fixture
def x_hats(monkeypatch):
    """What every call of `draw` draws, before its rounding."""
    found, exact = [], jax.jit(image.denoised, static_argnums=(0, 1, 4))

    def draw(*arguments):
        found.append(np.asarray(exact(*arguments)))
        return image.to_pixels(found[-1])

    monkeypatch.setattr(image, "draw", draw)
    return found


@pytest.fixture
def pair(tiny_gau, new_tiny):
    """A model, a weaker one of another shape, and the prompt's pieces."""
    other = new_tiny(depth=1, width=60)
    weak = Model(other.cfg, other.params, other.vocabulary)
    pieces = tiny_gau.pieces("12", (2, 3))
    strong = Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary, weak=weak)
    return strong, Reference(tiny_gau), Reference(other), [pieces[0], pieces[1]._replace(patches=None)]


def start() -> np.ndarray:
    """X of the first evaluation of the document of seed [1]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 2**30)
    return 80 * np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (6, 12)))


def test_autoguidance_leads_away_from_the_weaker_model(pair, x_hats):
    model, strong, weak, pieces = pair
    good, bad = (reference.x_hat(pieces, start(), 80.0) for reference in (strong, weak))
    assert np.abs(good - bad).max() > 0.1
    for scale in (1.0, 2.5):
        model.generate([Document("12", IMG)], **ONE_STEP, autoguidance=scale, seed=[1])
        np.testing.assert_allclose(x_hats[-1][0], bad + scale * (good - bad), atol=3 * TOLERANCE)


def test_autoguidance_keeps_to_the_interval(pair, x_hats):
    model, strong, _, pieces = pair
    draws = functools.partial(model.generate, [Document("12", IMG)], **ONE_STEP, autoguidance=3.0, seed=[1])
    draws(guidance_interval=(0.0, 10.0))
    np.testing.assert_allclose(x_hats[-1][0], strong.x_hat(pieces, start(), 80.0), atol=TOLERANCE)
    draws(guidance_interval=(0.0, 100.0))
    assert np.abs(x_hats[-1] - x_hats[-2]).max() > 0.1


def test_guided_by_itself_nothing_changes(tiny_gau, x_hats):
    weak = Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary)
    model = Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary, weak=weak)
    prompts = [Document("12", IMG, "3", IMG), Document("5", IMG)]
    options = {"image_size": (4, 4), "max_tokens": 0, "steps": 4, "seed": 3}
    for scale in (1.0, 4.0):
        model.generate(prompts, **options, autoguidance=scale)
    assert len(x_hats) == 4
    np.testing.assert_allclose(x_hats[0], x_hats[2], atol=1e-4)


def test_a_model_of_images_alone_is_guided_too(new_tiny, x_hats):
    strong, other = new_tiny(markers=False), new_tiny(markers=False, depth=1)
    draws = []
    for weak in (strong, other):
        guide = Model(weak.cfg, weak.params, weak.vocabulary)
        model = Model(strong.cfg, strong.params, strong.vocabulary, weak=guide)
        for scale in (1.0, 2.0):
            draws.append(model.generate([Document(IMG)], image_size=(4, 4), steps=3, autoguidance=scale, seed=0))
    assert np.abs(x_hats[0] - x_hats[1]).max() < 1e-4 < 0.01 < np.abs(x_hats[2] - x_hats[3]).max()


def test_rescaling_takes_the_contrast_back(pair, x_hats):
    model, strong, weak, pieces = pair
    good, bad = (reference.x_hat(pieces, start(), 80.0) for reference in (strong, weak))
    far = bad + 3 * (good - bad)
    for amount in (0.0, 0.5, 1.0):
        model.generate([Document("12", IMG)], **ONE_STEP, autoguidance=3.0, guidance_rescale=amount, seed=[1])
        spread = (1 - amount) * far.std() + amount * good.std()
        expected = far.mean() + (far - far.mean()) * spread / far.std()
        np.testing.assert_allclose(x_hats[-1][0], expected, atol=1e-4)
    assert abs(far.std() - good.std()) > 0.05


def test_padding_does_not_count_as_contrast():
    rng = np.random.default_rng(0)
    x, cond = rng.standard_normal((2, 1, 5, 12))
    real = jnp.array([[True, True, True, False, False]])
    short = guidance.rescaled(x[:, :3], cond[:, :3], 1.0, real[:, :3])
    np.testing.assert_allclose(guidance.rescaled(x, cond, 1.0, real)[:, :3], short, rtol=1e-5)
    assert np.abs(guidance.rescaled(x, cond, 1.0, real | True)[:, :3] - short).max() > 0.01


def test_what_cannot_work_is_refused(pair, tiny_gau, new_tiny):
    model, prompt = pair[0], [Document("1", IMG)]
    with pytest.raises(ConfigError, match=r"autoguidance=2 needs a weaker model: --weak"):
        Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary).generate(prompt, autoguidance=2.0)
    with pytest.raises(ConfigError, match=r"guidance=2.0 and autoguidance=2.0 exclude each other"):
        model.generate(prompt, guidance=2.0, autoguidance=2.0)
    with pytest.raises(ConfigError, match=r"guidance_rescale=1.5 must be from 0 to 1"):
        model.generate(prompt, guidance_rescale=1.5)
    other = new_tiny(markers=False)
    with pytest.raises(ConfigError, match="the weaker model must have the vocabulary, the patches"):
        Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary, weak=Model(other.cfg, other.params, other.vocabulary))
