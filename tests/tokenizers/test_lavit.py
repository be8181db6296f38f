"""LaVIT's parts: attention under a policy, who reads whom, packed = dense, and that the selector is told what to keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdiff.tokenizers import lavit

from .semantic import filled

COUNT, WIDTH, HEADS = 9, 16, 2


@pytest.fixture(scope="module")
def parts():
    make = {
        "selector": lambda: lavit.Selector(WIDTH, nnx.Rngs(0)),
        "merger": lambda: lavit.Merger(WIDTH, 2, HEADS, nnx.Rngs(0)),
        "decoder": lambda: lavit.Decoder(COUNT, WIDTH, 4, 2, HEADS, nnx.Rngs(0)),
    }
    return {name: filled(part, number) for number, (name, part) in enumerate(make.items())}


@pytest.fixture(scope="module")
def features():
    return jax.random.normal(jax.random.key(9), (3, COUNT, WIDTH))


KEEP = jnp.array([[1, 0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]], jnp.float32)


def test_attention_under_a_policy_is_the_formula():
    rng = np.random.default_rng(0)
    scores, policy = rng.normal(size=(2, 3, 4, 5)), rng.integers(0, 2, (2, 4, 5))
    policy[0, 1] = 0
    expected = np.zeros_like(scores)
    for b, h, i in np.ndindex(2, 3, 4):
        may = policy[b, i] > 0
        powers = np.exp(scores[b, h, i] - scores[b, h, i][may].max(initial=-9)) * policy[b, i]
        expected[b, h, i] = (powers + 1e-6 / 5) / (powers.sum() + 1e-6)
    found = lavit.policy_attention(jnp.asarray(scores, jnp.float32), jnp.asarray(policy, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found[0, :, 1], 1 / 5, atol=1e-6)  # nothing may be read: the mean of all
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    scores, policy = jnp.asarray(scores, jnp.float32), jnp.asarray(policy, jnp.float32)
    free = lavit.policy_attention(scores, jnp.ones((2, 1, 5)))
    np.testing.assert_allclose(free, jax.nn.softmax(scores), atol=1e-5)
    # and so are its slopes, those at the largest score, too
    values = jax.random.normal(jax.random.key(0), scores.shape)
    among = lambda scores: jax.nn.softmax(jnp.where(policy[:, None] > 0, scores, -1e9))
    slope = lambda weights: jax.grad(lambda scores: (weights(scores) * values)[:, :, policy.any(-1)[0]].sum())(scores)
    np.testing.assert_allclose(slope(lambda scores: lavit.policy_attention(scores, policy)), slope(among), atol=1e-5)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _merged(graph, params, features, keep, most):
    merger = nnx.merge(graph, params)
    return merger(features, keep) if most is None else merger.packed(features, keep, most)


def merge(merger, features, keep, most=None):
    return _merged(*nnx.split(merger), features, keep, most)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_dense_where_something_is_kept(features, causal):
    merger = filled(lambda: lavit.Merger(WIDTH, 2, HEADS, nnx.Rngs(0), causal=causal), 1)
    dense = merge(merger, features, KEEP)
    for most in (COUNT, 6):
        packed = merge(merger, features, KEEP, most)
        at = jnp.take_along_axis(dense, packed.places[..., None], axis=1)
        off = jnp.abs(jnp.where(packed.filled[..., None], packed.x - at, 0)).max(axis=(1, 2))
        assert (off[:2] < 6e-5).all()
        assert packed.filled.sum(-1).tolist() == [min(most, count) for count in (4, 5, 9)]
    other = merge(merger, features, jnp.roll(KEEP, 1, axis=1), COUNT)
    assert jnp.abs(other.x[0, 0] - dense[0, other.places[0, 0]]).max() > 0.1
    for number in range(2):  # in the order of the image
        index = packed.places[number][packed.filled[number]]
        assert index.tolist() == np.flatnonzero(KEEP[number]).tolist()


@pytest.mark.parametrize("causal", [True, False])
def test_kept_patches_read_kept_ones_before_them_and_all_dropped_ones(features, causal):
    here = 3  # of the first image, of which 0, 2, 3 and 6 are kept
    merger = filled(lambda: lavit.Merger(WIDTH, 2, HEADS, nnx.Rngs(0), causal=causal), 1)
    read = jnp.abs(jax.grad(lambda x: merge(merger, x[None], KEEP[:1])[0, here].sum())(features[0])).max(-1) > 1e-4
    kept = KEEP[0] > 0
    assert read[jnp.array([0, 2, 3])].all() and bool(read[6]) != causal
    assert read[~kept].all()


def test_the_selector_learns_by_what_is_read(parts, features):
    graph, params = nnx.split(parts["selector"])

    def loss(params, detached):
        keep = lavit.kept(nnx.merge(graph, params)(features), jax.random.key(1))
        keep = jax.lax.stop_gradient(keep) if detached else keep
        merged = parts["merger"](features, keep)
        return lavit.feature_loss(features, parts["decoder"](merged[..., :4], keep)).mean()

    size = lambda tree: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))
    gradient = lambda detached: jax.jit(jax.grad(functools.partial(loss, detached=detached)))(params)
    assert size(gradient(False)) > 1e-2
    assert size(gradient(True)) == 0


def test_nothing_is_learnt_from_what_is_dropped(parts, features):
    """The first patch reads itself and whatever is dropped: that changes with the choice, and has no gradient in it."""
    first = jax.jit(lambda keep: parts["merger"](features, keep)[:, 0, :3].sum())
    keep = jnp.ones(features.shape[:2]).at[:, 3].set(0)
    assert abs(float(first(keep) - first(keep.at[:, 4].set(0)))) > 1e-3
    np.testing.assert_allclose(jax.jit(jax.grad(first))(keep), 0, atol=1e-6)  # e of (1) lets that much through


def test_choices_are_hard_and_noise_is_given_openly(parts, features):
    choice = parts["selector"](features)
    np.testing.assert_allclose(jnp.exp(choice).sum(-1), 1, rtol=1e-5)
    sure = lavit.kept(choice, None)
    np.testing.assert_array_equal(sure, choice[..., 0] >= choice[..., 1])
    one, again, other = (lavit.kept(choice, jax.random.key(seed)) for seed in (0, 0, 1))
    assert (one == again).all() and not (one == other).all() and set(np.unique(one)) <= {0.0, 1.0}
    many = jax.jit(jax.vmap(lambda key: lavit.kept(choice, key)))(jax.random.split(jax.random.key(2), 4000))
    np.testing.assert_allclose(many.mean(0), jnp.exp(choice[..., 0]), atol=0.04)  # as often as it is likely


def test_the_local_half_sees_its_patch_and_the_other_half_all(parts, features):
    changed = features.at[0, 5].set(features[1, 5])
    moved = jnp.abs(parts["selector"](changed) - parts["selector"](features)).max(-1)
    assert (moved[0] > 1e-6).all() and (moved[1:] == 0).all() and moved[0].argmax() == 5


def test_codes_are_decoded_by_rank(parts):
    codes = jax.random.normal(jax.random.key(3), (1, COUNT, 4))
    keep = KEEP[:1]
    decoded = parts["decoder"](codes, keep)
    order = jnp.argsort(1 - keep, axis=-1, stable=True)
    packed = jnp.take_along_axis(codes, order[..., None], axis=1)[:, :5]
    front = jnp.array([[1, 1, 1, 1, 0]], jnp.float32)
    np.testing.assert_allclose(parts["decoder"](packed, front), decoded, atol=1e-4)  # where they stood is not said
    noise = jnp.where(keep[..., None] > 0, codes, 7.0)
    np.testing.assert_allclose(parts["decoder"](noise, keep), decoded, atol=1e-4)  # nor what was dropped
    swapped = codes[:, jnp.array([2, 1, 0, *range(3, COUNT)])]
    assert jnp.abs(parts["decoder"](swapped, keep) - decoded).max() > 0.01


def test_a_fresh_decoder_knows_who_stands_beside_whom():
    """What it makes of one code differs from patch to patch, and least between those that touch."""
    fresh = lavit.Decoder(25, 32, 4, 1, HEADS, nnx.Rngs(0))
    decoded = np.asarray(jax.jit(lambda codes, keep: fresh(codes, keep))(jnp.ones((1, 25, 4)), jnp.ones((1, 25))))[0]
    apart = np.linalg.norm(decoded[:, None] - decoded, axis=-1)
    cells = np.stack(np.divmod(np.arange(25), 5), axis=-1)
    steps = np.abs(cells[:, None] - cells).sum(-1)
    near, far = apart[steps == 1].mean(), apart[steps >= 4].mean()
    assert near < 0.7 * far
    assert far > 0.1 * np.linalg.norm(decoded, axis=-1).mean()


def test_losses_by_hand():
    a = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    b = jnp.array([[[3.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_allclose(lavit.feature_loss(a, b), [0.5], atol=1e-6)
