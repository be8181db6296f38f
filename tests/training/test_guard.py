import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdiff.config import Optimizer
from mmdiff.training.guard import Diverged, apply_guarded, check_diverged
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.state import create, update_ema


@pytest.fixture
def setup():
    tx, _ = make_optimizer(Optimizer(name="muon", weight_decay=0.1, warmup=0), 10)
    params = {"blocks": {"a": {"kernel": jax.random.normal(jax.random.key(1), (2, 4, 4))}}, "b": jnp.ones(3)}
    step = jax.jit(lambda state, grads, loss: apply_guarded(state, grads, loss, tx, 0.9))
    return create(params, tx, seed=7), jax.tree.map(jnp.ones_like, params), step


def image(tree):
    """Every leaf as bytes."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def learnt(state):
    return {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}


@pytest.mark.parametrize("kind", ["nan gradient", "infinite gradient", "overflowing gradient", "nan loss"])
def test_a_bad_step_changes_no_byte(setup, kind):
    state, good, step = setup
    state, _ = step(state, good, jnp.float32(1.0))
    value = {"nan gradient": jnp.nan, "infinite gradient": jnp.inf, "overflowing gradient": 1e30}.get(kind, 1.0)
    bad = {**good, "b": good["b"].at[1].set(value)}
    after, info = step(state, bad, jnp.float32(jnp.nan if kind == "nan loss" else 1.0))
    assert image(learnt(after)) == image(learnt(state))
    assert (int(after.step), int(after.skips), int(after.skipped)) == (2, 1, 1)
    assert int(info["skips"]) == 1
    better, info = step(after, good, jnp.float32(1.0))
    assert all(a != b for a, b in zip(image(better.params), image(state.params), strict=True))  # the check can fail
    assert (int(better.step), int(better.skips), int(better.skipped)) == (3, 0, 1)
    assert np.isfinite(float(info["grad_norm"]))
    assert jnp.all(jax.random.key_data(better.key) == jax.random.key_data(state.key))


def test_a_skipped_step_is_as_if_it_had_not_been(setup):
    state, good, step = setup
    bad = jax.tree.map(lambda g: g * jnp.nan, good)
    direct, _ = step(state, good, jnp.float32(1.0))
    detour, _ = step(step(state, bad, jnp.float32(1.0))[0], good, jnp.float32(1.0))
    assert image(direct.params) == image(detour.params)
    assert image(direct.opt_state) == image(detour.opt_state)


def test_any_number_of_bad_steps_is_survived_where_apply_if_finite_poisons(setup):
    state, good, step = setup
    bad = jax.tree.map(lambda g: g * jnp.nan, good)
    start = image(state.params)
    for _ in range(6):
        state, _ = step(state, bad, jnp.float32(1.0))
    assert image(state.params) == start
    assert int(state.skips) == 6
    tx = optax.apply_if_finite(optax.adamw(0.1), max_consecutive_errors=3)
    params, opt_state = {"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)})
    for _ in range(6):
        updates, opt_state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert not jnp.all(jnp.isfinite(params["w"]))


def test_diverged_after_max_skips():
    check_diverged(9, 10, 500)
    with pytest.raises(Diverged, match="step 500.*10 steps in a row"):
        check_diverged(10, 10, 500)


def test_ema_warms_up_from_the_parameters(setup):
    state, _, _ = setup
    assert image(state.ema) == image(state.params)
    one = {"w": jnp.ones(2)}
    for step, decay, want in ((0, 0.999, 0.1), (8, 0.999, 0.5), (10**6, 0.999, 0.999), (10**6, 0.0, 0.0)):
        got = update_ema(one, {"w": jnp.zeros(2)}, decay, jnp.int32(step))
        np.testing.assert_allclose(got["w"], want, rtol=1e-5)
        assert got["w"].dtype == jnp.float32


def test_a_jitted_step_may_donate_the_whole_state(setup):
    state, good, _ = setup
    tx, _ = make_optimizer(Optimizer(name="muon", weight_decay=0.1, warmup=0), 10)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(dataclasses.replace(state, key=state.step))]
    assert len(set(pointers)) == len(pointers) - 1  # `key` was replaced by `step`, the one alias
    step = jax.jit(lambda s, g: apply_guarded(s, g, jnp.float32(1.0), tx, 0.9)[0], donate_argnums=0)
    assert int(step(state, good).step) == 1
