import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdiff.config import Optimizer
from mmdiff.training import optimizer


@pytest.fixture
def params():
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    return {
        "blocks": {
            "in": {"kernel": normal(3, 8, 12), "bias": normal(3, 12)},
            "out": {"kernel": normal(3, 12, 8)},
            "norm": {"scale": normal(3, 8)},
            "heads": {"scale": normal(3, 2, 4)},
        },
        "text_embedding": {"embedding": normal(20, 8)},
        "patch_in": {"kernel": normal(6, 8), "bias": normal(8)},
        "norm": {"scale": normal(8)},
    }


def grads_like(params, seed, scale=1.0):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([scale * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])


def flat(tree):
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(tree)}


def constant(**kwargs):
    return Optimizer(decay="constant", warmup=0, **{"clip": 0.0, "learning_rate": 0.1, **kwargs})


def first_update(settings, params, grads):
    tx, _ = optimizer.make_optimizer(settings, 100)
    return flat(jax.jit(tx.update)(grads, tx.init(params), params)[0])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.1 + 0.9 * 0.5, 12: 0.1, 99: 0.1}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.1 + 0.9 * 0.75, 12: 0.1, 99: 0.1}),
        ("constant", {0: 0.25, 3: 1.0, 8: 1.0, 99: 1.0}),
    ],
)
def test_schedule_by_hand(decay, expected):
    schedule = optimizer.make_schedule(Optimizer(learning_rate=2.0, warmup=4, decay=decay, final=0.1), 12)
    for t, value in expected.items():
        np.testing.assert_allclose(schedule(t), 2.0 * value, rtol=1e-6)


def test_schedule_without_warmup_or_shorter_than_it():
    assert float(optimizer.make_schedule(Optimizer(learning_rate=1.0, warmup=0), 10)(0)) == 1.0
    short = optimizer.make_schedule(Optimizer(learning_rate=1.0, warmup=100), 10)
    np.testing.assert_allclose([short(t) for t in range(10)], np.arange(1, 11) / 100, rtol=1e-6)


def test_only_kernels_decay(params):
    mask = flat(optimizer.decay_mask(params))
    assert {k for k, v in mask.items() if v} == {"blocks/in/kernel", "blocks/out/kernel", "patch_in/kernel"}


def test_decay_is_applied_by_the_mask(params):
    zero = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "muon"):
        updates = first_update(constant(name=name, weight_decay=0.5), params, zero)
        mask = flat(optimizer.decay_mask(params))
        for path, p in flat(params).items():
            np.testing.assert_allclose(updates[path], -0.1 * 0.5 * p if mask[path] else 0 * p, rtol=1e-6)


def test_adamw_is_the_textbook_for_three_steps(params):
    b1, b2, eps, wd, lr = 0.9, 0.95, 1e-8, 0.1, 0.1
    tx, _ = optimizer.make_optimizer(constant(b1=b1, b2=b2, eps=eps, weight_decay=wd), 100)
    state, got, mask = tx.init(params), params, flat(optimizer.decay_mask(params))
    want = {k: np.asarray(v, np.float64) for k, v in flat(params).items()}
    m = {k: 0 * v for k, v in want.items()}
    v = {k: 0 * v for k, v in want.items()}
    update = jax.jit(tx.update)
    for t in range(1, 4):
        grads = grads_like(params, t)
        updates, state = update(grads, state, got)
        got = optax.apply_updates(got, updates)
        for k, g in flat(grads).items():
            g = np.asarray(g, np.float64)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            u = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            want[k] = want[k] - lr * (u + (wd * want[k] if mask[k] else 0))
    for k, p in flat(got).items():
        np.testing.assert_allclose(p, want[k], rtol=2e-5, atol=2e-6)


def test_lamb_takes_its_trust_ratio_layer_by_layer(params):
    scale = jnp.array([1.0, 10.0, 0.0])[:, None, None]  # layers of different norm; a zero layer has ratio 1
    params["blocks"]["in"]["kernel"] = params["blocks"]["in"]["kernel"] * scale
    grads = grads_like(params, 1)
    adam = first_update(constant(name="adamw"), params, grads)
    lamb = first_update(constant(name="lamb"), params, grads)
    for path, p in flat(params).items():
        u, p = np.asarray(adam[path], np.float64), np.asarray(p, np.float64)
        if "norm" in path or "bias" in path:
            want = u
        elif path.startswith("blocks"):
            ratios = [np.linalg.norm(p[i]) / (np.linalg.norm(u[i]) / 0.1) or 1.0 for i in range(3)]
            want = u * np.reshape(ratios, (3,) + (1,) * (u.ndim - 1))
        else:
            want = u * np.linalg.norm(p) / (np.linalg.norm(u) / 0.1)
        np.testing.assert_allclose(lamb[path], want, rtol=1e-5, err_msg=path)
    # Negative control: one ratio for the whole stack, what optax.lamb does, is something else.
    merged = flat(optax.scale_by_trust_ratio().update(_nested(adam, params), optax.EmptyState(), params)[0])
    assert not np.allclose(merged["blocks/in/kernel"] * 0.1, lamb["blocks/in/kernel"], rtol=0.1)


