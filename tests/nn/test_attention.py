"""Attention: the dense form against plain loops, the blockwise form against the dense one, and the masks obeyed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.layout import IntervalMask
from mmdiff.nn.attention import Growing, KeyValue, attention, dense_attention, join, squeezed
from mmdiff.nn.attention_blockwise import blockwise_attention

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
    return normal(B, heads, queries, C), normal(B, heads, keys, C), normal(B, heads, keys, E)


def numpy_attention(q, k, v, mask):
    """One query, head and key at a time, float64."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, t in np.ndindex(*q.shape[:3]):
        keys = [
            s
            for s in range(k.shape[2])
            if mask.context_start[b, t] <= s < mask.context_end[b, t] or mask.block_start[b, t] <= s < mask.block_end[b, t]
        ]
        scores = SCALE * k[b, h, keys].astype(np.float64) @ q[b, h, t]
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights / weights.sum() @ v[b, h, keys]
    return out


def numpy_gradients(q, k, v, mask, cotangent):
    """The backward pass of softmax attention by hand, float64, from the dense mask."""
    allowed = np.asarray(mask.dense(k.shape[2]))[:, None]
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    scores = np.where(allowed, SCALE * np.einsum("bhtc,bhsc->bhts", q, k), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bhte,bhse->bhts", cotangent, v)
    ds = SCALE * p * (dp - (p * dp).sum(-1, keepdims=True))
    return np.einsum("bhts,bhsc->bhtc", ds, k), np.einsum("bhts,bhtc->bhsc", ds, q), np.einsum("bhts,bhte->bhse", p, cotangent)


@jax.jit
def dense(q, k, v, mask):
    return dense_attention(q, [KeyValue(k, v)], mask, scale=SCALE)


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
    cotangent = rng.standard_normal((B, heads, T, E)).astype(np.float32)
    for ours, theirs in zip(gradients(dense, q, k, v, mask, cotangent), numpy_gradients(q, k, v, mask, cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, heads=st.sampled_from([1, 2]))
def test_blockwise_equals_dense_with_gradients(seed, heads):
    rng = np.random.default_rng(seed)
    q, k, v = random_inputs(rng, heads)
    mask = random_mask(rng, T, T)
    np.testing.assert_allclose(blockwise(q, k, v, mask), dense(q, k, v, mask), atol=TOLERANCE)
    cotangent = rng.standard_normal((B, heads, T, E)).astype(np.float32)
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
    changed = np.abs(np.asarray(function(q, k, v, mask)) - np.asarray(function(q, k, v, wrong))).max((1, 3))
    assert changed[1, 6] > 100 * TOLERANCE
    changed[1, 6] = 0
    assert changed.max() == 0


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("impl", ["dense", "blockwise"])
def test_parts_are_keys_one_behind_the_other(impl, heads):
    rng = np.random.default_rng(4)
    queries, cached = 5, 9
    q, k, v = random_inputs(rng, heads, queries, cached + queries)
    mask = random_mask(rng, queries, cached + queries)
    cache, own = KeyValue(k[:, :, :cached], v[:, :, :cached]), KeyValue(k[:, :, cached:], v[:, :, cached:])
    out = attention(q, [cache, own], mask, scale=SCALE, impl=impl)
    np.testing.assert_allclose(out, numpy_attention(q, k, v, mask), atol=TOLERANCE)
    wrong = attention(q, [own, cache], mask, scale=SCALE, impl=impl)
    assert np.abs(wrong - out).max() > 100 * TOLERANCE


@pytest.mark.parametrize("heads", [1, 2])
def test_a_growing_context_is_a_cache_and_the_tokens_written_since(heads):
    """Three tokens, one at a time: the third reads the cache and the first two as if they had stood there."""
    rng = np.random.default_rng(7)
    cached, room = 4, 5
    _, k, v = random_inputs(rng, heads, 1, cached + 3)
    cache = KeyValue(k[:, :, :cached], v[:, :, :cached])
    fresh = KeyValue(*(squeezed(jnp.zeros((B, heads, room, width))) for width in (C, E)))
    for column in range(3):
        one = slice(cached + column, cached + column + 1)
        parts, fresh = join(Growing(cache, fresh, jnp.int32(column)), KeyValue(k[:, :, one], v[:, :, one]))
    together = KeyValue(*(jnp.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True)))
    np.testing.assert_array_equal(together.k[:, :, : cached + 3], k)
    np.testing.assert_array_equal(together.v[:, :, : cached + 3], v)
    assert together.k.shape[2] == cached + room and not np.any(together.k[:, :, cached + 3 :])


def traced(length: int, dtype=jnp.float32, impl="auto", values: int = E) -> str:
    """The program of attention over `length` positions."""
    q, k, v = (jax.ShapeDtypeStruct((1, 1, length, width), dtype) for width in (C, C, values))
    mask = IntervalMask(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 4)
    return str(
        jax.make_jaxpr(lambda q, k, v, mask: attention(q, [KeyValue(k, v)], mask, scale=SCALE, impl=impl))(q, k, v, mask)
    )


def test_long_rows_take_the_tiled_forms():
    assert "while" not in traced(1024) and "pallas" not in traced(1024)
    either = traced(1100)  # chosen when the program is lowered, so that a TPU's is right on any machine
    assert "while" in either and "pallas" in either
    assert "pallas" not in traced(1100, jnp.float16) and "while" in traced(1100, jnp.float16)  # what the kernels refuse


def test_an_implementation_that_cannot_do_it_says_why():
    with pytest.raises(ValueError, match=r"'splash'.*'dense', 'blockwise' or 'pallas'"):
        traced(T, impl="splash")
    with pytest.raises(ValueError, match=r"'pallas' takes float32 or bfloat16 throughout, not float16"):
        traced(T, jnp.float16, impl="pallas")
    with pytest.raises(ValueError, match=r"'pallas' takes at most 1024 values in a head or a multiple of 128, not 1100"):
        traced(T, impl="pallas", values=1100)
    with pytest.raises(ValueError, match=r"'pallas' cannot hold 1 lists of 66049 visits"):
        traced(257 * 512, impl="pallas")


@pytest.mark.parametrize("function", [dense, blockwise])
def test_large_scores_stay_finite(function):
    q, k, v = (100 * a for a in random_inputs(np.random.default_rng(6), 1))
    mask = random_mask(np.random.default_rng(6), T, T)
    assert np.all(np.isfinite(function(q, k, v, mask)))
    for grad in gradients(function, q, k, v, mask, np.ones((B, 1, T, E), np.float32)):
        assert np.all(np.isfinite(grad))
