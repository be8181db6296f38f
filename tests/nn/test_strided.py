"""Strided attention: who reads whom, counted by hand; both ways through a network give the same; nothing is cut off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config import Config, ConfigError, Layout, Model
from mmdiff.document import IMG, Document, Image
from mmdiff.layout import pack, stack
from mmdiff.nn import strided
from tests.image_paths.test_next_pixel import model, outputs_of, picture, rows_of


def other_size(rows, cols):
    return Image(np.random.default_rng(rows * 10 + cols).integers(0, 256, (rows, cols, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def packed():
    """Two documents in one row, with images of 3 x 4, 2 x 2 and 4 x 1."""
    made = model("attention", "strided")
    apart = rows_of(made, Document("ab", picture(), "c", other_size(2, 2), "d"), Document(other_size(4, 1), "e"))
    used = [int(np.flatnonzero((apart.tokens[n] > 0) | apart.is_patch[n])[-1]) + 1 for n in range(2)]
    return made, stack([pack([jax.tree.map(lambda a, n=n: a[n, : used[n]], apart) for n in range(2)], 64)])


def by_hand(rows, which):
    """bool [t, t]: who may read whom in layer `which`, from the pattern's definition."""
    cell, image = rows.cell[0], rows.image[0] * rows.is_patch[0]
    allowed = np.asarray(rows.mask.dense(64))[0].copy()
    for q in np.flatnonzero(image):
        row, col, _, cols = cell[q]
        for k in np.flatnonzero(image == image[q]):
            back = (row - cell[k, 0]) * cols + col - cell[k, 1]
            allowed[q, k] &= cell[k, 1] == col if which == 0 else 0 <= back <= cols
    return allowed


@pytest.mark.parametrize("which", [0, 1])
def test_who_reads_whom_is_the_definition(packed, which):
    _, rows = packed
    view = strided.views(jax.tree.map(jnp.asarray, rows.mask), jnp.asarray(rows.cell), whole=True)[which]
    found = np.asarray(view.mask.dense(64))[0]
    expected = by_hand(rows, which)
    assert expected.sum() < np.asarray(rows.mask.dense(64))[0].sum() - 20
    if which == 0:
        order, back = np.asarray(view.order)[0], np.asarray(view.back)[0]
        assert (order[back] == np.arange(64)).all() and (order != np.arange(64)).any()
        assert (found != expected[order]).any()  # keys stand in the layer's order as well
        found = found[back][:, back]
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected, by_hand(rows, 1 - which))


@pytest.mark.parametrize("block", ["attention", "gau"])
def test_two_layers_reach_everything_before_and_nothing_behind(block):
    made = model(block, "strided")
    rows = rows_of(made, Document("ab", picture(), "c"))
    bound = made.network.bind(made.params)
    embedded = bound.embed(rows.tokens, rows.is_patch, rows.patches / np.float32(127.5) - 1, np.zeros((1, 64)), rows.cell)
    direction = jax.random.normal(jax.random.key(0), (made.cfg.model.width,))

    @jax.jit
    def influence(position):
        value = lambda x: bound.stack(embedded._replace(x=x), rows.position, rows.mask)[0][0, position] @ direction
        return jnp.abs(jax.grad(value)(embedded.x)[0]).sum(-1)

    first = int(np.flatnonzero(rows.is_patch[0])[0])
    for position in (first, first + 5, first + 11, first + 13):
        assert np.flatnonzero(np.asarray(influence(position))).tolist() == list(range(position + 1))


def test_it_is_another_network_than_the_full_one_and_the_same_in_tiles(packed):
    made, rows = packed
    full = np.asarray(outputs_of(model("attention").network, made.params, rows))
    ours = np.asarray(outputs_of(made.network, made.params, rows))
    inside = np.flatnonzero(rows.is_patch[0])
    assert np.abs(ours - full)[0, inside[5:]].max() > 1e-2
    np.testing.assert_allclose(ours[0, : inside[0] + 1], full[0, : inside[0] + 1], atol=1e-5)
    tiled = dataclasses.replace(made.network, cfg=dataclasses.replace(made.network.cfg, attention="blockwise"))
    np.testing.assert_allclose(np.asarray(outputs_of(tiled, made.params, rows)), ours, atol=2e-4)


def test_images_of_several_sizes_are_drawn_together_as_alone():
    made = model("attention", "strided")
    prompts = [Document("ab", picture(2), "c", other_size(2, 2), IMG), Document("x", IMG), Document(IMG)]
    options = {"max_tokens": 0, "temperature": 1.0}
    together = made.generate(prompts, seed=[0, 1, 2], **options)
    sizes = {out.images[-1].pixels.shape for out in together}
    assert len(sizes) > 1
    for prompt, seed, out in zip(prompts, (0, 1, 2), together, strict=True):
        (alone,) = made.generate([prompt], seed=[seed], **options)
        np.testing.assert_array_equal(alone.images[-1].pixels, out.images[-1].pixels)


@pytest.mark.parametrize(("images", "depth"), [("denoised", 2), ("read", 2), ("next_pixel", 1)])
def test_it_is_refused_where_it_has_no_meaning(images, depth):
    with pytest.raises(ConfigError, match=r"model\.sparse='strided' .* it needs model\.depth above 1"):
        Config(model=Model(width=32, patch=1, depth=depth, sparse="strided"), layout=Layout(images=images))
