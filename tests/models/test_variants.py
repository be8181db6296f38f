"""The ablations of the network: each trains, packs and samples as the default does."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmdiff.config import ConfigError, Model
from mmdiff.document import IMG, DataError, Document
from mmdiff.layout import TIME, ImagePlan
from mmdiff.models import transfusion
from mmdiff.models.network import Network
from mmdiff.sampling import image
from mmdiff.sampling.generate import Model as Sampler
from tests.sampling.reference import Reference

TOLERANCE = 1e-5
VARIANTS = {
    "token": {"time": "token", "places": "learned"},
    "adaln": {"time": "adaln", "places": "sincos", "bias": True},
    "no time": {"time": "none", "rope": "none"},
    "concat": {"skip": "concat", "rope": "mixed", "block": "attention", "depth": 3},
    "lerp": {"skip": "lerp", "patch_head": "conv", "depth": 4},
    "overlap": {"overlap": 1, "bottleneck": 12},
    "adaln attention": {"time": "adaln", "block": "attention", "patch_head": "conv", "overlap": 1},
}


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request, new_tiny):
    return new_tiny(**VARIANTS[request.param])


def test_packed_rows_equal_single_documents(tiny):
    one = tiny.lay(tiny.pieces("12", (2, 2), "3", (1, 2)))
    two = tiny.lay(tiny.pieces("7", (2, 3), seed=9), [ImagePlan(False, 1)])
    row = tiny.batch([one, two], length=64)
    z, u = tiny.noise(row)
    logits, patches = tiny.forward(row, z, u)
    start = 0
    for alone in (one, two):
        here = slice(start, start + len(alone.tokens))
        pad = lambda a, here=here: np.pad(a[:, here], [(0, 0), (0, 64 - (here.stop - here.start))] + [(0, 0)] * (a.ndim - 2))
        text, picture = tiny.forward(tiny.batch([alone]), pad(z), pad(u))
        np.testing.assert_allclose(text[0, : len(alone.tokens)], logits[0, here], atol=2 * TOLERANCE, rtol=TOLERANCE)
        np.testing.assert_allclose(picture[0, : len(alone.tokens)], patches[0, here], atol=2 * TOLERANCE, rtol=TOLERANCE)
        start = here.stop
    _, other = tiny.forward(row, np.roll(z, 1, axis=1), u)
    assert np.abs(other - patches)[row.noised].max() > 1e-3  # control


def test_scanned_layers_equal_unrolled_ones(tiny, monkeypatch):
    row = tiny.batch([tiny.lay(tiny.pieces("12", (2, 2), "3", (1, 2)))])
    z, u = tiny.noise(row)

    def run(network):
        def total(params):
            model = network.bind(params)
            hidden = model.hidden(row.tokens, row.is_patch, z, u, row.cell, row.position, row.mask)
            return (model.predict(hidden, row.cell) ** 2).mean() + (model.text_logits(hidden) ** 2).mean()

        return jax.jit(jax.value_and_grad(total))(tiny.params)

    plain = run(tiny.network)
    monkeypatch.setattr(transfusion, "UNROLL_LIMIT", 0)
    other = Network(dataclasses.replace(tiny.cfg.model, remat="full"), tiny.vocabulary.size)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=TOLERANCE, rtol=1e-4), plain, run(other))


@pytest.fixture
def drawn(monkeypatch):
    """x_hat of every call of `draw`, before its rounding."""
    x_hats = []
    plain, rounded = image.draw.__wrapped__, image.to_pixels
    program = jax.jit(lambda *arguments: plain(*arguments), static_argnums=(0, 1))

    def draw(*arguments):
        monkeypatch.setattr(image, "to_pixels", lambda x: x)
        x_hats.append(np.asarray(program(*arguments)))
        monkeypatch.setattr(image, "to_pixels", rounded)
        return rounded(x_hats[-1])

    monkeypatch.setattr(image, "draw", draw)
    return x_hats


def test_cached_drawing_equals_whole_rows(tiny, drawn):
    """The second image is drawn with the first, clean one in the cache."""
    model, reference = Sampler(tiny.cfg, tiny.params, tiny.vocabulary), Reference(tiny)
    options = {"image_size": (4, 6), "max_tokens": 0, "steps": 3}
    (out,) = model.generate([Document("12", IMG, "3", IMG)], **options, seed=[1])
    base = jax.random.fold_in(jax.random.key(1), 0)
    pieces = tiny.pieces("12", (2, 3), "3", (2, 3))
    first = [pieces[0], pieces[1]._replace(patches=None)]
    np.testing.assert_allclose(
        drawn[0][0],
        reference.draw(first, jax.random.fold_in(base, 2**30), model.options(**options)),
        atol=2 * TOLERANCE,
        rtol=TOLERANCE,
    )
    shown = tiny.pieces("1", (2, 3))[1]._replace(patches=np.asarray(image.to_pixels(drawn[0][0])))
    second = [pieces[0], shown, pieces[2], pieces[3]._replace(patches=None)]
    key = jax.random.fold_in(base, 2**30 + 1)
    np.testing.assert_allclose(
        drawn[1][0], reference.draw(second, key, model.options(**options)), atol=2 * TOLERANCE, rtol=TOLERANCE
    )
    wrong = [pieces[0], pieces[1], pieces[2], pieces[3]._replace(patches=None)]
    assert np.abs(drawn[1][0] - reference.draw(wrong, key, model.options(**options))).max() > 100 * TOLERANCE
    assert len(out.images) == 2


@pytest.mark.parametrize("time", ["input", "token"])
def test_images_alone(new_tiny, drawn, time):
    tiny = new_tiny(markers=False, time=time)
    assert not {"text_embedding", "text_out", "norm"} & set(tiny.params)
    pieces = tiny.pieces((2, 3))
    row = tiny.lay(pieces, [ImagePlan(False, 1)])
    assert len(row.tokens) == 6 + (time == "token") and np.all(row.noised) and not row.text_weight.any()
    assert row.image_weight.sum() == pytest.approx(1) and (row.tokens == TIME).sum() == (time == "token")
    np.testing.assert_array_equal(row.mask.dense(len(row.tokens)), True)
    model, reference = Sampler(tiny.cfg, tiny.params, tiny.vocabulary), Reference(tiny)
    options = {"image_size": (4, 6), "steps": 3}
    (one,), pair = model.generate([Document(IMG)], **options, seed=[1]), model.generate([Document(IMG)] * 2, **options)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 2**30)
    expected = reference.draw([pieces[0]._replace(patches=None)], key, model.options(**options))
    np.testing.assert_allclose(drawn[0][0], expected, atol=2 * TOLERANCE, rtol=TOLERANCE)
    assert len(one.segments) == 1 and np.any(pair[0].images[0].pixels != pair[1].images[0].pixels)
    with pytest.raises(DataError, match="images alone"):
        model.generate([Document("12", IMG)], **options)
    with pytest.raises(ConfigError, match="image_size"):
        model.generate([Document(IMG)])


def test_images_of_one_row_do_not_see_each_other(new_tiny):
    tiny = new_tiny(markers=False)
    lay = lambda seed: tiny.lay(tiny.pieces((2, 2), seed=seed), [ImagePlan(False, 1)])
    row = tiny.batch([lay(0), lay(1)], length=8)
    z, u = tiny.noise(row)
    _, plain = tiny.forward(row, z, u)
    changed = z.copy()
    changed[0, 4:] += 1
    _, other = tiny.forward(row, changed, u)
    np.testing.assert_array_equal(plain[0, :4], other[0, :4])
    assert np.abs(plain - other)[0, 4:].max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 3}, "half of model.patch=4"),
        ({"bottleneck": 20}, "losslessly"),
        ({"time": "adaln", "time_embedding": "table"}, "needs model.time="),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Model(patch=4, **options)
