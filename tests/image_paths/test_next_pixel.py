"""Pixels one after another: the mixture against plain numpy, who reads whom, drawing against whole rows, likelihoods."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config import Config, ConfigError, Data, Layout, Model
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import IMG, Document, Image
from mmdiff.image_paths import next_patch, next_pixel
from mmdiff.layout import lay_out, pack, plan_images, stack, text_pieces
from mmdiff.models.network import Network
from mmdiff.models.patches import COMPONENTS, MIXTURE_VALUES
from mmdiff.sampling.generate import Model as Trained

SIZE = 3, 4


@functools.cache
def model(block: str = "attention", sparse: str = "none") -> Trained:
    cfg = Config(
        model=Model(width=32, depth=2, patch=1, block=block, head_width=16, key_width=16, compute="float32", sparse=sparse),
        layout=Layout(row_length=64, max_grid=4, images="next_pixel"),
        data=Data(image_size=SIZE),
    )
    vocabulary = Vocabulary.bytes(max_grid=4)
    key = jax.random.key(1)
    random = lambda leaf: leaf + 0.2 * jax.random.normal(key, leaf.shape)
    params = jax.tree.map(random, jax.jit(Network.of(cfg, vocabulary.size).init)(key))
    return Trained(cfg, params, vocabulary)


def picture(seed=0):
    return Image(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def rows_of(made, *documents, end=True):
    laid = []
    for document in documents:
        pieces = text_pieces(document, made.vocabulary, 1)
        plans = plan_images(pieces, made.cfg.layout, False)
        laid.append(lay_out(pieces, plans, made.vocabulary, made.cfg.layout, patch_values=3, end=end)[0])
    return stack([pack([row], 64) for row in laid])


@functools.partial(jax.jit, static_argnames="network")
def outputs_of(network, params, rows):
    """Head outputs [b, t, MIXTURE_VALUES] at every position, without a cache."""
    bound, u = network.bind(params), jnp.zeros(rows.tokens.shape)
    x = rows.patches / jnp.float32(127.5) - 1
    hidden = bound.hidden(rows.tokens, rows.is_patch, x, u, rows.cell, rows.position, rows.mask)
    return bound.predict(hidden, rows.cell)


def probabilities(outputs, given=()):
    """p of each level of the channel after `given` levels, and the weights of the components then: equations by hand."""
    cut = np.asarray(outputs, np.float64).reshape(COMPONENTS, 10)
    weight = np.exp(cut[:, 0] - cut[:, 0].max())
    weight /= weight.sum()
    spread, edges = np.linspace(-1, 1, COMPONENTS), (np.arange(257) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -np.inf, np.inf
    x = [level / 127.5 - 1 for level in given]
    lean = np.tanh(cut[:, 7:10])
    for channel in range(len(given) + 1):
        mean = cut[:, 1 + channel] + spread
        if channel == 1:
            mean = mean + lean[:, 0] * x[0]
        elif channel == 2:
            mean = mean + lean[:, 1] * x[0] + lean[:, 2] * x[1]
        scale = np.exp(np.maximum(cut[:, 4 + channel] - 2, -9))
        with np.errstate(over="ignore"):
            each = np.diff(1 / (1 + np.exp(-(edges - mean[:, None]) / scale[:, None])), axis=-1)
        if channel < len(given):
            weight = weight * each[:, given[channel]]
    return weight @ each, weight


def test_the_mixture_is_the_formula():
    rng = np.random.default_rng(0)
    for _ in range(20):
        outputs = rng.normal(0, 1, MIXTURE_VALUES).astype(np.float32)
        pixels = rng.integers(0, 256, (6, 3))
        pixels[0], pixels[1], pixels[2] = (0, 255, 0), (255, 255, 255), (0, 0, 0)
        ours = jax.vmap(next_pixel.log_likelihood, in_axes=(None, 0))(outputs, jnp.asarray(pixels) / 127.5 - 1)
        for pixel, found in zip(pixels, ours, strict=True):
            expected = probabilities(outputs, tuple(pixel[:2]))[0][pixel[2]]
            if expected > 1e-12:  # beyond that it is numpy that loses digits
                np.testing.assert_allclose(found, math.log(expected), rtol=2e-4, atol=2e-4)
    total, _ = probabilities(outputs)
    np.testing.assert_allclose(total.sum(), 1, rtol=1e-9)


def test_narrow_components_and_fresh_heads_are_finite_and_learn_apart():
    zero = jnp.zeros(MIXTURE_VALUES)
    pixels = jnp.asarray([[-1.0, 1.0, 0.2], [0.0, 0.0, 0.0]])
    gradient = jax.grad(lambda outputs: next_pixel.log_likelihood(outputs, pixels[1]))(zero).reshape(COMPONENTS, 10)
    assert len(np.unique(np.round(np.asarray(gradient[:, 1]), 6))) > COMPONENTS // 2  # no two components are told the same
    far = zero.reshape(COMPONENTS, 10).at[:, 4:7].set(-50.0).at[:, 1:4].set(30.0).reshape(-1)
    for outputs in (zero, far):
        value, slope = jax.value_and_grad(lambda o: jax.vmap(next_pixel.log_likelihood, (None, 0))(o, pixels).sum())(outputs)
        assert np.isfinite(value) and np.isfinite(slope).all()


def test_a_level_known_for_certain_costs_nothing():
    level = 128 / 127.5 - 1  # inside the range, where no tail helps
    heads = jnp.zeros((COMPONENTS, 10)).at[:, 4:7].set(-50.0).at[:, 1:4].set(level - jnp.linspace(-1, 1, COMPONENTS)[:, None])
    sure = lambda x: float(next_pixel.log_likelihood(heads.reshape(-1), jnp.full(3, x)))
    assert -1e-4 < sure(level) <= 0 and sure(level + 1 / 127.5) < -10


def test_pixels_are_drawn_as_often_as_they_are_likely():
    outputs = np.random.default_rng(3).normal(0, 1.5, MIXTURE_VALUES).astype(np.float32)
    count = 40_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.jit(jax.vmap(next_pixel.drawn, in_axes=(None, 0, None)))(outputs, keys, jnp.float32(1))
    levels = np.rint((np.asarray(drawn) + 1) * 127.5).astype(int)
    expected, _ = probabilities(outputs)
    bins = np.bincount(levels[:, 0] // 16, minlength=16), expected.reshape(16, 16).sum(-1) * count
    assert (np.abs(bins[0] - bins[1]) < 5 * np.sqrt(bins[1] + 1)).all()
    red = np.bincount(levels[:, 0]).argmax()  # green, given the commonest red
    of = levels[levels[:, 0] == red, 1]
    joint, weight = probabilities(outputs, (red,))
    share = joint.reshape(8, 32).sum(-1) / weight.sum()
    found = np.bincount(of // 32, minlength=8) / len(of)
    assert np.abs(found - share).max() < 5 / math.sqrt(len(of))
    (greedy,) = {tuple(np.asarray(next_pixel.drawn(outputs, key, jnp.float32(0)))) for key in keys[:3]}
    assert len(greedy) == 3


def test_an_image_of_pixels_stands_in_the_stream_and_reads_what_came_before():
    made = model()
    rows = rows_of(made, Document("a", picture(), "b"))
    where = np.flatnonzero(rows.is_patch[0])
    assert len(where) == 12 and not rows.noised.any() and not rows.tokens[0, where].any()
    np.testing.assert_array_equal(rows.context_end[0, where], where + 1)
    np.testing.assert_allclose(rows.image_weight[0, where], 1 / 12)
    np.testing.assert_array_equal(rows.patches[0, where].reshape(*SIZE, 3), picture().pixels)
    # what pixel 5 is predicted from depends on pixels 0 to 4 alone
    base = np.asarray(outputs_of(made.network, made.params, rows))
    other = rows.patches.copy()
    other[0, where[5:]] = 255 - other[0, where[5:]]
    changed = np.asarray(outputs_of(made.network, made.params, rows.__class__(**rows.__dict__ | {"patches": other})))
    np.testing.assert_array_equal(changed[0, : where[5]], base[0, : where[5]])
    assert (changed[0, where[5]] != base[0, where[5]]).any()


def bits_by_hand(made, rows):
    outputs = np.asarray(outputs_of(made.network, made.params, rows))
    where = np.flatnonzero(rows.is_patch[0])
    nats = 0.0
    for at in where:
        r, g, b = (int(v) for v in rows.patches[0, at])
        nats -= math.log(probabilities(outputs[0, at - 1], (r, g))[0][b])
    return nats / math.log(2) / (3 * len(where))


@pytest.mark.parametrize(("block", "sparse"), [("attention", "none"), ("gau", "none"), ("gau", "strided")])
def test_likelihoods_are_those_of_the_formula(block, sparse):
    made = model(block, sparse)
    document = Document("ab", picture(1), "c")
    rows = rows_of(made, document)
    expected = bits_by_hand(made, rows)
    (told,) = made.score([document])
    np.testing.assert_allclose(told["image_bits_per_dim"], expected, rtol=1e-4)
    losses = next_pixel.losses(made.network, made.cfg, made.params, rows)
    np.testing.assert_allclose(losses.image / losses.image_weight / math.log(2), expected, rtol=1e-4)


@pytest.mark.parametrize("sparse", ["none", "strided"])
def test_drawing_from_the_cache_is_drawing_from_whole_rows(sparse):
    made = model("attention", sparse)
    prompt = Document("ab", picture(2), "c", IMG)
    (out,) = made.generate([prompt], image_size=SIZE, max_tokens=0, temperature=0.0)
    image = np.zeros((*SIZE, 3), np.uint8)
    wrong = image.copy()
    for index in range(12):
        rows = rows_of(made, Document("ab", picture(2), "c", Image(image)), end=False)
        first = np.flatnonzero(rows.is_patch[0])[12]
        outputs = outputs_of(made.network, made.params, rows)[0]
        pixel = np.asarray(next_pixel.drawn(outputs[first + index - 1], jax.random.key(0), jnp.float32(0)))
        late = np.asarray(next_pixel.drawn(outputs[first + index], jax.random.key(0), jnp.float32(0)))
        image[np.unravel_index(index, SIZE)] = np.rint((pixel + 1) * 127.5).astype(np.uint8)
        wrong[np.unravel_index(index, SIZE)] = np.rint((late + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(out.images[-1].pixels, image)
    assert (wrong != image).any()
    some = made.generate([prompt] * 2, image_size=SIZE, max_tokens=0, seed=[0, 1])
    (alone,) = made.generate([prompt], image_size=SIZE, max_tokens=0, seed=[1])
    np.testing.assert_array_equal(alone.images[-1].pixels, some[1].images[-1].pixels)
    assert (some[0].images[-1].pixels != some[1].images[-1].pixels).any()


@functools.cache
def regressing() -> Trained:
    """The same on patches of 1 by regression."""
    cfg = dataclasses.replace(model().cfg, layout=dataclasses.replace(model().cfg.layout, images="next_patch"))
    key, vocabulary = jax.random.key(2), Vocabulary.bytes(max_grid=4)
    random = lambda leaf: leaf + 0.2 * jax.random.normal(key, leaf.shape)
    return Trained(cfg, jax.tree.map(random, jax.jit(Network.of(cfg, vocabulary.size).init)(key)), vocabulary)


def test_regression_by_hand_and_drawn_by_feeding_back():
    made = regressing()
    rows = rows_of(made, Document("ab", picture(1), "c"))
    where = np.flatnonzero(rows.is_patch[0])
    predicted = np.asarray(outputs_of(made.network, made.params, rows))[0, where - 1]
    expected = np.square(predicted - (rows.patches[0, where] / 127.5 - 1)).mean()
    losses = next_patch.losses(made.network, made.cfg, made.params, rows)
    np.testing.assert_allclose(losses.image / losses.image_weight, expected, rtol=1e-5)
    (out,) = made.generate([Document("ab", IMG)], image_size=SIZE, max_tokens=0, seed=3)
    image = np.zeros((*SIZE, 3), np.uint8)
    for index in range(12):
        rows = rows_of(made, Document("ab", Image(image)), end=False)
        first = np.flatnonzero(rows.is_patch[0])[0]
        said = np.asarray(outputs_of(made.network, made.params, rows))[0, first + index - 1]
        image[np.unravel_index(index, SIZE)] = np.clip(np.rint((said + 1) * 127.5), 0, 255).astype(np.uint8)
    assert np.abs(out.images[0].pixels.astype(int) - image).max() <= 1  # a value may round the other way
    assert len(np.unique(image)) > 5


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ConfigError, match=r"set model\.patch=1"):
        Config(model=Model(patch=4), layout=Layout(images="next_pixel"))
    with pytest.raises(ConfigError, match=r"guidance=2\.0 has no meaning"):
        model().generate([Document("a", IMG)], guidance=2.0)
