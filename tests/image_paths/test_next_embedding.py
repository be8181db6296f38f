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


@functools.partial(jax.jit, static_argnames="network")
def regression(network, params, rows, x, hidden):
    bound = network.bind(params)
    return next_embedding.regressed(network, bound, rows, x, hidden), bound.image.predict(hidden, None)


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_the_regression_by_hand(made, rows, kind):
    """K + 1 errors of each image, [/IMG] the last, from the states before them."""
    network = dataclasses.replace(made.network, front=dataclasses.replace(made.network.front, regression=kind))
    x, hidden = map(np.asarray, states(made.network, made.params, rows))
    found, said = map(np.asarray, regression(network, made.params, rows, x, hidden))
    assert found[~np.asarray(rows.is_patch)].max() == 0
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


def test_where_only_directions_are_learnt_lengths_are_one(made, rows):
    network = dataclasses.replace(made.network, front=dataclasses.replace(made.network.front, regression="cosine"))
    x, hidden = map(np.asarray, states(network, made.params, rows))
    said = regression(network, made.params, rows, x, hidden)[1]
    for vectors in (x[np.asarray(rows.is_patch)], np.asarray(said)):
        np.testing.assert_allclose(np.square(vectors).mean(-1), 1, rtol=1e-3)


def test_targets_learn_nothing_and_pixels_teach_no_vectors(made, rows):
    """With final states held still nothing that stands in the row has a gradient; with a head that says nothing, and so
    nothing through the states, the causal former has none from the pixels either. Otherwise it has one."""
    network, params = made.network, made.params
    x, hidden = states(network, params, rows)
    total = lambda x, hidden: regression(network, params, rows, x, hidden)[0].sum()
    of_targets, of_states = jax.jit(jax.grad(total, argnums=(0, 1)))(x, hidden)
    assert not np.any(of_targets) and np.any(of_states)

    @jax.jit
    def grads(image):
        def image_loss(image):
            keys = next_embedding.noise(network, made.cfg, rows, jax.random.key(0))
            return next_embedding.losses(network, made.cfg, params | {"image": image}, rows, *keys).image

        return jax.grad(image_loss)(image)

    size = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    found = grads(params["image"])
    assert size(found["adapter"]) > 0 and size(found["regress"]) > 0 and size(found["decoder"]) > 0
    mute = params["image"] | {"regress": jax.tree.map(np.zeros_like, params["image"]["regress"])}
    found = grads(mute)
    assert size(found["adapter"]) == 0 and size(found["decoder"]) > 0


def test_rows_have_the_loss_that_they_have_alone(made, rows):
    """So that a batch in pieces (training.accumulate) has the same gradient; and its images share the times among them."""
    r, eps = next_embedding.noise(made.network, made.cfg, rows, jax.random.key(5))
    of = jax.jit(lambda rows, *noise: next_embedding.losses(made.network, made.cfg, made.params, rows, *noise))
    whole = of(rows, r, eps).image
    pieces = [of(jax.tree.map(lambda a, i=i: a[i : i + 1], rows), r[i : i + 1], eps[i : i + 1]).image for i in range(2)]
    np.testing.assert_allclose(sum(pieces), whole, rtol=1e-5)
    assert abs(float(of(rows, r[::-1], eps[::-1]).image - whole)) > 1e-3
    patch = np.asarray(rows.is_patch)
    begins = patch & ~np.pad(patch[:, :-1], ((0, 0), (1, 0)))  # images do not touch
    np.testing.assert_array_equal(np.floor(np.asarray(r)[begins] * 6), np.arange(6))


def test_drawing_predicts_what_whole_rows_predict(made):
    """Each vector drawn is what the head says, uncached, behind the prompt and the vectors before it; pixels follow."""
    prompts = [Document("ab", IMG), Document("c", IMG)]
    options = made.options(steps=2, max_tokens=0, seed=3, image_size=(8, 8))
    session = Session(made, prompts, jax.random.split(jax.random.key(3), 2), options, None)
    drawing = session.first_drawing()
    predicted = jax.jit(next_embedding.predicted, static_argnums=(0, 1))
    drawn = predicted(made.network, made.vocabulary.cols_range, drawing)
    assert drawn.shape == (2, COUNT, 32)
    rows = jax.tree.map(jnp.asarray, rows_of(made, *([Document(*p.texts, picture())] for p in prompts), end=False))
    bound = made.network.bind(made.params)
    x, _ = states(made.network, made.params, rows)
    for number in range(2):
        at = np.flatnonzero(rows.image[number] == 1)
        x = x.at[number, at].set(drawn[number])
    said = jax.jit(lambda x: bound.image.predict(bound.stack(Embedded(x), rows.position, rows.mask)[0], None))(x)
    for number in range(2):
        at = np.flatnonzero(rows.image[number] == 1)
        np.testing.assert_allclose(said[number, at - 1], drawn[number], rtol=1e-3, atol=1e-3)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3  # the prompt matters
    out = made.generate(prompts, steps=2, max_tokens=0, seed=3)
    assert [document.images[0].pixels.shape for document in out] == [(8, 8, 3)] * 2
    assert out[0].images[0].pixels.tobytes() != out[1].images[0].pixels.tobytes()
