"""SEED: the Q-Former reads in its order, its first stage stays as it was through the second, and its codes give images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmdiff
from mmdiff.config import ConfigError, Layout, Sampling
from mmdiff.data.batches import Batches
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError, Document, Image
from mmdiff.nn.qformer import QFormer, reading
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.tokenizers.seed import WARMEST, Words, contrast, matching, pair_losses, scale_of
from mmdiff.tokenizers.tower import resolved
from mmdiff.training.checkpoint import restore_params
from mmdiff.training.loop import train

from .semantic import CODES, encoder, experiment, filled, pixels
from .test_semantic import Listed

WIDTH, QUERIES = 8, 3
SETTINGS = dataclasses.replace(CODES, latents=QUERIES, normalise=False, commitment=1.0)


def first_stage(folder):
    cfg = experiment("seed", folder, SETTINGS, steps=2, sample_every=0, init="elsewhere")
    return dataclasses.replace(
        cfg,
        tokenizer=dataclasses.replace(cfg.tokenizer, stage=1),
        layout=Layout(row_length=160, images="read", max_grid=8),
        training=dataclasses.replace(cfg.training, init=""),
        sampling=Sampling(),
    )


def second_stage(folder, init, settings=SETTINGS):
    return experiment("seed", folder, settings, steps=2, checkpoint_every=1, sample_every=0, init=str(init))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="module")
def stages(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("seed")
    first = train(first_stage(folder), place / "one")
    second = train(second_stage(folder, place / "one"), place / "two")
    return place, first, second


def test_both_stages_are_trained_and_validated(stages):
    place, first, second = stages
    assert {"validation_contrast_loss", "validation_match_loss", "validation_caption_loss", "retrieval"} <= set(first)
    assert 0 <= first["retrieval"] <= 1
    assert {"psnr", "query_cosine", "embedding_cosine", "codes_used"} <= set(second)
    assert second["bits_per_image"] == pytest.approx(QUERIES * second["code_bits"])
    with pytest.raises(DataError, match="has no codes yet"):
        mmdiff.load_tokenizer(place / "one")


def test_the_first_stage_stays_as_it_was_to_the_bit(stages):
    place, _, _ = stages
    one = restore_params(place / "one" / "checkpoints")[0]
    for ema in (True, False):
        two = restore_params(place / "two" / "checkpoints", ema=ema)[0]
        for part in ("tower", "former"):
            for a, b in zip(jax.tree.leaves(one[part]), jax.tree.leaves(two[part]), strict=True):
                np.testing.assert_array_equal(a, b)
    before, after = (restore_params(place / "two" / "checkpoints", ema=False, step=step)[0]["between"] for step in (1, 2))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_codes_stand_in_one_row_and_come_back(stages):
    tokenizer = mmdiff.load_tokenizer(stages[0] / "two")
    assert tokenizer.grid == (1, QUERIES) and not tokenizer.dynamic
    ids = tokenizer.encode(pixels(3))
    assert ids.shape == (3, QUERIES)
    np.testing.assert_array_equal(tokenizer.decode(ids), tokenizer.reconstruct(pixels(3)))
    changed = np.array(ids)
    changed[:, -1] = (changed[:, -1] + 1) % 24
    assert (tokenizer.decode(changed) != tokenizer.decode(ids)).any()


def test_pairs_are_cut_out_of_packed_rows(folder, tmp_path):
    cfg = resolved(first_stage(folder), tmp_path)
    vocabulary, images = Vocabulary.bytes(max_grid=8), pixels(3)
    documents = [Document("abc", Image(images[0])), Document(Image(images[1]), "de"), Document("no image")]
    network = TokenizerNetwork.of(cfg, None, vocabulary.size)
    batches = Batches(Listed(documents), vocabulary, cfg, learn=False)
    rows = batches.batch(0, [0])
    found, tokens, real, weight = map(np.asarray, network.pairs(rows))
    whole = {
        vocabulary.decode(t[r].tolist()[1:-1]): np.rint((i + 1) * 127.5)
        for i, t, r, w in zip(found, tokens, real, weight, strict=True)
        if w
    }
    assert set(whole) == {"abc", "de"}
    np.testing.assert_array_equal(whole["abc"], images[0])
    np.testing.assert_array_equal(whole["de"], images[1])


@pytest.fixture(scope="module")
def former():
    asked = filled(lambda: QFormer(WIDTH, 5, 2, 2, QUERIES, nnx.Rngs(0)), 1)
    return asked, filled(lambda: Words(30, 6, WIDTH, 2, 4, nnx.Rngs(0)), 2)


FEATURES = jax.random.normal(jax.random.key(3), (2, 4, 5))
TOKENS = jnp.array([[1, 7, 8, 9, 2, 0], [1, 11, 2, 0, 0, 0]])
REAL = TOKENS > 0


@functools.partial(jax.jit, static_argnums=(0, 2))
def _outputs(graph, params, kind, moved, features, tokens):
    asked, words = nnx.merge(graph, params)
    asked.queries[...] = asked.queries[...] + moved
    return asked(features, reading(QUERIES, REAL, kind, causal=True), words(tokens), words.mlps)


def outputs(former, kind, features=FEATURES, tokens=TOKENS, shift=None):
    moved = jnp.zeros((QUERIES, WIDTH))
    moved = moved if shift is None else moved.at[shift].set(jnp.arange(WIDTH) / 4)
    return _outputs(*nnx.split(former), kind, moved, features, tokens)


@pytest.mark.parametrize("kind", ["apart", "together", "caption"])
def test_who_reads_whom(former, kind):
    queries, text = outputs(former, kind)
    moved = lambda other: jnp.abs(other - queries).max(-1)
    later, _ = outputs(former, kind, shift=1)
    assert (moved(later)[:, 1:] > 1e-4).all()
    if kind != "together":  # there they hear of it through the text
        assert (moved(later)[:, 0] == 0).all()
    changed = TOKENS.at[0, 3].set(12)
    told, words = outputs(former, kind, tokens=changed)
    assert (moved(told)[0] > 1e-4).all() if kind == "together" else (moved(told) == 0).all()
    touched = jnp.abs(words - text).max(-1)[0] > 1e-5
    assert touched[3:5].all() and touched[:3].all() == (kind != "caption")
    _, seen = outputs(former, kind, features=FEATURES[::-1])
    assert (jnp.abs(seen - text).max() > 1e-4) == (kind != "apart")
    padded = outputs(former, kind, tokens=TOKENS.at[1, 4].set(20))
    np.testing.assert_array_equal(padded[0], queries)
    np.testing.assert_array_equal(padded[1][1, :3], text[1, :3])


def test_only_every_second_layer_reads_the_image():
    made = QFormer(WIDTH, 5, 4, 2, QUERIES, nnx.Rngs(0))
    assert [layer.cross is not None for layer in made.layers] == [True, False, True, False]


def test_losses_of_pairs_by_hand(former):
    features = jnp.concatenate([FEATURES, FEATURES[:1], FEATURES[:1]])
    tokens = jnp.concatenate([TOKENS, TOKENS[:1], TOKENS[:1]])
    real, weight = tokens > 0, jnp.array([1.0, 1.0, 1.0, 0.0])
    run = jax.jit(lambda *arguments: pair_losses(*former, *arguments))
    found, right = run(features, tokens, real, weight, jax.random.key(0))
    scores = np.asarray(contrast(*former, features[:3], tokens[:3], real[:3]), np.float64)
    same = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    target = same / same.sum(-1, keepdims=True)
    nats = lambda s: -(target * (s - np.log(np.exp(s).sum(-1, keepdims=True)))).sum(-1)
    np.testing.assert_allclose(found["contrast_loss"], (nats(scores) + nats(scores.T)).mean() / 2, rtol=1e-4)
    assert right == pytest.approx(np.mean([same[i, scores[i].argmax()] for i in range(3)]))
    # of two different pairs the one that does not match is certain
    of_two, _ = run(FEATURES, TOKENS, REAL, jnp.ones(2), jax.random.key(0))
    answer = jax.jit(lambda *arguments: matching(*former, *arguments))
    yes = answer(FEATURES, TOKENS, REAL)[:, 1]
    no = answer(FEATURES, TOKENS[::-1], REAL[::-1])[:, 0]
    np.testing.assert_allclose(of_two["match_loss"], (-yes - 2 * no.mean()).mean() / 3, rtol=1e-4)
    _, text = outputs(former, "caption")
    said = jax.nn.log_softmax(text @ former[1].embedding[...].T)
    words = [said[0, i, TOKENS[0, i + 1]] for i in range(4)] + [said[1, i, TOKENS[1, i + 1]] for i in range(2)]
    np.testing.assert_allclose(of_two["caption_loss"], -np.mean(words), rtol=1e-4)


def test_a_scale_beyond_its_bound_comes_back_and_grows_no_further():
    """(s - target)^2 from beyond the bound: down to a smaller target, and no further up to a larger one."""
    beyond = jnp.log(WARMEST) + 0.5
    slope = jax.jit(jax.grad(lambda log_scale, target: jnp.square(scale_of(log_scale) - target)))
    assert slope(beyond, 2 * WARMEST) == 0 < slope(beyond, 0.5 * WARMEST)
    log_scale = beyond
    for _ in range(300):
        log_scale -= 1e-4 * slope(log_scale, 50.0)
    np.testing.assert_allclose(scale_of(log_scale), 50, rtol=1e-3)
    below = jnp.float32(1.0)
    np.testing.assert_array_equal(scale_of(below), jnp.exp(below))
    np.testing.assert_allclose(slope(below, 50.0), 2 * (jnp.e - 50) * jnp.e, rtol=1e-5)
    assert scale_of(beyond) == WARMEST


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(ConfigError, match="set training.init to the folder of that run"):
        experiment("seed", folder, SETTINGS)
    with pytest.raises(ConfigError, match="set it, to 8 or 32"):
        second_stage(folder, "one", dataclasses.replace(SETTINGS, latents=0))
    with pytest.raises(ConfigError, match="set layout.markers=True"):
        experiment("seed", folder, dataclasses.replace(SETTINGS, stage=1))
    with pytest.raises(ConfigError, match="deterministic=True has no meaning"):
        second_stage(folder, "one", dataclasses.replace(SETTINGS, deterministic=True))
