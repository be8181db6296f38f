"""Emu's image path: what is regressed and on what, that targets learn nothing, and that drawing is what training describes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.document import IMG, Document
from mmdiff.image_paths import next_embedding
from mmdiff.layout import Rows
from mmdiff.models.transfusion import Embedded
from mmdiff.sampling.session import Session
from mmdiff.training.loss import normalise
from tests.adapters.tiny import model, picture, rows_of

COUNT = 3


@pytest.fixture(scope="module")
def made():
    return model("causal_former", images="next_embedding")


@pytest.fixture(scope="module")
def rows(made) -> Rows:
    documents = [Document("ab", picture(0), "c"), Document(picture(1)), Document("d", picture(2))]
    return jax.tree.map(jnp.asarray, rows_of(made, documents, documents[::-1]))


@functools.partial(jax.jit, static_argnames="network")
def states(network, params, rows):
    """What stands at all positions, and final states there."""
    bound = network.bind(params)
    embedded = bound.embed(rows.tokens, rows.is_patch, normalise(rows.patches), jnp.zeros(rows.tokens.shape), rows.cell)
    return embedded.x, bound.stack(embedded, rows.position, rows.mask)[0]


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_the_regression_by_hand(made, rows, kind):
    """K + 1 errors of each image, [/IMG] the last, from the states before them."""
    network = dataclasses.replace(made.network, front=dataclasses.replace(made.network.front, regression=kind))
    x, hidden = map(np.asarray, states(network, made.params, rows))
    bound = network.bind(made.params)
    found = np.asarray(next_embedding.regressed(network, bound, rows, jnp.asarray(x), jnp.asarray(hidden)))
    assert found[~np.asarray(rows.is_patch)].max() == 0
    said = np.asarray(bound.image.predict(hidden, None))
    if kind == "cosine":
        np.testing.assert_allclose(np.square(x[np.asarray(rows.is_patch)]).mean(-1), 1, rtol=1e-4)
    for row in range(2):
        for image in (1, 2, 3):
            at = np.flatnonzero(rows.image[row] == image)
            where = [*at, at[-1] + 1]
            assert rows.tokens[row, where[-1]] == made.vocabulary.end_img
            a, b = said[row, np.array(where) - 1], x[row, where]
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            wanted = np.square(a - b).mean(-1) if kind == "l2" else 1 - cosine
            assert len(wanted) == COUNT + 1
            np.testing.assert_allclose(found[row, at].mean(), wanted.mean(), rtol=1e-4)
            np.testing.assert_allclose(np.asarray(rows.image_weight)[row, at], 1 / COUNT)


def test_targets_learn_nothing(made, rows):
    """With the states held still neither what stands in the row nor the causal former has a gradient; through them it has."""
    network, params = made.network, made.params
    x, hidden = states(network, params, rows)
    total = lambda x, hidden: next_embedding.regressed(network, network.bind(params), rows, x, hidden).sum()
    of_targets, of_states = jax.grad(total, argnums=(0, 1))(x, hidden)
    assert not np.any(of_targets) and np.any(of_states)

    @jax.jit
    def grads(trained):
        def image_loss(trained):
            whole = params | trained
            keys = next_embedding.noise(network, made.cfg, rows, jax.random.key(0))
            return next_embedding.losses(network, made.cfg, whole, rows, *keys).image

        return jax.grad(image_loss)(trained)

    # the first vector of an image that nothing precedes can only learn as an input: stop those, and all that is left is zero
    found = grads({"image": params["image"], "blocks": params["blocks"]})
    size = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    assert size(found["image"]["decoder"]) > 0 and size(found["image"]["regress"]) > 0 and size(found["blocks"]) > 0
    assert size(found["image"]["adapter"]) > 0  # through the model that reads its vectors


def test_pixels_are_denoised_from_vectors_that_they_do_not_teach(made, rows):
    """With a head that predicts nothing from anything, the causal former has no gradient: the denoiser gives it none."""
    network, params = made.network, made.params

    def image_loss(adapter):
        image = params["image"] | {
            "adapter": adapter,
            "regress": {"kernel": jnp.zeros_like(params["image"]["regress"]["kernel"])},
        }
        keys = next_embedding.noise(network, made.cfg, rows, jax.random.key(0))
        return next_embedding.losses(network, made.cfg, params | {"image": image}, rows, *keys).image

    value, found = jax.jit(jax.value_and_grad(image_loss))(params["image"]["adapter"])
    assert value > 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(found))


def test_drawing_predicts_what_whole_rows_predict(made):
    """Each vector drawn is what the head says, uncached, behind the prompt and the vectors before it; pixels follow."""
    prompts = [Document("ab", IMG), Document("c", IMG)]
    options = made.options(steps=2, max_tokens=0, seed=3, image_size=(8, 8))
    session = Session(made, prompts, jax.random.split(jax.random.key(3), 2), options, None)
    drawing = session.first_drawing()
    drawn = next_embedding.predicted(made.network, made.vocabulary.cols_range, drawing)
    assert drawn.shape == (2, COUNT, 32)
    rows = jax.tree.map(jnp.asarray, rows_of(made, *([Document(*p.texts, picture())] for p in prompts), end=False))
    bound = made.network.bind(made.params)
    x, _ = states(made.network, made.params, rows)
    for number in range(2):
        at = np.flatnonzero(rows.image[number] == 1)
        x = x.at[number, at].set(drawn[number])
    hidden = jax.jit(lambda x: bound.stack(Embedded(x), rows.position, rows.mask)[0])(x)
    for number in range(2):
        at = np.flatnonzero(rows.image[number] == 1)
        np.testing.assert_allclose(bound.image.predict(hidden, None)[number, at - 1], drawn[number], atol=1e-4)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3  # the prompt matters
    one = made.generate(prompts, steps=2, max_tokens=2, seed=3, temperature=0.0)
    two = made.generate(prompts[1:], steps=2, max_tokens=2, seed=[3], temperature=0.0)
    assert [d.images[0].pixels.shape for d in (*one, *two)] == [(8, 8, 3)] * 3
