"""Attention: the dense form against plain loops, the blockwise form against the dense one, and the masks obeyed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.layout import IntervalMask
from mmdiff.nn.attention import KeyValue, attention, blockwise_attention, dense_attention

T, B, C, E = 13, 2, 8, 6  # not a multiple of the block
BLOCK = 4
SCALE = 0.4
TOLERANCE = 2e-5


def random_mask(rng, queries, keys) -> IntervalMask:
    """Two intervals per query; at least one of them is not empty, as in every row that `lay_out` writes."""
    start = rng.integers(0, keys, (B, queries))
    end = start + rng.integers(0, keys, (B, queries)) % (keys - start + 1)
    block_start = rng.integers(0, keys, (B, queries))
    block_end = block_start + 1 + rng.integers(0, keys, (B, queries)) % (keys - block_start)
    return IntervalMask(*(np.asarray(a, np.int32) for a in (start, end, block_start, block_end)))


def random_inputs(rng, heads, queries=T, keys=T):
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return normal(B, queries, heads, C), normal(B, keys, heads, C), normal(B, keys, heads, E)


def numpy_attention(q, k, v, mask):
    """One query, head and key at a time, float64."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        keys = [
            s
            for s in range(k.shape[1])
            if mask.context_start[b, t] <= s < mask.context_end[b, t] or mask.block_start[b, t] <= s < mask.block_end[b, t]
        ]
        scores = SCALE * k[b, keys, h].astype(np.float64) @ q[b, t, h]
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, keys, h]
    return out


def numpy_gradients(q, k, v, mask, cotangent):
    """The backward pass of softmax attention by hand, float64, from the dense mask."""
    allowed = np.asarray(mask.dense(k.shape[1]))[:, None]
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    scores = np.where(allowed, SCALE * np.einsum("bthc,bshc->bhts", q, k), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthe,bshe->bhts", cotangent, v)
    ds = SCALE * p * (dp - (p * dp).sum(-1, keepdims=True))
    return np.einsum("bhts,bshc->bthc", ds, k), np.einsum("bhts,bthc->bshc", ds, q), np.einsum("bhts,bthe->bshe", p, cotangent)


@jax.jit
def dense(q, k, v, mask):
    return dense_attention(q, k, v, mask, scale=SCALE)


@jax.jit
def blockwise(q, k, v, mask):
    return blockwise_attention(q, k, v, mask, scale=SCALE, block=BLOCK)


@functools.partial(jax.jit, static_argnums=0)
def gradients(function, q, k, v, mask, cotangent):
    return jax.vjp(lambda *qkv: function(*qkv, mask), q, k, v)[1](cotangent)


seeds = st.integers(0, 2**31)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, heads=st.sampled_from([1, 2]))
def test_dense_equals_plain_loops_with_gradients(seed, heads):
    rng = np.random.default_rng(seed)
    q, k, v = random_inputs(rng, heads)
    mask = random_mask(rng, T, T)
    np.testing.assert_allclose(dense(q, k, v, mask), numpy_attention(q, k, v, mask), atol=TOLERANCE)
    cotangent = rng.standard_normal((B, T, heads, E)).astype(np.float32)
    for ours, theirs in zip(gradients(dense, q, k, v, mask, cotangent), numpy_gradients(q, k, v, mask, cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, heads=st.sampled_from([1, 2]))
def test_blockwise_equals_dense_with_gradients(seed, heads):
    rng = np.random.default_rng(seed)
    q, k, v = random_inputs(rng, heads)
    mask = random_mask(rng, T, T)
    np.testing.assert_allclose(blockwise(q, k, v, mask), dense(q, k, v, mask), atol=TOLERANCE)
    cotangent = rng.standard_normal((B, T, heads, E)).astype(np.float32)
    pairs = zip(gradients(blockwise, q, k, v, mask, cotangent), gradients(dense, q, k, v, mask, cotangent), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("function", [dense, blockwise])
@pytest.mark.parametrize("field", IntervalMask._fields)
def test_every_end_of_every_interval_counts(function, field):
    """The negative control: one number of the mask off by one, and only that query's result changes."""
    rng = np.random.default_rng(3)
    q, k, v = random_inputs(rng, 1)
    full = lambda value: np.full((B, T), value, np.int32)
    mask = IntervalMask(full(2), full(5), full(7), full(10))
    wrong = mask._replace(**{field: getattr(mask, field).copy()})
    getattr(wrong, field)[1, 6] += 1
    changed = np.abs(np.asarray(function(q, k, v, mask)) - np.asarray(function(q, k, v, wrong))).max((2, 3))
    assert changed[1, 6] > 100 * TOLERANCE
    changed[1, 6] = 0
    assert changed.max() == 0


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("impl", ["dense", "blockwise"])
def test_a_cache_is_keys_that_stand_before(impl, heads):
    rng = np.random.default_rng(4)
    queries, cached = 5, 9
    q, k, v = random_inputs(rng, heads, queries, cached + queries)
    mask = random_mask(rng, queries, cached + queries)
    cache = KeyValue(jnp.asarray(k[:, :cached].swapaxes(1, 2)), jnp.asarray(v[:, :cached].swapaxes(1, 2)))
    out = attention(q, k[:, cached:], v[:, cached:], mask, scale=SCALE, cache=cache, impl=impl)
    np.testing.assert_allclose(out, numpy_attention(q, k, v, mask), atol=TOLERANCE)
    swapped = KeyValue(cache.k[:, :, ::-1], cache.v[:, :, ::-1])
    wrong = attention(q, k[:, cached:], v[:, cached:], mask, scale=SCALE, cache=swapped, impl=impl)
    assert np.abs(wrong - out).max() > 100 * TOLERANCE


def test_long_rows_take_the_blockwise_form_and_unknown_names_are_refused():
    rng = np.random.default_rng(5)
    q, k, v = random_inputs(rng, 1)
    mask = random_mask(rng, T, T)
    short = jax.make_jaxpr(lambda *a: attention(*a, mask, scale=SCALE))(q, k, v)
    assert "scan" not in str(short)
    long = [jax.ShapeDtypeStruct((1, 1100, 1, width), jnp.float32) for width in (C, C, E)]
    ones = IntervalMask(*[jnp.ones((1, 1100), jnp.int32)] * 4)
    assert "scan" in str(jax.make_jaxpr(lambda *a: attention(*a, ones, scale=SCALE))(*long))
    with pytest.raises(ValueError, match=r"'splash'.*'dense' or 'blockwise'"):
        attention(q, k, v, mask, scale=SCALE, impl="splash")


@pytest.mark.parametrize("function", [dense, blockwise])
def test_large_scores_stay_finite(function):
    q, k, v = (100 * a for a in random_inputs(np.random.default_rng(6), 1))
    mask = random_mask(np.random.default_rng(6), T, T)
    assert np.all(np.isfinite(function(q, k, v, mask)))
    for grad in gradients(function, q, k, v, mask, np.ones((B, T, 1, E), np.float32)):
        assert np.all(np.isfinite(grad))
