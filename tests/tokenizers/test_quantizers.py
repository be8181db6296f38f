"""The quantizers: ids and codes go both ways, gradients go where they must, codebooks learn, on one device as on eight."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.config import ConfigError
from mmdiff.tokenizers import codebook
from mmdiff.tokenizers.quantizers.base import Learning, straight_through
from mmdiff.tokenizers.quantizers.fsq import FSQ, LEVELS
from mmdiff.tokenizers.quantizers.lfq import LFQ, entropy_gap
from mmdiff.tokenizers.quantizers.rotation import rotate_to
from mmdiff.tokenizers.quantizers.simvq import SimVQ
from mmdiff.tokenizers.quantizers.vq import SMOOTHING, VQ

ALL = [
    VQ(13, 4),
    VQ(13, 4, normalise=False, gradient="rotation"),
    VQ(13, 4, normalise=False, update="loss", restart=0),
    VQ(13, 4, gradient="rotation", update="loss", restart=0),
    SimVQ(13, 4),
    FSQ((8, 5, 3)),
    LFQ(5),
]
EMA = [q for q in ALL if isinstance(q, VQ) and q.update == "ema"]
each = pytest.mark.parametrize("quantizer", ALL, ids=str)


@functools.partial(jax.jit, static_argnames=("quantizer", "train"))
def quantise(quantizer, params, state, z, key=None, train=True, weight=None):
    return quantizer(params, state, z, Learning(key, weight) if train else None)


def made(quantizer, seed=0):
    """Params off their starting point, state, and vectors [6, 8, d]."""
    params, state = quantizer.init(jax.random.key(seed))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(seed + 1), p.shape), params)
    return params, state, jax.random.normal(jax.random.key(seed + 2), (6, 8, quantizer.width))


def same_bits(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b))


# Ids and codes


@each
def test_decode_gives_the_codes_bit_for_bit(quantizer):
    params, state, z = made(quantizer)
    out = quantise(quantizer, params, state, z, jax.random.key(0))
    assert out.codes.dtype == jnp.float32 and out.ids.dtype == jnp.int32 and out.loss.shape == ()
    decoded = jax.jit(quantizer.decode)(params, state, out.ids)
    assert same_bits(out.codes, decoded)
    if not isinstance(quantizer, FSQ | LFQ):
        usual = z + (decoded - z)
        assert not same_bits(usual, decoded)  # the usual form is the code only to a rounding


@each
def test_every_id_comes_back_the_last_one_too(quantizer):
    params, state, _ = made(quantizer)
    ids = jnp.arange(quantizer.size, dtype=jnp.int32)
    z = quantizer.decode(params, state, ids)
    assert len(np.unique(np.asarray(z), axis=0)) == quantizer.size
    z = fsq_preimage(quantizer, ids) if isinstance(quantizer, FSQ) else z
    np.testing.assert_array_equal(quantise(quantizer, params, state, z, train=False).ids, ids)


@each
def test_bf16_vectors_are_quantised_as_their_float32_values(quantizer):
    params, state, z = made(quantizer)
    z = 3 * jax.random.normal(jax.random.key(5), (4000, quantizer.width))
    rounded = z.astype(jnp.bfloat16)
    out, exact = (quantise(quantizer, params, state, x, train=False) for x in (rounded, rounded.astype(jnp.float32)))
    assert same_bits(out, exact)
    if not isinstance(quantizer, LFQ):  # rounding never changes a sign
        assert np.any(out.ids != quantise(quantizer, params, state, z, train=False).ids)


@each
def test_size_width_and_bits(quantizer):
    assert quantizer.bits == pytest.approx(math.log2(quantizer.size))
    assert hash(quantizer) == hash(type(quantizer)(**vars(quantizer)))
    assert made(quantizer)[2].shape[-1] == quantizer.width


# Gradients


def gradients(quantizer, of):
    """Of a number made of a Quantized, for params, state and z."""
    params, state, z = made(quantizer)

    def number(params, state, z):
        return of(quantizer(params, state, z, Learning(jax.random.key(0))))

    return jax.jit(jax.grad(number, (0, 1, 2)))(params, state, z)


def nonzero(tree) -> bool:
    return any(np.any(leaf) for leaf in jax.tree.leaves(tree))


@each
def test_the_gradient_of_the_codes_reaches_the_encoder_alone(quantizer):
    params, state, z = gradients(quantizer, lambda out: (out.codes**2).sum())
    assert not nonzero(params) and not nonzero(state) and nonzero(z)


@each
def test_what_is_trained_gets_a_gradient_and_the_state_none(quantizer):
    params, state, _ = gradients(quantizer, lambda out: (out.codes**3).sum() + out.loss)
    assert not nonzero(state) and bool(params) == nonzero(params)


@pytest.mark.parametrize("quantizer", EMA, ids=str)
def test_the_moving_average_hands_nothing_back(quantizer):
    _, state, z = gradients(quantizer, lambda out: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out.state)))
    assert not nonzero(state) and not nonzero(z)


@pytest.mark.parametrize("quantizer", [VQ(13, 4, normalise=False), SimVQ(13, 4), LFQ(5)], ids=str)
def test_the_straight_through_gradient_is_the_identity(quantizer):
    weights = jax.random.normal(jax.random.key(9), (6, 8, quantizer.width))
    assert same_bits(gradients(quantizer, lambda out: (weights * out.codes).sum())[2], weights)


def test_through_unit_length_the_gradient_is_that_of_the_direction():
    quantizer = VQ(13, 4)
    weights = jax.random.normal(jax.random.key(9), (6, 8, 4))
    seen = gradients(quantizer, lambda out: (weights * out.codes).sum())[2]
    z = made(quantizer)[2]
    np.testing.assert_allclose(seen, jax.vjp(codebook.unit, z)[1](weights)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((seen * z).sum(-1), 0, atol=1e-5)  # none along z


def test_straight_through_has_the_value_of_one_and_the_derivative_of_the_other():
    y, code = jnp.asarray([1.0, 2.0]), jnp.asarray([0.1, 0.3])
    value, change = jax.jvp(straight_through, (y, code), (jnp.asarray([5.0, 7.0]), jnp.asarray([100.0, 100.0])))
    np.testing.assert_array_equal(value, code)
    np.testing.assert_array_equal(change, [5.0, 7.0])


@pytest.mark.parametrize("make", [functools.partial(VQ, normalise=False, update="loss", restart=0), SimVQ])
def test_commitment_reaches_the_encoder_and_the_codebook_loss_the_codebook(make):
    params, _, z = gradients(make(13, 4, commitment=0.0), lambda out: out.loss)
    assert nonzero(params) and not nonzero(z)
    more_params, _, more_z = gradients(make(13, 4, commitment=0.5), lambda out: out.loss)
    np.testing.assert_allclose(*(jax.tree.leaves(p)[0] for p in (params, more_params)), rtol=1e-6)
    own_params, state, vectors = made(make(13, 4))
    code = quantise(make(13, 4), own_params, state, vectors).codes
    np.testing.assert_allclose(more_z, 0.5 * 2 * (vectors - code) / vectors.size, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("quantizer", EMA, ids=str)
def test_with_a_moving_average_the_loss_is_the_commitment(quantizer):
    params, state, z = made(quantizer)
    out = quantise(quantizer, params, state, z, train=False)
    z = codebook.unit(z) if quantizer.normalise else z
    np.testing.assert_allclose(out.loss, 0.25 * np.square(z - out.codes).mean(), rtol=1e-5)


# Padding, evaluation, keys


@each
def test_padding_changes_nothing(quantizer):
    params, state, z = made(quantizer)
    weight = jnp.asarray(np.random.default_rng(0).integers(0, 2, z.shape[:-1]), jnp.float32)
    garbage = jnp.where(weight[..., None] > 0, z, 50 + z)
    out, other = (quantise(quantizer, params, state, x, jax.random.key(1), weight=weight) for x in (z, garbage))
    assert same_bits((out.loss, out.state), (other.loss, other.state))
    if not isinstance(quantizer, FSQ):  # without weights the garbage shows
        assert out.loss != quantise(quantizer, params, state, garbage, jax.random.key(1)).loss


@each
def test_a_padded_batch_is_the_batch_without_padding(quantizer):
    quantizer = VQ(**vars(quantizer) | {"restart": 0}) if isinstance(quantizer, VQ) else quantizer  # donors differ
    params, state, z = made(quantizer)
    padded, weight = jnp.concatenate([z, 5 + z[:2]]), jnp.ones((8, 8)).at[6:].set(0)
    out, other = quantise(quantizer, params, state, z), quantise(quantizer, params, state, padded, weight=weight)
    np.testing.assert_allclose(other.loss, out.loss, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), other.state, out.state)
    nothing = quantise(quantizer, params, state, padded, weight=jnp.zeros((8, 8)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((nothing.loss, nothing.state)))


@each
def test_evaluation_leaves_the_state_alone_and_the_same_key_gives_the_same_bits(quantizer):
    params, state, z = made(quantizer)
    assert same_bits(quantise(quantizer, params, state, z, train=False).state, state)
    first, again = (quantise(quantizer, params, state, z, jax.random.key(3)) for _ in range(2))
    assert same_bits(first, again)
    assert same_bits(first.state, state) == (quantizer not in EMA)


# The codebook of VQ


def numpy_update(q, state, z, weight):
    """Equations (3) and (4) of mmdiff/tokenizers/quantizers/vq.py one vector at a time, float64; returns the state and ids."""
    length = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True) if q.normalise else x
    codes, counts, sums = (np.asarray(state[name], float) for name in ("codes", "counts", "sums"))
    z = length(np.asarray(z, float)).reshape(-1, q.width)
    n, m, ids = np.zeros(q.size), np.zeros((q.size, q.width)), []
    for vector, w in zip(z, np.asarray(weight).reshape(-1), strict=True):
        ids.append(np.square(vector - length(codes)).sum(-1).argmin())
        n[ids[-1]] += w
        m[ids[-1]] += w * vector
    counts, sums = q.decay * counts + (1 - q.decay) * n, q.decay * sums + (1 - q.decay) * m
    smoothed = (counts + SMOOTHING) / (counts.sum() + q.size * SMOOTHING) * counts.sum()
    return {"codes": np.where(n[:, None] > 0, sums / smoothed[:, None], codes), "counts": counts, "sums": sums}, ids


@pytest.mark.parametrize("normalise", [True, False])
def test_the_moving_average_is_the_plain_one(normalise):
    quantizer = VQ(50, 4, decay=0.7, normalise=normalise, restart=0)
    state = quantizer.init(jax.random.key(0))[1]
    ours, theirs, chosen = state, state, set()
    for step in range(4):
        z = 0.5 + jax.random.normal(jax.random.key(step + 1), (3, 5, 4))
        weight = np.random.default_rng(step).integers(0, 2, (3, 5))
        out = quantise(quantizer, {}, ours, z, weight=weight)
        theirs, ids = numpy_update(quantizer, theirs, z, weight)
        np.testing.assert_array_equal(out.ids.reshape(-1), ids)
        ours, chosen = out.state, chosen | set(ids)
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    idle = np.setdiff1d(np.arange(50), list(chosen))
    assert len(idle) and same_bits(ours["codes"][idle], state["codes"][idle])
    assert np.abs(ours["codes"] - state["codes"]).max() > 0.1


@pytest.mark.parametrize("normalise", [True, False])
def test_a_restarted_code_is_a_vector_of_the_batch_with_an_average_following(normalise):
    quantizer = VQ(13, 4, normalise=normalise, restart=0.5)
    state = quantizer.init(jax.random.key(0))[1] | {"counts": jnp.ones(13).at[jnp.asarray([2, 5, 12])].set(0.01)}
    z = jax.random.normal(jax.random.key(1), (2, 3, 4)) + 2
    weight = jnp.asarray([[1, 1, 0], [1, 1, 0]])
    new = quantise(quantizer, {}, state, z, jax.random.key(2), weight=weight).state
    plain = quantise(VQ(13, 4, normalise=normalise, restart=0), {}, state, z, weight=weight).state
    off = jax.jit(lambda on: quantizer({}, state, z, Learning(jax.random.key(2), weight, on)).state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), off(jnp.asarray(False)), plain)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), off(jnp.asarray(True)), new)
    changed = np.flatnonzero(np.any(new["codes"] != plain["codes"], axis=-1))
    assert 1 <= len(changed) <= 3 and set(changed) <= {2, 5, 12}
    vectors = np.asarray(codebook.unit(z) if normalise else z)[np.asarray(weight) > 0]
    for code in changed:
        assert np.isclose(vectors, new["codes"][code], rtol=1e-6).all(-1).any()
        np.testing.assert_allclose(new["counts"][code], plain["counts"].mean(), rtol=1e-6)
        np.testing.assert_allclose(new["sums"][code], new["counts"][code] * new["codes"][code], rtol=1e-6)
    others = np.setdiff1d(np.arange(13), changed)
    assert same_bits(*(jax.tree.map(lambda a: a[others], s) for s in (new, plain)))
    if len(changed) < 4:  # another key, other donors
        assert not same_bits(new, quantise(quantizer, {}, state, z, jax.random.key(7), weight=weight).state)


def test_training_with_restarts_needs_a_key():
    params, state, z = made(VQ(13, 4))
    with pytest.raises(ValueError, match="key="):
        quantise(VQ(13, 4), params, state, z)
    quantise(VQ(13, 4), params, state, z, train=False)
    quantise(VQ(13, 4, restart=0), params, state, z)


CLUSTERS, CODES = 16, 64


@functools.partial(jax.jit, static_argnums=0)
def learn_clusters(quantizer, steps=100):
    """(share of codes used, distance of the worst served cluster) after training on vectors around 16 points.

    The points lie to one side of the origin, so that few of the first codes are near them.
    """
    points = jax.random.normal(jax.random.key(0), (CLUSTERS, quantizer.width)) + 1.5
    points = codebook.unit(points) if quantizer.normalise else points

    def vectors(step, count=512):
        which, noise = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
        near = points[jax.random.randint(which, (count,), 0, CLUSTERS)]
        return near + 0.02 * jax.random.normal(noise, near.shape)

    def update(step, state):
        return quantizer({}, state, vectors(step), Learning(jax.random.fold_in(jax.random.key(2), step))).state

    state = jax.lax.fori_loop(0, steps, update, quantizer.init(jax.random.key(3))[1])
    used = codebook.usage(codebook.counts(quantizer({}, state, vectors(10**6, 4096)).ids, quantizer.size))
    codes = quantizer.decode({}, state, jnp.arange(quantizer.size))
    return used, jnp.linalg.norm(points[:, None] - codes, axis=-1).min(1).max()


@pytest.mark.parametrize("normalise", [True, False])
def test_restarts_find_the_clusters_and_keep_the_codes_in_use(normalise):
    used, worst = learn_clusters(VQ(CODES, 8, decay=0.9, normalise=normalise))
    assert used > 0.95 and worst < 0.05
    used, worst = learn_clusters(VQ(CODES, 8, decay=0.9, normalise=normalise, restart=0))
    assert used < 0.5 and worst > 0.2  # the control


@functools.partial(jax.jit, static_argnums=0)
def learn_by_gradient(quantizer, steps=200):
    """(share of codes used, squared error before, after) on Gaussian vectors ten times as wide one way as the other."""

    def vectors(step, count=256):
        key = jax.random.fold_in(jax.random.key(2), step)
        return jnp.asarray([1, 1, 0.1, 0.1]) * jax.random.normal(key, (count, quantizer.width))

    def update(step, params):
        gradient = jax.grad(lambda params: quantizer(params, state, vectors(step), Learning()).loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)

    def error(params):
        out = quantizer(params, state, held_out)
        return jnp.square(held_out - out.codes).mean(), codebook.usage(codebook.counts(out.ids, quantizer.size))

    held_out = vectors(10**6, 4096)
    first, state = quantizer.init(jax.random.key(1))
    after, used = error(jax.lax.fori_loop(0, steps, update, first))
    return used, error(first)[0], after


def test_a_mapped_basis_keeps_codes_in_use_that_a_codebook_with_its_own_loss_loses():
    """Both learn by gradient; one moves all codes, the other those that are chosen."""
    used, before, after = learn_by_gradient(SimVQ(CODES, 4))
    assert used > 0.95 and after < before / 2
    used, before, after = learn_by_gradient(VQ(CODES, 4, normalise=False, update="loss", restart=0))
    assert used < 0.7 and after < before


# FSQ


def numpy_fsq(levels, z):
    """(codes, ids), one value at a time, float64."""
    codes, ids = np.zeros(z.shape), np.zeros(z.shape[:-1], int)
    for index in np.ndindex(*z.shape[:-1]):
        step = 1
        for i, count in enumerate(levels):
            half = (count - 1) * 1.001 / 2
            offset = 0.0 if count % 2 else 0.5
            k = round(half * math.tanh(float(z[index][i]) + math.atanh(offset / half)) - offset)
            codes[index][i] = k / (count // 2)
            ids[index] += (k + count // 2) * step
            step *= count
    return codes, ids


def fsq_preimage(quantizer, ids):
    """Vectors in the middle of the cells of the ids."""
    levels = np.asarray(quantizer.levels)
    k = np.stack(np.unravel_index(np.asarray(ids), levels, order="F"), -1) - levels // 2
    half, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
    return jnp.asarray(np.arctanh((k + offset) / half) - np.arctanh(offset / half), jnp.float32)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(3, 20), min_size=1, max_size=5))
def test_fsq_is_the_plain_one(levels):
    quantizer = FSQ(tuple(levels))
    z = 2 * np.random.default_rng(len(levels)).standard_normal((30, len(levels)), np.float32)
    codes, ids = numpy_fsq(levels, z)
    out = quantise(quantizer, {}, {}, z)
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_allclose(out.codes, codes, rtol=1e-6)
    assert ids.min() >= 0 and ids.max() < quantizer.size and out.loss == 0


@pytest.mark.parametrize(
    ("levels", "z", "codes", "id"),
    [
        ((3,), [0.0], [0.0], 1),
        ((3,), [0.54], [0.0], 1),  # 1.001 tanh z passes 1/2 at z = 0.5487
        ((3,), [0.56], [1.0], 2),
        ((3,), [-0.56], [-1.0], 0),
        ((4,), [0.0], [0.0], 2),  # k = -2, -1, 0, 1
        ((4,), [-0.3], [0.0], 2),  # without the shift it would be -1/2
        ((4,), [9.0], [0.5], 3),
        ((4,), [-9.0], [-1.0], 0),
        ((8, 5), [0.0, 0.0], [0.0, 0.0], 4 + 8 * 2),
        ((8, 5), [9.0, 9.0], [0.75, 1.0], 39),
        ((8, 5), [-9.0, -9.0], [-1.0, -1.0], 0),
        ((8, 5), [9.0, -9.0], [0.75, -1.0], 7),
    ],
)
def test_fsq_by_hand(levels, z, codes, id):
    out = quantise(FSQ(levels), {}, {}, jnp.asarray(z))
    assert out.codes.tolist() == codes and out.ids == id


@pytest.mark.parametrize(("codes", "size"), [(256, 240), (1024, 1000), (4096, 4375), (16384, 15360), (65536, 64000)])
def test_all_codes_of_the_papers_levels_come_back(codes, size):
    quantizer = FSQ(LEVELS[codes])
    assert quantizer.size == size
    ids = np.arange(size)
    out = quantise(quantizer, {}, {}, fsq_preimage(quantizer, ids))
    np.testing.assert_array_equal(out.ids, ids)
    parts = np.stack(np.unravel_index(ids, quantizer.levels, order="F"), -1) * quantizer._steps
    in_bf16 = np.asarray(jnp.asarray(parts, jnp.bfloat16).sum(-1), int)
    assert size < 1000 or np.mean(in_bf16 != ids) > 0.4  # why the ids are integer arithmetic


def test_zero_lies_in_the_middle_of_its_cell():
    np.testing.assert_allclose(FSQ((3, 4, 5, 6, 8))._bounded(jnp.zeros(5)), 0, atol=1e-6)  # tan for atanh: 4e-4 off


def test_no_level_lies_outside_the_grid():
    quantizer = FSQ((3, 4, 999, 1000))
    for z, id in [(1e30, quantizer.size - 1), (-1e30, 0), (12.0, quantizer.size - 1), (-12.0, 0)]:
        assert quantise(quantizer, {}, {}, jnp.full(4, z)).ids == id


def test_the_gradient_of_fsq_is_that_of_the_bounded_value():
    quantizer = FSQ((8, 5, 3))
    z = np.asarray(made(quantizer)[2], float)
    half, below = np.asarray([7, 4, 2]) * 1.001 / 2, np.asarray([4, 2, 1])
    shift = np.arctanh(np.asarray([0.5, 0, 0]) / half)
    seen = gradients(quantizer, lambda out: out.codes.sum())[2]
    np.testing.assert_allclose(seen, half * (1 - np.tanh(z + shift) ** 2) / below, rtol=1e-4, atol=1e-6)


# LFQ


def all_signs(width):
    return np.asarray(list(itertools.product([-1, 1], repeat=width)), float)[:, ::-1]  # row v has the bits of v


def entropy(p):
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_entropy_of_lfq_against_all_codes(width, weighted):
    rng = np.random.default_rng(width)
    z, weight = 0.4 * rng.standard_normal((50, width)), rng.integers(0, 2, 50) if weighted else np.ones(50)
    signs = all_signs(width)
    score = np.exp(-np.square(z[:, None] - signs).sum(-1))
    p = (score / score.sum(-1, keepdims=True))[weight > 0]  # softmax of minus the squared distances
    sample = entropy(p).mean()
    bit = p.mean(0) @ (signs > 0)  # probability of each bit in the batch
    independent = np.prod(np.where(signs > 0, bit, 1 - bit), axis=-1)
    seen = entropy_gap(jnp.asarray(z, jnp.float32), jnp.asarray(weight, jnp.float32) if weighted else None)
    np.testing.assert_allclose(seen, sample - entropy(independent), atol=2e-5)
    assert entropy(independent) >= entropy(p.mean(0)) - 1e-12  # an upper bound of the batch's entropy
    assert -width * math.log(2) <= seen <= 0


def test_the_entropy_term_is_finite_where_every_bit_is_sure():
    gap = jax.jit(jax.value_and_grad(entropy_gap))
    both, same = jnp.asarray([[100.0], [-100.0]]) * jnp.ones(3), jnp.full((2, 3), 100.0)
    for z in (both, same, jnp.zeros((2, 3))):
        assert all(np.all(np.isfinite(x)) for x in gap(z))
    np.testing.assert_allclose(gap(both)[0], -3 * math.log(2), rtol=1e-5)  # the best there is
    np.testing.assert_allclose(gap(same)[0], 0, atol=1e-5)  # sure, but always the same


def test_the_loss_of_lfq_is_its_two_terms():
    quantizer = LFQ(5, entropy=0.3, commitment=0.7)
    z = made(quantizer)[2]
    out = quantise(quantizer, {}, {}, z)
    np.testing.assert_allclose(out.loss, 0.7 * np.square(z - out.codes).mean() + 0.3 * entropy_gap(z), rtol=1e-5)


def test_the_bits_of_lfq_are_the_signs():
    out = quantise(LFQ(4), {}, {}, jnp.asarray([0.1, -3.0, 0.0, 2.0]))
    assert out.ids == 0b1001 and out.codes.tolist() == [1, -1, -1, 1]
    assert quantise(LFQ(30), {}, {}, jnp.ones(30)).ids == 2**30 - 1


# The rotation trick


def explicit_rotation(z, q):
    """|q|/|z| R as a matrix, float64."""
    u, v = z / np.linalg.norm(z), q / np.linalg.norm(q)
    w = (u + v) / np.linalg.norm(u + v)
    return np.linalg.norm(q) / np.linalg.norm(z) * (np.eye(len(z)) - 2 * np.outer(w, w) + 2 * np.outer(v, u))


_pull = jax.jit(lambda z, q, g: jax.vjp(rotate_to, z, q)[1](g)[0])


def pulled_back(z, q, g):
    return np.asarray(_pull(*(np.asarray(x, np.float32) for x in (z, q, g))))


def test_the_rotation_is_the_explicit_one():
    rng = np.random.default_rng(0)
    z, q, g = rng.standard_normal((3, 20, 5))
    z, q = z * rng.uniform(0.1, 10, (20, 1)), q * rng.uniform(0.1, 10, (20, 1))
    seen = pulled_back(z, q, g)
    for i in range(20):
        matrix = explicit_rotation(z[i], q[i])
        np.testing.assert_allclose(matrix @ z[i], q[i], rtol=1e-9)  # it is the rotation of z to q
        scale = np.linalg.norm(q[i]) / np.linalg.norm(z[i])
        np.testing.assert_allclose(matrix.T @ matrix, scale**2 * np.eye(5), atol=1e-9 * scale**2)
        np.testing.assert_allclose(seen[i], matrix.T @ g[i], rtol=1e-3, atol=1e-5 * scale)
    assert np.abs(seen - g).max() > 0.5  # not the straight-through gradient
    assert same_bits(rotate_to(*jnp.float32([z, q])), jnp.float32(q))


vectors = st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4).filter(lambda v: np.linalg.norm(v) > 0.1)


@settings(max_examples=50, deadline=None)
@given(vectors, vectors, vectors, st.sampled_from([0.0, 1e-7, 1e-6, 1e-3, 1.0]))
def test_the_gradient_is_as_long_as_the_rotation_says(z, q, g, apart):
    """Also where the two point nearly or exactly apart."""
    z, g = np.float32(z), np.float32(g)
    q = np.float32(apart * np.asarray(q) - z) if apart < 1 else np.float32(q)
    if np.linalg.norm(q) < 0.05:
        return
    ratio = np.linalg.norm(q.astype(float)) / np.linalg.norm(z.astype(float))
    np.testing.assert_allclose(np.linalg.norm(pulled_back(z, q, g)), ratio * np.linalg.norm(g), rtol=1e-5)


def test_the_opposite_vector_and_zero_give_finite_gradients():
    z, g = np.asarray([1.0, 2.0, -3.0]), np.asarray([0.3, -0.5, 0.7])
    u = z / np.linalg.norm(z)
    np.testing.assert_allclose(pulled_back(z, -2 * z, g), 2 * (g - 2 * (g @ u) * u), rtol=1e-5)
    assert np.all(np.isfinite(pulled_back(0 * z, z, g))) and np.all(np.isfinite(pulled_back(z, 0 * z, g)))


def test_vq_uses_the_rotation():
    quantizer = VQ(13, 4, normalise=False, gradient="rotation")
    params, state, z = made(quantizer)
    code = quantise(quantizer, params, state, z, train=False).codes
    g = jax.random.normal(jax.random.key(4), z.shape)
    seen = gradients(quantizer, lambda out: (g * out.codes).sum())[2]
    expected = [explicit_rotation(*np.asarray([z[i], code[i]], float)).T @ g[i] for i in np.ndindex(6, 8)]
    np.testing.assert_allclose(seen.reshape(-1, 4), expected, rtol=1e-3, atol=1e-4)


# Eight devices


@pytest.fixture(scope="module")
def learnt():
    script = Path(__file__).with_name("on_eight_devices.py")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_codebook_learnt_on_eight_devices_is_that_of_one(learnt):
    one, eight, eighth = learnt["one"], learnt["eight"], learnt["eighth"]
    for name in ("codes", "counts", "sums"):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-6, atol=1e-6)
        assert np.abs(np.subtract(eighth[name], one[name])).max() > 0.05  # the control: one device's share of the batch
    assert eight["restarts"] == one["restarts"] > 0


def test_all_devices_hold_the_same_codebook(learnt):
    assert set(learnt["eight"]["copies"]) == {8} and learnt["eight"]["spread"] == 0


# Configuration


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VQ(1, 4), "VQ.size=1 must be at least 2"),
        (lambda: VQ(8, 0), "VQ.width=0 must be at least 1"),
        (lambda: VQ(8, 1), "use a larger width, normalise=False or LFQ"),
        (lambda: VQ(8, 4, decay=1.0), "VQ.decay=1.0 must be at least 0 and below 1"),
        (lambda: VQ(8, 4, commitment=-1), "VQ.commitment=-1 must not be negative"),
        (lambda: VQ(8, 4, restart=1.0), "VQ.restart=1.0 must be at least 0 "),
        (lambda: VQ(8, 4, gradient="ste"), "VQ.gradient='ste' is unknown; known: straight_through, rotation"),
        (lambda: VQ(8, 4, update="sgd"), "VQ.update='sgd' is unknown; known: ema, loss"),
        (lambda: VQ(8, 4, update="loss"), "with update='loss' set restart=0"),
        (lambda: SimVQ(1, 4), "SimVQ.size=1 must be at least 2"),
        (lambda: SimVQ(8, 0), "SimVQ.width=0 must be at least 1"),
        (lambda: SimVQ(8, 4, commitment=-1), "SimVQ.commitment=-1 must not be negative"),
        (lambda: FSQ(()), "FSQ.levels=() must be a tuple, for example (8, 6, 5)"),
        (lambda: FSQ([8, 5]), "FSQ.levels=[8, 5] must be a tuple"),
        (lambda: FSQ((8, 2)), "FSQ.levels=(8, 2) must each be at least 3; for two levels per value use LFQ"),
        (lambda: FSQ((1001,)), "use more values with fewer levels"),
        (lambda: FSQ((1000,) * 4), "more than int32 can number"),
        (lambda: LFQ(31), "LFQ.width=31 must be between 1 and 30"),
        (lambda: LFQ(0), "LFQ.width=0 must be between 1 and 30"),
        (lambda: LFQ(4, entropy=-1), "LFQ.entropy=-1 must not be negative"),
        (lambda: LFQ(4, commitment=-1), "LFQ.commitment=-1 must not be negative"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, says):
    with pytest.raises(ConfigError) as refused:
        make()
    assert says in str(refused.value) and "\n" not in str(refused.value)