def _nested(leaves, like):
    return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam(params):
    labels = flat(optimizer.muon_labels(params))
    assert {k for k, v in labels.items() if v == "muon"} == {"blocks/in/kernel", "blocks/out/kernel"}
    grads = grads_like(params, 1)
    grads["blocks"]["in"]["kernel"] *= jnp.array([1.0, 100.0, 1e-3])[:, None, None]
    muon = first_update(constant(name="muon"), params, grads)
    adam = first_update(constant(name="adamw"), params, grads)
    for path, label in labels.items():
        if label == "adam":
            np.testing.assert_array_equal(muon[path], adam[path])
            continue
        for layer in muon[path]:
            values = np.linalg.svd(-np.asarray(layer) / 0.1, compute_uv=False) / (0.2 * max(layer.shape) ** 0.5)
            assert np.all((values > 0.6) & (values < 1.3))  # Newton-Schulz stops at 1 +- 0.3
            rms = np.sqrt(np.mean(np.square(layer)))
            assert 0.6 * 0.1 * 0.2 < rms < 1.3 * 0.1 * 0.2
    raw = np.linalg.svd(np.asarray(grads["blocks"]["in"]["kernel"][0]), compute_uv=False)
    assert raw[0] / raw[-1] > 3  # the gradient itself is far from orthogonal: the check can fail


def test_matrices_side_by_side_are_orthogonalised_one_by_one():
    params = {"blocks": {"qkv": {"kernel": jax.random.normal(jax.random.key(3), (2, 8, 3, 6))}}}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(4), p.shape), params)
    together = first_update(constant(name="muon"), params, grads)["blocks/qkv/kernel"]
    for i in range(3):
        part = lambda tree, i=i: jax.tree.map(lambda p: p[:, :, i], tree)
        alone = first_update(constant(name="muon"), part(params), part(grads))["blocks/qkv/kernel"]
        np.testing.assert_allclose(together[:, :, i], alone, rtol=1e-4, atol=1e-6)
    # control: taken as one matrix [8, 18] it is another update
    flat_one = first_update(
        constant(name="muon"), *(jax.tree.map(lambda p: p.reshape(2, 8, 18), tree) for tree in (params, grads))
    )["blocks/qkv/kernel"]
    assert not np.allclose(flat_one.reshape(2, 8, 3, 6), together, rtol=0.1)


def test_muon_layers_do_not_touch_each_other(params):
    grads = grads_like(params, 1)
    before = first_update(constant(name="muon"), params, grads)["blocks/in/kernel"]
    grads["blocks"]["in"]["kernel"] = grads["blocks"]["in"]["kernel"].at[1].mul(-3.0)
    after = first_update(constant(name="muon"), params, grads)["blocks/in/kernel"]
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5)
    np.testing.assert_allclose(after[1], -before[1], rtol=1e-3, atol=1e-4)


def test_clipping_bounds_the_global_norm(params):
    big = grads_like(params, 1, scale=100.0)
    norm = optax.tree.norm(big)
    scaled = jax.tree.map(lambda g: g / norm * 0.5, big)
    # A large eps makes Adam's first step nearly linear in the gradient, so that clipping is visible.
    got = first_update(constant(clip=0.5, eps=1e3), params, big)
    want = first_update(constant(clip=0.0, eps=1e3), params, scaled)
    unclipped = first_update(constant(clip=0.0, eps=1e3), params, big)
    for path in got:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-9)
        assert not np.allclose(got[path], unclipped[path], rtol=0.1, atol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_every_rule_lowers_a_loss(name):
    target = jax.random.normal(jax.random.key(1), (2, 6, 6))
    params = {"blocks": {"a": {"kernel": jax.random.normal(jax.random.key(2), (2, 6, 6)), "bias": jnp.ones((2, 6))}}}
    tx, schedule = optimizer.make_optimizer(Optimizer(name=name, learning_rate=0.05, warmup=5), 60)

    def loss_fn(p):
        return jnp.mean((p["blocks"]["a"]["kernel"] + p["blocks"]["a"]["bias"][:, None] - target) ** 2)

    @jax.jit
    def step(p, s):
        updates, s = tx.update(jax.grad(loss_fn)(p), s, p)
        return optax.apply_updates(p, updates), s

    state, start = tx.init(params), float(loss_fn(params))
    for _ in range(60):
        params, state = step(params, state)
    assert float(loss_fn(params)) < 0.5 * start
    assert float(schedule(0)) == pytest.approx(0.01)
