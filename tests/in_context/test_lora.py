"""Low-rank additions: nothing at first, nothing but themselves changed, and they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.in_context import lora

from .tiny import language, logits

TOKENS = np.tile(np.random.default_rng(0).integers(3, 300, (1, 12)), (6, 1)).astype(np.int32)


def bits(params):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def test_it_starts_as_nothing_and_is_the_published_sum():
    which, ids = language(), TOKENS[:1]
    additions = lora.fresh(which.params, jax.random.key(0))
    assert additions["0"]["q"]["a"].shape == (16, 4) and set(additions["1"]) == {"q", "k"}
    assert bits(lora.added(which.params, additions)) == bits(which.params)
    plain = logits(which, ids)
    np.testing.assert_array_equal(logits(which.replaced(lora.added(which.params, additions)), ids), plain)
    additions["1"]["k"]["b"] = jnp.ones((4, 16))
    changed = lora.added(which.params, additions)
    wanted = which.params["layers"][1]["k"]["kernel"] + 8 * additions["1"]["k"]["a"].sum(1, keepdims=True)
    np.testing.assert_allclose(changed["layers"][1]["k"]["kernel"], np.broadcast_to(wanted, (16, 16)), rtol=1e-5, atol=1e-5)
    assert np.abs(logits(which.replaced(changed), ids) - plain).max() > 1e-3
    assert changed["layers"][0]["v"]["kernel"] is which.params["layers"][0]["v"]["kernel"]
    assert changed["embedding"] is which.params["embedding"]
    with pytest.raises(ConfigError, match="LoRA on 'w'"):
        lora.fresh(which.params, jax.random.key(0), matrices=("w",))


def test_it_learns_and_leaves_the_rest_to_the_bit():
    which, losses = language(), []
    before = bits(which.params)
    settings = {"steps": 30, "batch": 4, "learning_rate": 3e-2, "matrices": ("q", "v")}
    found = lora.trained(which, TOKENS, key=jax.random.key(1), progress=lambda _, loss: losses.append(loss), **settings)
    assert bits(which.params) == before
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    start = lora.fresh(which.params, jax.random.key(1), matrices=("q", "v"))
    assert all(a != b for a, b in zip(bits(found), bits(start), strict=True))
    again = lora.trained(which, TOKENS, key=jax.random.key(1), **settings)
    assert bits(again) == bits(found)  # the same key, the same bytes


def test_only_masked_tokens_are_learnt_and_written():
    which = language()
    masked = np.zeros(TOKENS.shape, bool)
    masked[:, [2, 7]] = True
    ids, weights = lora.masked_rows(which, TOKENS, masked)
    np.testing.assert_array_equal(ids[:, -12:], TOKENS)
    np.testing.assert_array_equal(weights[:, -12:], masked)
    assert weights[:, :-12].sum() == 0
    before = len(which.encode("###\nInput: < ", bos=True))
    shown = ids[:, before : before + 12]
    assert (shown[:, [2, 7]] == 0).all() and (shown[~masked] == TOKENS[~masked]).all()
    found = lora.filled(which, TOKENS[:2], masked[:2])
    np.testing.assert_array_equal(found[~masked[:2]], TOKENS[:2][~masked[:2]])
    hidden = np.where(masked, (TOKENS + 1) % 300, TOKENS)  # what is masked is not read
    np.testing.assert_array_equal(lora.filled(which, hidden[:2], masked[:2]), found)
