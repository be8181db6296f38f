"""Cached generation equals generation that runs whole training rows: tokens, logits, and images before rounding."""

import functools

import jax
import numpy as np
import pytest

from mmdiff.diffusion import grids
from mmdiff.document import IMG, Document
from mmdiff.layout import unpatchify
from mmdiff.sampling import image
from mmdiff.sampling import session as sessions
from mmdiff.sampling.generate import Model

from .reference import Reference

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def exact_draw():
    """`image.draw` up to its rounding."""
    return jax.jit(image.denoised, static_argnums=(0, 1))


@pytest.fixture
def recorded(monkeypatch, exact_draw):
    """(x_hats [b, n, p] of every call of `draw`, {document: [(pieces, logits)] after each phase})."""
    x_hats, phases = [], {}

    def draw(*arguments):
        x_hats.append(np.asarray(exact_draw(*arguments)))
        return image.to_pixels(x_hats[-1])

    def noting(method):
        @functools.wraps(method)
        def run(session):
            method(session)
            for number, draft in enumerate(session.drafts):
                if draft.mode < sessions.text.DONE:  # a finished document's cache goes no further
                    phases.setdefault(number, []).append((list(draft.pieces), np.asarray(session.logits[number])))

        return run

    monkeypatch.setattr(image, "draw", draw)
    for name in ("_read", "_write"):
        monkeypatch.setattr(sessions.Session, name, noting(getattr(sessions.Session, name)))
    return x_hats, phases


@pytest.mark.parametrize(("kind", "guidance"), [("gau", 1.0), ("gau", 2.5), ("attention", 1.0), ("attention", 2.5)])
def test_cached_equals_uncached(kind, guidance, request, recorded, new_picture):
    """Two documents at once, one with two images that the model sizes, one that begins with an image."""
    tiny = request.getfixturevalue(f"tiny_{kind}")
    model, reference = Model(tiny.cfg, tiny.params, tiny.vocabulary), Reference(tiny)
    prompts = [Document("12", IMG, "3", IMG), Document(new_picture(2, 3), "45", IMG)]
    options = {"temperature": 0.0, "max_tokens": 4, "steps": 3, "guidance": guidance, "max_images": 0}
    finished = model.generate(prompts, **options, seed=5)
    x_hats, phases = recorded
    assert len(finished[0].images) == 2 and len(finished[1].images) == 2
    compared = 0
    for number, (prompt, document) in enumerate(zip(prompts, finished, strict=True)):
        key = jax.random.fold_in(jax.random.key(5), number)
        drawn, written = iter(document.images[len(prompt.images) :]), ""
        for event, *what in reference.generate(prompt, key, model.options(**options), drawn):
            if event == "token":
                written += tiny.vocabulary.decode(what)
            elif event == "image":
                expected, shown = what
                size = len(expected)
                errors = [np.abs(x[:, :size] - expected).max((1, 2)).min() for x in x_hats if x.shape[1] >= size]
                assert min(errors) < TOLERANCE * (2 * guidance - 1)  # guidance multiplies the rounding of both branches
                pixels = np.clip((unpatchify(expected, shown.height // 2, shown.width // 2) + 1) * 127.5, 0, 255)
                assert np.abs(pixels - shown.pixels).max() < 0.51
                compared += 1
        assert "".join(document.texts) == "".join(prompt.texts) + written
    assert compared == 3
    for noted in phases.values():
        for pieces, logits in noted:
            np.testing.assert_allclose(logits, reference.logits(pieces), atol=TOLERANCE)
    # control: one wrong token far back, and neither logits nor images agree
    pieces, logits = phases[0][-1]
    wrong = [pieces[0]._replace(tokens=pieces[0].tokens[::-1].copy()), *pieces[1:]]
    assert np.abs(logits - reference.logits(wrong)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("solver", [s for s in grids.ONE_STAGE + grids.TWO_STAGE if s != "few_step"])
def test_every_solver_draws_what_its_table_says(tiny_gau, recorded, solver):
    tiny = tiny_gau
    model, reference = Model(tiny.cfg, tiny.params, tiny.vocabulary), Reference(tiny)
    options = {"image_size": (4, 6), "max_tokens": 0, "steps": 3, "solver": solver}
    model.generate([Document("12", IMG)], **options, seed=[1])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 2**30)
    pieces = tiny.pieces("12", (2, 3))
    expected = reference.draw([pieces[0], pieces[1]._replace(patches=None)], key, model.options(**options))
    np.testing.assert_allclose(recorded[0][0][0], expected, atol=TOLERANCE)
    other = reference.draw([pieces[1]._replace(patches=None)], key, model.options(**options))
    assert np.abs(other - expected).max() > 100 * TOLERANCE  # the text matters


def test_guidance_acts_only_within_its_interval(tiny_gau, recorded):
    tiny = tiny_gau
    model, reference = Model(tiny.cfg, tiny.params, tiny.vocabulary), Reference(tiny)
    pieces = tiny.pieces("12", (2, 3))
    pieces = [pieces[0], pieces[1]._replace(patches=None)]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 2**30)
    results = []
    for interval in ((0.0, 0.001), (0.5, 5.0), (0.0, float("inf"))):
        options = {"image_size": (4, 6), "max_tokens": 0, "steps": 3, "guidance": 3.0, "guidance_interval": interval}
        model.generate([Document("12", IMG)], **options, seed=[1])
        results.append(recorded[0][-1][0])
        np.testing.assert_allclose(results[-1], reference.draw(pieces, key, model.options(**options)), atol=3 * TOLERANCE)
    model.generate([Document("12", IMG)], image_size=(4, 6), max_tokens=0, steps=3, seed=[1])
    np.testing.assert_allclose(results[0], recorded[0][-1][0], atol=TOLERANCE)  # nothing inside: as without
    assert np.abs(results[1] - results[0]).max() > 1e-3 and np.abs(results[1] - results[2]).max() > 1e-3
