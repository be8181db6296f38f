"""The search for the nearest code against all distances in float64, and the counts of what was used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.tokenizers import codebook

nearest = jax.jit(codebook.nearest, static_argnums=2)


def by_hand(z, codes):
    """Every distance, float64; NumPy's argmin takes the first of equals."""
    distances = np.square(np.asarray(z, float)[..., None, :] - np.asarray(codes, float)).sum(-1)
    return distances.argmin(-1), distances


@pytest.mark.parametrize(("size", "chunk"), [(1, 8), (7, 3), (16, 4), (17, 4), (17, 1), (17, 100)])
def test_nearest_is_the_nearest(size, chunk):
    rng = np.random.default_rng(size)
    z, codes = rng.standard_normal((3, 40, 5), np.float32), rng.standard_normal((size, 5), np.float32)
    ids = nearest(z, codes, chunk)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, by_hand(z, codes)[0])
    if size > 1:
        assert np.any(by_hand(z, codes[::-1])[0] != ids)  # the order of the codes matters: the test can fail


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=22, max_size=22), st.lists(st.integers(-4, 4), min_size=10, max_size=10))
def test_the_smallest_id_wins_a_tie(codes, z):
    """Small integers, so that equal distances are equal in float32 too; chunks of 4 and one of 3."""
    codes, z = np.reshape(codes, (11, 2)).astype(np.float32), np.reshape(z, (5, 2)).astype(np.float32) / 2
    np.testing.assert_array_equal(nearest(z, codes, 4), by_hand(z, codes)[0])


def test_equal_codes_in_different_chunks_give_the_first():
    codes = np.tile(np.random.default_rng(0).standard_normal((3, 4), np.float32), (5, 1))
    np.testing.assert_array_equal(nearest(codes, codes, 4), np.tile(np.arange(3), 5))


def test_bf16_vectors_are_compared_in_float32():
    rng = np.random.default_rng(1)
    z, codes = rng.standard_normal((500, 8), np.float32), rng.standard_normal((300, 8), np.float32)
    rounded = jnp.asarray(z, jnp.bfloat16)
    np.testing.assert_array_equal(nearest(rounded, codes), by_hand(rounded, codes)[0])
    in_bf16 = by_hand(rounded, jnp.asarray(codes, jnp.bfloat16))[0]
    assert np.any(in_bf16 != by_hand(rounded, codes)[0])  # codes rounded too: other ids


def test_the_products_are_float32_whatever_the_default():
    with jax.default_matmul_precision("bfloat16"):
        assert "HIGHEST" in str(jax.make_jaxpr(codebook.nearest)(jnp.ones((4, 3)), jnp.ones((5, 3))))
        assert "HIGHEST" not in str(jax.make_jaxpr(jnp.matmul)(jnp.ones((4, 3)), jnp.ones((3, 5))))


def test_the_search_needs_a_fraction_of_the_memory_of_all_distances():
    n, size = 4096, 8192
    shapes = jax.ShapeDtypeStruct((n, 8), jnp.float32), jax.ShapeDtypeStruct((size, 8), jnp.float32)

    def memory(chunk):
        return jax.jit(codebook.nearest, static_argnums=2).lower(*shapes, chunk).compile().memory_analysis().temp_size_in_bytes

    assert memory(128) < n * size * 4 / 20
    assert memory(size) > n * size * 4 * 0.9  # the control: one chunk of all codes


def test_the_search_has_no_gradient():
    z, codes = jnp.ones((2, 3)), jnp.arange(12.0).reshape(4, 3)
    float_ids = lambda z, codes: codebook.nearest(z, codes).astype(jnp.float32).sum()
    assert not any(np.any(g) for g in jax.grad(float_ids, (0, 1))(z, codes))


def test_counts_and_sums_against_loops():
    rng = np.random.default_rng(2)
    ids, weight = rng.integers(0, 6, (4, 9)).astype(np.int32), rng.integers(0, 2, (4, 9)).astype(np.float32)
    z = rng.standard_normal((4, 9, 3), np.float32)
    for w in (weight, None):
        each = np.ones(ids.shape) if w is None else w
        count, total = np.zeros(7), np.zeros((7, 3))
        for index in np.ndindex(*ids.shape):
            count[ids[index]] += each[index]
            total[ids[index]] += each[index] * z[index]
        np.testing.assert_array_equal(codebook.counts(ids, 7, w), count)
        np.testing.assert_allclose(codebook.sums(z, ids, 7, w), total, atol=1e-5)
        assert count[6] == 0


def test_donors_are_vectors_that_count_and_none_gives_twice():
    z = jnp.arange(20.0).reshape(2, 5, 2)
    weight = jnp.asarray([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]])
    dead = jnp.asarray([0, 1, 1, 0, 1, 1, 1, 0], bool)
    allowed = {tuple(v) for v in np.asarray(z)[np.asarray(weight) > 0].tolist()}
    seen = set()
    for seed in range(8):
        donor, given_one = jax.jit(codebook.donors)(jax.random.key(seed), dead, z, weight)
        np.testing.assert_array_equal(given_one, dead)
        gifts = [tuple(v) for v in np.asarray(donor)[np.asarray(dead)].tolist()]
        assert len(set(gifts)) == 5 and set(gifts) <= allowed
        seen |= set(gifts)
    assert seen == allowed  # and all are drawn sooner or later


def test_dead_codes_beyond_the_number_of_vectors_wait():
    z = jnp.arange(6.0).reshape(3, 2)
    weight = jnp.asarray([1.0, 0.0, 1.0])
    donors = jax.jit(codebook.donors)
    given_one = donors(jax.random.key(0), jnp.ones(5, bool), z, weight)[1]
    np.testing.assert_array_equal(given_one, [True, True, False, False, False])
    assert not np.any(donors(jax.random.key(0), jnp.ones(5, bool), z, jnp.zeros(3))[1])


def test_entropy_of_known_counts():
    for count, bits, share in [([4, 4, 4, 4], 2, 1), ([8, 4, 2, 2], 1.75, 1), ([5, 0, 0, 0], 0, 0.25), ([0, 0, 0, 0], 0, 0)]:
        count = jnp.asarray(count, jnp.float32)
        np.testing.assert_allclose(codebook.entropy_bits(count), bits, atol=1e-6)
        np.testing.assert_allclose(codebook.perplexity(count), 2**bits, rtol=1e-6)
        assert codebook.usage(count) == share


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=12, max_size=12).filter(any))
def test_entropy_is_at_most_that_of_the_codes_in_use(count):
    count = np.asarray(count, np.float32)
    used = float(codebook.usage(count)) * 12
    assert -1e-6 <= codebook.entropy_bits(count) <= np.log2(used) + 1e-5
    assert 1 - 1e-5 <= codebook.perplexity(count) <= used * (1 + 1e-5)


def test_unit_is_of_unit_length_and_leaves_zero_alone():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    np.testing.assert_allclose(codebook.unit(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    assert np.all(np.isfinite(jax.jacobian(codebook.unit)(x)))
