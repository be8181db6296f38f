"""The seed's configuration against what is published of it, and one training step against its formulas in plain JAX."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import config_files
from mmdiff.diffusion.schedule import DDPM, DDPM_LEVELS, time_of
from mmdiff.layout import ImagePiece, ImagePlan, lay_out, stack
from mmdiff.models.network import Network
from mmdiff.training import state as train_state
from mmdiff.training.flops import training_flops
from mmdiff.training.guard import apply_guarded
from mmdiff.training.loss import combine, loss_sums
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.state import update_ema

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NAMES = ["celeba_hq_64.py:seed", "celeba_hq_64.py:seed_patch8", "celeba_hq_128.py:seed"]


def load(name: str):
    return config_files.load_experiment(f"{EXPERIMENTS / name}")


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "total"), zip(NAMES, [88.26e6, 88.48e6, 88.48e6], strict=True))
def test_parameters_are_as_published(name, total):
    cfg = load(name)
    params = jax.eval_shape(Network.of(cfg, 269).init, jax.random.key(0))
    assert count(params["blocks"]) == 24 * 3_642_496
    assert count(params) == pytest.approx(total, abs=0.005e6)
    assert set(params) == {"blocks", "image"}  # no text: the network sees its patches and nothing else


def test_operations_and_levels_are_as_published():
    cfg = load(NAMES[2])
    one = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, batch_size=1))
    assert training_flops(one, 269) / 3 == pytest.approx(49.9e9, rel=0.005)  # one image of 256 patches, forward
    levels = {1: 0.00447, 10: 0.0332, 50: 0.161, 100: 0.326, 250: 0.935, 500: 3.37, 750: 16.9, 1000: 154.3}
    for t, sigma in levels.items():
        assert DDPM_LEVELS[t - 1] == pytest.approx(sigma, rel=3e-3)
    uniform = DDPM().uniform((jnp.arange(1000) + 0.5) / 1000)  # every entry of the table is equally likely
    np.testing.assert_allclose(uniform, time_of(DDPM_LEVELS), rtol=1e-5)


@pytest.mark.parametrize("name", ["celeba_hq_64.py", "celeba_hq_64.py:seed", "celeba_hq_128.py", "celeba_hq_128.py:seed"])
def test_rows_are_256_patches_of_one_image(name):
    cfg = load(name)
    grid = tuple(side // cfg.model.patch for side in cfg.data.image_size)
    row, _ = lay_out([ImagePiece(None, *grid)], [ImagePlan(False, 1)], None, cfg.layout, patch_values=3 * cfg.model.patch**2)
    assert len(row.tokens) == 256 == cfg.layout.row_length and row.noised.all()


# The formulas, in the shape the published code stores its weights in.

LAYERS, WIDTH, INNER, SHARED, PATCH, GRID = 2, 24, 48, 8, 2, (2, 4)
POINTS = ((0, 0.0), (2, 1.0), (10, 0.5))
T, LENGTH, VALUES = 1000, 8, 12


def published_forward(w, z, t):
    """eps_hat [n, VALUES] of one image: w as in `as_published`, z [n, VALUES], t in 1..1000."""
    x = z @ w["in"] + w["times"][t - 1]
    where = np.stack(np.divmod(np.arange(LENGTH), GRID[1]), -1)
    frequencies = 1000.0 ** (-np.arange(SHARED // 4) * 2 / (SHARED / 2))
    angles = jnp.asarray(np.concatenate([where[:, :1] * frequencies, where[:, 1:] * frequencies], -1), jnp.float32)

    def turn(a):  # pairs (a_2i, a_2i+1), the first half of them by the row
        even, odd = a[:, 0::2], a[:, 1::2]
        both = jnp.stack([even * jnp.cos(angles) - odd * jnp.sin(angles), even * jnp.sin(angles) + odd * jnp.cos(angles)], -1)
        return both.reshape(a.shape)

    norm = lambda a, scale: a / jnp.sqrt(jnp.mean(a**2, -1, keepdims=True) + 1e-6) * scale
    swish = lambda a: a * jax.nn.sigmoid(a)
    for layer in w["layers"]:
        h = swish(norm(x, layer["Norm"]) @ layer["dense"] + layer["dense_bias"])
        u, v, qk = h[:, :INNER], h[:, INNER : 2 * INNER], h[:, 2 * INNER :]
        q, k = (turn(qk * layer[f"{a}_gamma"] + layer[f"{a}_beta"]) for a in "qk")
        weights = jax.nn.softmax(q @ k.T / math.sqrt(SHARED))
        x = x + (u * (weights @ v)) @ layer["out"] + layer["out_bias"]
    return norm(x, w["Norm"]) @ w["head"]


def published_loss(w, x, eps, t):
    """Mean over the batch of the sum over all values of (eps - eps_hat)^2."""
    alpha = np.cumprod(np.sqrt(1 - 0.02 * np.arange(1, T + 1) / T))
    total = 0.0
    for i in range(len(x)):
        a = alpha[t[i] - 1]
        z = jnp.asarray(a * x[i] + math.sqrt(1 - a**2) * eps[i], jnp.float32)
        total = total + jnp.sum((eps[i] - published_forward(w, z, int(t[i]))) ** 2)
    return total / len(x)


def published_step(w, grads, m, v, t, rate):
    """One update of Keras' Adam (its eps outside the bias correction) with layer adaptation; t counts from 1."""
    b1, b2, eps = 0.9, 0.999, 1e-7
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, grads)
    step = math.sqrt(1 - b2**t) / (1 - b1**t)

    def update(path, p, m, v):
        change = step * m / (jnp.sqrt(v) + eps)
        name = jax.tree_util.keystr(path)
        if "Norm" not in name and "bias" not in name:
            above, below = jnp.linalg.norm(p), jnp.linalg.norm(change)
            change = change * jnp.where((above > 0) & (below > 0), above / below, 1.0)
        return p - rate * change

    return jax.tree_util.tree_map_with_path(update, w, m, v), m, v


