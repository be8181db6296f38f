"""Codebooks that learn: the moving average against NumPy, restarts, usage; on one device as on eight."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.tokenizers import codebook
from mmdiff.tokenizers.quantizers.base import Learning
from mmdiff.tokenizers.quantizers.simvq import SimVQ
from mmdiff.tokenizers.quantizers.vq import SMOOTHING, VQ

from .quantizing import made, quantise, same_bits

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
