"""Choosing tokens: greedy, narrowed, masked; and the grammar of a document."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.document import IMG, Document
from mmdiff.sampling import text
from mmdiff.sampling.generate import Model

SIZE = 12


def choice(temperature=1.0, narrow=None):
    return text.Choice(jnp.float32(temperature), narrow, jnp.int32(0), jnp.int32(0), jnp.int32(9))


narrow = text.Narrow.of
choose = jax.jit(text.choose)
DRAWS = 400
KEYS = jax.random.split(jax.random.key(0), DRAWS)


def drawn(logits, allowed, how):
    """The set of tokens that 400 draws give."""
    many = lambda a: jnp.broadcast_to(jnp.asarray(a), (DRAWS, SIZE))
    return np.asarray(choose(many(logits), many(allowed), KEYS, how))


def kept(logits, allowed, temperature, top_k, top_p, min_p):
    """Which tokens may be drawn, one after another from the most likely down."""
    p = np.where(allowed, np.exp(logits.astype(np.float64) / temperature), 0)
    p /= p.sum()
    order, total, keep = np.argsort(-p), 0.0, set()
    for place, token in enumerate(order):
        first = place == 0
        if first or (total < top_p and (top_k == 0 or place < top_k) and p[token] >= min_p * p[order[0]]):
            keep.add(int(token))
        total += p[token]
    return {t for t in keep if allowed[t]}, p


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 8]),
    top_p=st.sampled_from([0.3, 0.8, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
)
def test_narrowing_equals_numpy(seed, temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(SIZE).astype(np.float32)
    allowed = rng.random(SIZE) < 0.7
    allowed[rng.integers(SIZE)] = True
    expected, p = kept(logits, allowed, temperature, top_k, top_p, min_p)
    found = drawn(logits, allowed, choice(temperature, narrow(top_k, top_p, min_p)))
    assert set(found.tolist()) <= expected
    shares = p / p[list(expected)].sum()
    assert {t for t in expected if shares[t] > 0.05} <= set(found.tolist())


def test_without_narrowing_the_distribution_is_the_softmax():
    logits = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    allowed = np.arange(SIZE) < 9
    _, p = kept(logits, allowed, 1.0, 0, 1.0, 0.0)
    share = np.bincount(drawn(logits, allowed, choice()), minlength=SIZE) / DRAWS
    assert np.abs(share - p).max() < 0.08 and share[9:].sum() == 0


@pytest.mark.parametrize("limits", [None, narrow(top_p=0.5), narrow(top_k=3, min_p=0.1)])
def test_temperature_0_takes_the_most_likely_that_is_allowed(limits):
    logits = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)
    allowed = np.ones(SIZE, bool)
    allowed[logits.argmax()] = False
    assert set(drawn(logits, allowed, choice(0.0, limits)).tolist()) == {int(np.where(allowed, logits, -9).argmax())}


# Documents: the grammar holds whatever the network says.


@pytest.fixture(scope="module")
def model(tiny_gau):
    return Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary)


@pytest.fixture(scope="module")
def wild(model, tiny_gau):
    """32 documents at temperature 2, at most 6 tokens and 2 images each, and the prompts they continue."""
    prompts = [Document("12"), Document("3", IMG, "4"), Document(IMG), Document("567")] * 8
    return prompts, model.generate(prompts, temperature=2.0, max_tokens=6, max_images=2, steps=1, seed=4)


def test_prompts_are_kept_and_budgets_respected(wild):
    for prompt, document in zip(*wild, strict=True):
        asked = prompt.segments.count(IMG)
        before, after = "".join(prompt.texts), "".join(document.texts)
        assert after.startswith(before) and len(after) <= len(before) + 6
        assert asked <= len(document.images) <= asked + 2
        assert document.extra["ended"] or len(after) == len(before) + 6


def test_the_budgets_matter(wild):
    """The controls of the test above: some documents end by themselves, some run out, some draw all they may."""
    ended = [document.extra["ended"] for document in wild[1]]
    assert any(ended) and not all(ended)
    extra = [len(d.images) - p.segments.count(IMG) for p, d in zip(*wild, strict=True)]
    assert set(extra) == {0, 1, 2}


def test_sizes_are_complete_and_of_every_kind(wild):
    sizes = {(image.height // 2, image.width // 2) for document in wild[1] for image in document.images}
    assert len(sizes) > 5 and any(r != c for r, c in sizes) and all(1 <= side <= 4 for size in sizes for side in size)


def test_an_image_asked_for_is_drawn_where_it_was_asked_for(wild):
    for prompt, document in zip(*wild, strict=True):
        for place, segment in enumerate(prompt.segments):
            assert (segment is IMG) == (document.segments[place] in document.images if segment is IMG else False)


def test_no_tokens_no_images_nothing_is_added(model):
    prompt = Document("12")
    assert model.generate([prompt], max_tokens=0)[0] == prompt
    alone = model.generate([prompt] * 16, max_tokens=6, max_images=0, temperature=2.0, seed=1)
    assert not any(document.images for document in alone)


def test_the_largest_image_fits_a_training_row(model, tiny_gau, monkeypatch):
    """With room for 6 patches, sizes of up to 4 x 4 are cut to those that fit, rows and columns together."""
    from mmdiff.sampling import session as sessions

    monkeypatch.setattr(sessions.Session, "_largest_image", lambda session: 6)
    drawn = model.generate([Document(IMG)] * 32, temperature=2.0, max_tokens=0, steps=1, seed=2)
    sizes = {(d.images[0].height // 2, d.images[0].width // 2) for d in drawn}
    assert max(r * c for r, c in sizes) == 6 or max(r * c for r, c in sizes) == 4
    assert all(r * c <= 6 for r, c in sizes) and len(sizes) > 3