def as_published(params):
    """Our parameters in that shape; pairs of the rotation stand side by side there, half a head apart here."""
    order = np.arange(SHARED).reshape(2, -1).T.reshape(-1)
    blocks, stem = params["blocks"], params["image"]
    layers = []
    for i in range(LAYERS):
        b = jax.tree.map(lambda a, i=i: a[i], blocks)
        gates, shared = b["gates"], b["shared"]
        dense = [gates["kernel"][:, 0], gates["kernel"][:, 1], shared["kernel"][:, order]]
        bias = [gates["bias"][0], gates["bias"][1], shared["bias"][order]]
        layers.append(
            {
                "Norm": b["norm"]["scale"],
                "dense": jnp.concatenate(dense, -1),
                "dense_bias": jnp.concatenate(bias),
                "q_gamma": b["scale_qk"][0, order],
                "k_gamma": b["scale_qk"][1, order],
                "q_beta": b["shift_qk"][0, order],
                "k_beta": b["shift_qk"][1, order],
                "out": b["out"]["kernel"],
                "out_bias": b["out"]["bias"],
            }
        )
    return {
        "in": stem["patch_in"]["kernel"],
        "times": stem["time_in"]["time_table"],
        "layers": layers,
        "Norm": stem["norm"]["scale"],
        "head": stem["patch_out"]["kernel"],
    }


@pytest.fixture(scope="module")
def small():
    """The seed's experiment with a small network, random parameters and no head at zero."""
    cfg = load(NAMES[0])
    model = dataclasses.replace(cfg.model, width=WIDTH, depth=LAYERS, key_width=SHARED, patch=PATCH, compute="float32")
    data = dataclasses.replace(cfg.data, image_size=(GRID[0] * PATCH, GRID[1] * PATCH))
    layout = dataclasses.replace(cfg.layout, row_length=LENGTH)
    optimizer = dataclasses.replace(cfg.optimizer, points=POINTS)  # the published rates start too small for float32
    cfg = dataclasses.replace(cfg, model=model, data=data, layout=layout, optimizer=optimizer)
    network = Network.of(cfg, 269)
    params = network.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return cfg, network, tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


