"""Adapters by themselves: who reads whom, by what a change leaves alone; forms that are known; losses that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdiff.adapters.causal_former import CausalFormer
from mmdiff.adapters.gated import GatedCrossAttention
from mmdiff.adapters.linear import PerPatch
from mmdiff.adapters.qformer import QFormerAdapter
from mmdiff.adapters.qformer_losses import CLS, PAD, Pretraining, as_bytes, hard_negatives, losses
from mmdiff.adapters.resampler import Resampler
from mmdiff.config import Model
from mmdiff.layout import IntervalMask
from mmdiff.parallel.sharding import NOWHERE

FEATURES = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
SIZES = (6, 8, 3, 8, 2, 2)  # features, model, tokens, width, depth, heads


@pytest.mark.parametrize("hidden", [False, True])
def test_each_patch_by_itself(hidden):
    """LLaVA's layers by hand; the class token makes no difference."""
    layer = PerPatch(6, 8, nnx.Rngs(0), NOWHERE, hidden=hidden)
    layer.first.bias[...] = np.linspace(-1, 1, 8)
    x = FEATURES[:, 1:] @ np.asarray(layer.first.kernel[...]) + np.linspace(-1, 1, 8)
    if hidden:
        x = np.asarray(jax.nn.gelu(x, approximate=False)) @ np.asarray(layer.second.kernel[...])
    np.testing.assert_allclose(layer(FEATURES), x, atol=1e-5)


def test_a_resampler_layer_by_hand():
    """One head, one layer: latents read [features; latents], both normed, then the MLP."""
    made = Resampler(6, 8, 3, 8, 1, 1, nnx.Rngs(0), NOWHERE)
    array = lambda parameter: np.asarray(parameter[...])
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    layer = made.layers[0]
    x = FEATURES[:, 1:] @ array(made.into.kernel)
    latents = np.broadcast_to(array(made.latents), (2, 3, 8))
    keys = np.concatenate([norm(x), norm(latents)], axis=1)
    k, v = (keys @ array(layer.attention.kv.kernel)[:, i] for i in range(2))
    scores = norm(latents) @ array(layer.attention.q.kernel) @ k.swapaxes(1, 2) / 8**0.5
    latents = latents + np.asarray(jax.nn.softmax(scores)) @ v @ array(layer.attention.out.kernel)
    up = norm(latents) @ array(layer.mlp.up.kernel)
    latents = latents + np.asarray(jax.nn.gelu(up, approximate=False)) @ array(layer.mlp.down.kernel)
    np.testing.assert_allclose(jax.jit(lambda: made(FEATURES))(), norm(latents) @ array(made.out.kernel), atol=1e-5)


def test_a_query_of_the_causal_former_does_not_depend_on_later_ones():
    made = CausalFormer(*SIZES, nnx.Rngs(1), NOWHERE)
    graph, params = nnx.split(made)
    run = jax.jit(lambda params: nnx.merge(graph, params)(FEATURES))
    before = run(params)
    made.queries[...] = made.queries[...].at[1, 0].add(1.0)
    after = run(nnx.state(made))
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    assert (np.abs(after[:, 1:] - before[:, 1:]).max(-1) > 1e-4).all()


def test_a_query_of_the_qformer_depends_on_all():
    made = QFormerAdapter(*SIZES, nnx.Rngs(1), NOWHERE)
    graph, params = nnx.split(made)
    run = jax.jit(lambda params: nnx.merge(graph, params)(FEATURES))
    before = run(params)
    made.former.queries[...] = made.former.queries[...].at[1, 0].add(1.0)
    assert (np.abs(run(nnx.state(made)) - before).max(-1) > 1e-5).all()


def test_gates_start_closed():
    """A gated layer is the identity at first; opened, positions read the images before them, and zeros where there is none."""
    layer = GatedCrossAttention(Model(width=8, head_width=4, block="attention", lossless=False), (2, 4, 4), nnx.Rngs(2))
    rng, here = np.random.default_rng(1), np.arange(5)[None]
    x, vectors = (rng.standard_normal((1, 5, 8)).astype(np.float32) for _ in range(2))
    shown, mask = np.array([[False, False, True, True, False]]), IntervalMask(0 * here, here + 1, here, here)

    graph, params = nnx.split(layer)
    with_ = jax.jit(lambda params, vectors: nnx.merge(graph, params)(x, vectors, shown, mask, None)[0])
    np.testing.assert_array_equal(with_(params, vectors), x)
    layer.gate_attention[...] = jnp.ones(())
    opened = nnx.state(layer)
    run = lambda vectors: np.asarray(with_(opened, vectors))
    moved = np.abs(run(vectors) - x).max(-1)[0] > 1e-4
    assert moved.tolist() == [False, False, True, True, True]
    other = np.array(vectors)
    other[0, 3] += rng.standard_normal(8)
    changed = np.abs(run(other) - run(vectors)).max(-1)[0] > 1e-6
    assert changed.tolist() == [False, False, False, True, True]
    other = np.array(vectors)
    other[0, [0, 1, 4]] += 1  # no image stands there
    np.testing.assert_array_equal(run(other), run(vectors))


