"""FSQ, LFQ, BSQ and the rotation trick against plain transcriptions of their formulas."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.tokenizers.quantizers.bsq import BSQ
from mmdiff.tokenizers.quantizers.fsq import FSQ, LEVELS
from mmdiff.tokenizers.quantizers.lfq import LFQ, entropy_gap
from mmdiff.tokenizers.quantizers.rotation import rotate_to
from mmdiff.tokenizers.quantizers.vq import VQ

from .quantizing import fsq_preimage, gradients, made, quantise, same_bits

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


# BSQ


def test_the_code_of_bsq_is_the_nearest_of_all_on_the_sphere_and_never_far():
    quantizer = BSQ(5)
    z = np.random.default_rng(0).standard_normal((400, 5))
    out = quantise(quantizer, {}, {}, jnp.asarray(z, jnp.float32))
    u, codes = z / np.linalg.norm(z, axis=-1, keepdims=True), all_signs(5) / math.sqrt(5)
    distance = np.linalg.norm(u[:, None] - codes, axis=-1)
    np.testing.assert_array_equal(out.ids, distance.argmin(-1))
    np.testing.assert_allclose(out.codes, codes[distance.argmin(-1)], rtol=1e-6)
    assert distance.min(-1).max() < math.sqrt(2 - 2 / math.sqrt(5))
    assert np.linalg.norm(z - out.codes, axis=-1).max() > math.sqrt(2 - 2 / math.sqrt(5))  # as z itself can be


@pytest.mark.parametrize("width", [2, 5])
def test_the_loss_of_bsq_against_all_codes(width):
    z = np.random.default_rng(width).standard_normal((50, width))
    u, codes = z / np.linalg.norm(z, axis=-1, keepdims=True), all_signs(width) / math.sqrt(width)
    square = np.square(u[:, None] - codes).sum(-1)
    score = np.exp(-width * square)
    p = score / score.sum(-1, keepdims=True)
    bit = p.mean(0) @ (codes > 0)
    independent = np.prod(np.where(codes > 0, bit, 1 - bit), axis=-1)
    expected = 0.7 * square.min(-1).mean() / width + 0.3 * (entropy(p).mean() - entropy(independent))
    out = quantise(BSQ(width, entropy=0.3, commitment=0.7), {}, {}, jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(out.loss, expected, atol=2e-5)


def test_the_gradient_of_bsq_is_that_of_the_direction():
    z, weights = made(BSQ(5))[2], jax.random.normal(jax.random.key(9), (6, 8, 5))
    seen = gradients(BSQ(5), lambda out: (weights * out.codes).sum())[2]
    u = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    across = (weights - (weights * u).sum(-1, keepdims=True) * u) / jnp.linalg.norm(z, axis=-1, keepdims=True)
    np.testing.assert_allclose(seen, across, rtol=1e-4, atol=1e-6)


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