def test_loss_and_updates_equal_the_published_formulas(small):
    cfg, network, params = small
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, LENGTH, VALUES), dtype=np.uint8)
    lay = lambda p: lay_out(
        [ImagePiece(p, *GRID)], [ImagePlan(False, 1)], None, cfg.layout, patch_values=VALUES
    )[0]  # fmt: skip
    rows = stack([lay(p) for p in pixels])
    x = pixels / 127.5 - 1
    tx, schedule = make_optimizer(cfg.optimizer, cfg.training.steps)
    state = train_state.create(params, tx, 0)
    theirs = as_published(params)
    m, v = (jax.tree.map(jnp.zeros_like, theirs) for _ in range(2))
    average = jax.tree.map(jnp.zeros_like, theirs)

    @jax.jit
    def ours(state, u, eps):
        loss_of = lambda p: combine(loss_sums(network, cfg.diffusion, p, rows, u, eps), cfg.diffusion)[0]
        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return apply_guarded(state, grads, loss, tx, cfg.training.ema, cfg.training.ema_start)[0], loss

    for step in range(4):
        t = rng.integers(1, T + 1, 4)
        eps = rng.standard_normal(x.shape).astype(np.float32)
        u = np.broadcast_to(time_of(DDPM_LEVELS[t - 1])[:, None], x.shape[:2]).astype(np.float32)
        state, loss = ours(state, u, eps)
        their_loss, grads = jax.value_and_grad(published_loss)(theirs, x, eps, t)
        assert float(loss) == pytest.approx(float(their_loss), rel=2e-5)
        assert float(published_loss(theirs, x, eps, (t + 499) % T + 1)) != pytest.approx(float(loss), rel=1e-3)  # control
        rate = 1e-3 * np.interp(step, *zip(*POINTS, strict=True))
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5, abs=1e-12)
        theirs, m, v = published_step(theirs, grads, m, v, step + 1, rate)
        average = jax.tree.map(lambda a, p: 0.9999 * a + (1 - 0.9999) * p, average, theirs)
    corrected = jax.tree.map(lambda a: a / (1 - 0.9999**4), average)
    for got, want, before in (
        (state.params, theirs, as_published(params)),
        (state.ema, corrected, as_published(params)),
    ):
        moved = 0.0
        for a, b, c in zip(*map(jax.tree.leaves, (as_published(got), want, before)), strict=True):
            change = float(jnp.abs(b - c).max())
            np.testing.assert_allclose(a - c, b - c, atol=5e-3 * change + 3e-8)  # the updates, not only the parameters
            moved = max(moved, change)
        assert moved > 1e-5


def test_the_learning_rate_is_as_published():
    _, schedule = make_optimizer(load(NAMES[0]).optimizer, 500_000)
    rates = {0: 0, 1000: 2.5e-4, 4000: 1e-3, 12_000: 7.5e-4, 20_000: 5e-4, 30_000: 3e-4, 40_000: 1e-4, 90_000: 1e-4}
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5)


def test_the_trust_ratio_of_one_published_weight_is_one_number(small):
    """The gates and the shared head are one matrix in the published unit; the control separates them."""
    cfg, _, params = small
    optimizer = dataclasses.replace(cfg.optimizer, decay="constant", points=(), warmup=0)
    tx, _ = make_optimizer(optimizer, 10)
    plain, _ = make_optimizer(dataclasses.replace(optimizer, name="adamw"), 10)
    grads = jax.tree.map(jnp.ones_like, params)
    lamb, adam = (t.update(grads, t.init(params), params)[0]["blocks"] for t in (tx, plain))
    ratio = lambda name: np.asarray(lamb[name]["kernel"] / adam[name]["kernel"]).reshape(LAYERS, -1)
    for layer in range(LAYERS):
        assert np.ptp(np.concatenate([ratio(name)[layer] for name in ("gates", "shared")])) < 1e-4
    assert np.abs(ratio("gates")[:, 0] - ratio("out")[:, 0]).min() > 1e-2


def test_nothing_that_lamb_rescales_starts_at_zero_but_shifts(small):
    """A weight at zero would grow by a thousandth of itself per step: the published head is an ordinary matrix."""
    cfg, network, _ = small
    start = train_state.named_leaves(network.init(jax.random.key(0)))
    zero = {path.split("/")[-1] for path, leaf in start.items() if not np.any(leaf)}
    assert zero == {"bias", "shift_qk"}
    ours = Network.of(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, zero_head=True)), 269)
    assert not np.any(ours.init(jax.random.key(0))["image"]["patch_out"]["kernel"])


def test_an_average_that_starts_at_zero_is_corrected():
    values = np.random.default_rng(0).standard_normal(6)
    ema, raw = {"w": jnp.float32(99.0)}, 0.0
    for step, value in enumerate(values):
        ema = update_ema(ema, {"w": jnp.float32(value)}, 0.9, jnp.int32(step), "zero")
        raw = 0.9 * raw + 0.1 * value
        np.testing.assert_allclose(ema["w"], raw / (1 - 0.9 ** (step + 1)), rtol=1e-5)
    assert float(update_ema({"w": jnp.zeros(())}, {"w": jnp.ones(())}, 0.9, jnp.int32(0))["w"]) == pytest.approx(0.9)