@pytest.fixture(scope="module")
def pretraining():
    model = Pretraining(6, 3, 8, 2, 2, 8, nnx.Rngs(3))
    for parameter in (model.words, model.place, model.former.queries):  # small at the start
        parameter[...] = parameter[...] * 50
    return model


IDS = np.stack([as_bytes(text, 8) for text in ("abcd", "xyz")])


def test_words_have_their_ends():
    assert IDS[1].tolist() == [CLS, 120, 121, 122, 258, PAD, PAD, PAD]
    assert as_bytes("x" * 20, 8).tolist() == [CLS, *[120] * 6, 258]


def test_who_reads_whom_in_each_loss(pretraining):
    """By what changes: queries and texts apart, together, and a text that reads the image and its past."""
    model = pretraining
    other = IDS.copy()
    other[1, 3] = 100  # the last byte of the second text
    kinds = ("apart", "together", "caption")
    run = jax.jit(lambda features, ids: {kind: model.read(features, ids, kind) for kind in kinds})
    read = lambda features, ids, kind: run(features, ids)[kind]
    changed = lambda one, two: np.abs(np.asarray(one) - np.asarray(two)).max(-1) > 1e-6
    for kind in kinds:
        queries, text = read(FEATURES, IDS, kind)
        with_word, with_image = read(FEATURES, other, kind), read(FEATURES[::-1], IDS, kind)
        assert not changed(queries[0], with_word[0][0]).any()  # another text is not read at all
        assert changed(queries[1], with_word[0][1]).all() == (kind == "together")
        assert changed(text[1], with_word[1][1])[:5].tolist() == ([False] * 3 + [True] * 2 if kind == "caption" else [True] * 5)
        assert changed(queries, with_image[0]).all()
        assert changed(text, with_image[1])[:, :4].all() == (kind != "apart")
    moved = IDS.copy()
    moved[1, 5] = 100  # behind the end: were it read, it would count
    assert not changed(read(FEATURES, IDS, "caption")[1][1, :5], read(FEATURES, moved, "caption")[1][1, :5]).any()


def test_losses_have_their_known_values(pretraining):
    """Four pairs, of which the last two say the same; vectors set by hand."""
    ids = np.concatenate([IDS, IDS[1:], IDS[:1]])[[0, 1, 1, 3]]
    ids[3] = as_bytes("q", 8)
    features = np.concatenate([FEATURES, FEATURES])
    model = pretraining

    @jax.jit
    def run():
        images, texts = model.vectors(features, ids)
        s, nats = model.similarity(images, texts), model.caption_nats(features, ids)
        drawn = hard_negatives(s, jnp.asarray(same), key)
        return losses(model, features, ids, key), images, texts, s, nats, drawn

    same, key = (ids[:, None] == ids).all(-1), jax.random.key(1)
    parts, images, texts, s, nats, (image, text) = run()
    s = np.asarray(s, np.float64)
    each = np.einsum("nkw,mw->nkm", np.asarray(images), np.asarray(texts))
    np.testing.assert_allclose(s, each.max(1) / 0.07, rtol=1e-4)
    target = 0.9 * same / same.sum(-1, keepdims=True) + 0.1 / 4
    cross = lambda s: -(target * (s - np.log(np.exp(s).sum(-1, keepdims=True)))).sum(-1).mean()
    np.testing.assert_allclose(parts.contrast, (cross(s) + cross(s.T)) / 2, rtol=1e-4)
    nats = np.asarray(nats)
    assert (nats[:, 0] == 0).all() and (nats[:, 1:][ids[:, 1:] == PAD] == 0).all()
    np.testing.assert_allclose(parts.caption, nats.sum() / (ids[:, 1:] != PAD).sum(), rtol=1e-5)
    assert not same[range(4), text].any() and not same[image, range(4)].any()
    assert (ids[image] != ids[text]).any() and (features[image] != features[text]).any()  # the one is not the other
    said = [model.match_logits(*pairs) for pairs in ((features, ids), (features, ids[text]), (features[image], ids))]
    odds = np.concatenate([said[0][:, 1] - said[0][:, 0], *(other[:, 0] - other[:, 1] for other in said[1:])])
    np.testing.assert_allclose(parts.match, np.log1p(np.exp(-odds)).mean(), rtol=1e-4)


def test_hard_negatives_are_hard_and_negative():
    s = jnp.array([[9.0, 8.0, -50.0], [0.0, 9.0, 50.0], [-50.0, 50.0, 9.0]])
    draw = jax.jit(hard_negatives)
    for seed in range(4):
        image, text = draw(s, jnp.eye(3, dtype=bool), jax.random.key(seed))
        assert text.tolist() == [1, 2, 1] and image.tolist() == [1, 2, 1]
    together = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    assert draw(s, together, jax.random.key(0))[1].tolist()[:2] == [2, 2]
