"""The loss by hand, what it must not depend on, and the training step: exact, repeatable, guarded, able to learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdiff import config
from mmdiff.diffusion import prediction
from mmdiff.layout import ImagePlan
from mmdiff.training import state as train_state
from mmdiff.training.loss import block_times, combine, corrupt, loss_sums, normalise
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.step import make_train_step

SPACES = ("x", "eps", "v")


class Scripted:
    """Stands in for a network: its outputs are given."""

    def __init__(self, logits, output):
        self.logits, self.vocabulary_size = jnp.asarray(logits), logits.shape[-1]
        self.predict = lambda hidden, cell: jnp.asarray(output)

    def bind(self, params):
        return self

    def hidden(self, *inputs):
        return None

    def text_nats(self, hidden, targets):
        return -jnp.take_along_axis(jax.nn.log_softmax(self.logits), targets[..., None], axis=-1)[..., 0]


def losses_of(rows, logits, output, u, eps, diffusion):
    sums = loss_sums(Scripted(logits, output), diffusion, {}, rows, jnp.asarray(u), jnp.asarray(eps))
    return {name: float(value) for name, value in combine(sums, diffusion)[1].items()}


@pytest.fixture(scope="module")
def rows(tiny_gau):
    """Two rows: two documents and one document; three images in all, of 6, 4 and 1 patches."""
    first = tiny_gau.lay(tiny_gau.pieces("12", (2, 3), "4"))
    second = tiny_gau.lay(tiny_gau.pieces("7", (1, 1), seed=3), [ImagePlan(False, 1)])
    third = tiny_gau.lay(tiny_gau.pieces("56", (2, 2), seed=5), [ImagePlan(False, 1)])
    return tiny_gau.batch([first, second], [third], length=48)


def draws(rows, seed=0):
    rng = np.random.default_rng(seed)
    u = np.take_along_axis(rng.uniform(0.02, 0.98, rows.tokens.shape), rows.block_start, axis=-1)
    return np.where(rows.noised, u, 0).astype(np.float32), rng.standard_normal(rows.patches.shape).astype(np.float32)


def test_loss_by_hand(rows, tiny_gau):
    """Every sum written as loops over positions and images, from the definition."""
    rng = np.random.default_rng(1)
    u, eps = draws(rows)
    logits = rng.standard_normal((*rows.tokens.shape, tiny_gau.vocabulary.size)).astype(np.float32)
    output = rng.standard_normal(rows.patches.shape).astype(np.float32)
    nats, images = [], []
    for b in range(2):
        for t in range(1, 48):
            if rows.text_weight[b, t]:
                before = logits[b, t - 1].astype(np.float64)
                nats.append(np.log(np.exp(before).sum()) - before[rows.tokens[b, t]])
        for number in range(1, rows.image[b].max() + 1):
            mine = np.flatnonzero((rows.image[b] == number) & rows.noised[b])
            x = rows.patches[b, mine] / 127.5 - 1
            clipped = max(u[b, mine[0]], 0.05)
            images.append(np.mean(((output[b, mine] - x) / clipped) ** 2))  # x-prediction, v-loss
    assert len(images) == 3 and len(nats) == 2 + 3 + 1 + 1 + 1 + 3 + 2 + 3
    found = losses_of(rows, logits, output, u, eps, config.Diffusion(image_scale=0.7))
    np.testing.assert_allclose(found["text_loss"], np.mean(nats), rtol=1e-5)
    np.testing.assert_allclose(found["image_loss"], np.mean(images), rtol=1e-5)
    np.testing.assert_allclose(found["loss"], np.mean(nats) + 0.7 * np.mean(images), rtol=1e-5)


@pytest.mark.parametrize("source", SPACES)
@pytest.mark.parametrize("target", SPACES)
def test_a_perfect_model_has_no_image_loss(rows, tiny_gau, source, target):
    """Whatever it predicts and wherever the loss is taken: the target is the clean image, never the noised one."""
    u, eps = draws(rows)
    diffusion = config.Diffusion(prediction=source, loss=target)
    x = normalise(rows.patches)
    logits = np.zeros((*rows.tokens.shape, tiny_gau.vocabulary.size), np.float32)
    perfect = prediction.truth(x, jnp.asarray(eps), source)
    assert losses_of(rows, logits, perfect, u, eps, diffusion)["image_loss"] == 0
    z = corrupt(x, eps, jnp.asarray(u), diffusion)[0]
    assert losses_of(rows, logits, z, u, eps, diffusion)["image_loss"] > 0.01


def test_image_loss_is_a_mean_over_images_whatever_their_size_and_copies(tiny_gau):
    """Errors of 1, 2 and 3 on images of 6, 1 and 4 patches: the mean of the squares, with one copy or two."""
    pieces = tiny_gau.pieces("1", (2, 3), (1, 1), "2", (2, 2))
    for copies in (1, 2):
        layout = config.Layout(noised_copies=copies, max_grid=4)
        rows = tiny_gau.batch([tiny_gau.lay(pieces, layout=layout)], length=64)
        u, eps = draws(rows)
        logits = np.zeros((*rows.tokens.shape, tiny_gau.vocabulary.size), np.float32)
        output = normalise(rows.patches) + rows.image[..., None]
        found = losses_of(rows, logits, output, u, eps, config.Diffusion(loss="x"))
        np.testing.assert_allclose(found["image_loss"], (1 + 4 + 9) / 3, rtol=1e-5)
        summed = losses_of(rows, logits, output, u, eps, config.Diffusion(loss="x", reduction="sum"))
        np.testing.assert_allclose(summed["image_loss"], 12 * (6 * 1 + 1 * 4 + 4 * 9) / 3, rtol=1e-5)


@pytest.mark.parametrize("values", [12, 48, 768])
def test_loss_does_not_grow_with_the_values_of_a_patch(rows, tiny_gau, values):
    wide = dataclasses.replace(rows, patches=np.zeros((*rows.tokens.shape, values), np.uint8))
    u, _ = draws(rows)
    eps = np.zeros(wide.patches.shape, np.float32)
    logits = np.zeros((*rows.tokens.shape, tiny_gau.vocabulary.size), np.float32)
    found = losses_of(wide, logits, normalise(wide.patches) + 0.5, u, eps, config.Diffusion(loss="x"))
    np.testing.assert_allclose(found["image_loss"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(found["text_loss"], np.log(tiny_gau.vocabulary.size), rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(network, params, rows, u, eps):
    def loss(params):
        total, metrics = combine(loss_sums(network, config.Diffusion(), params, rows, u, eps), config.Diffusion())
        return total, metrics

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("missing", ["text", "image", "both"])
def test_rows_without_one_modality_count_zero_and_stay_finite(tiny, missing):
    empty = lambda pieces: dataclasses.replace(tiny.lay(pieces), text_weight=np.zeros(len(tiny.lay(pieces).tokens), np.float32))
    rows = {
        "text": lambda: tiny.batch([empty(tiny.pieces((2, 2)))]),
        "image": lambda: tiny.batch([tiny.lay(tiny.pieces("123"))]),
        "both": lambda: tiny.batch([empty(tiny.pieces("123"))]),
    }[missing]()
    u, eps = draws(rows)
    (loss, metrics), gradient = loss_and_gradient(tiny.network, tiny.params, rows, u, eps)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, gradient)))
    assert (metrics["text_loss"] == 0) == (missing in ("text", "both"))
    assert (metrics["image_loss"] == 0) == (missing in ("image", "both"))
    head = {"text": "text_out", "image": "image"}
    for name, where in head.items():
        assert np.any(jax.tree.leaves(gradient[where])[-1]) == (missing not in (name, "both"))


# Times.


def blocks(rows):
    """bool [b, t]: the first position of each noised block."""
    return rows.noised & (rows.block_start == np.arange(rows.tokens.shape[1]))


@pytest.fixture(scope="module")
def many(tiny_gau):
    """40 images, 38 of them in clean and in noised form."""
    document = tiny_gau.lay(tiny_gau.pieces("1", (1, 2), (2, 2)))
    ending = tiny_gau.lay(tiny_gau.pieces((2, 2)), [ImagePlan(False, 1)])
    return tiny_gau.batch(*[[document, document]] * 9, [document, ending, ending], length=64)


def test_one_time_per_block_and_none_for_clean_patches(many):
    u = np.asarray(block_times(many, jax.random.key(0), config.Diffusion()))
    assert np.all(u[~many.noised] == 0) and np.all(u[many.noised] > 0)
    starts = np.take_along_axis(u, many.block_start, axis=1)
    np.testing.assert_array_equal(u[many.noised], starts[many.noised])
    assert len(np.unique(u[blocks(many)])) == blocks(many).sum()


def test_times_of_a_batch_are_spread_evenly(many):
    """In every batch the ranks of the times fill the unit interval; independent draws miss the bound nearly always."""
    diffusion = config.Diffusion(time_sampling="uniform")
    count = blocks(many).sum()
    for seed in range(10):
        u = np.sort(np.asarray(block_times(many, jax.random.key(seed), diffusion))[blocks(many)])
        assert np.abs(u - (np.arange(count) + 0.5) / count).max() < 2.5 / count
    means = [float(block_times(many, jax.random.key(s), diffusion)[blocks(many)].mean()) for s in range(10)]
    assert np.abs(np.asarray(means) - 0.5).max() < 0.03  # standard deviation of independent draws: 0.046
    assert len(set(means)) == 10
    control = np.sort(np.random.default_rng(0).uniform(size=(10, count)), axis=-1)
    assert (np.abs(control - (np.arange(count) + 0.5) / count).max(-1) > 2.5 / count).sum() >= 8


def test_images_that_are_read_in_place_keep_to_their_cap(tiny_gau):
    layout = config.Layout(context="noised", max_context_u=0.3, max_grid=4)
    document = tiny_gau.lay(tiny_gau.pieces((1, 2), "1", (1, 2)), [ImagePlan(False, 1)] * 2, layout=layout)
    rows = tiny_gau.batch(*[[document]] * 30, length=20)
    u = np.asarray(block_times(rows, jax.random.key(0), config.Diffusion(time_mean=-2.0)))
    read, last = (u[(rows.image == k) & rows.noised] for k in (1, 2))
    assert read.max() == np.float32(0.3) and last.max() > 0.7


# The step.


def setup(tiny, **training):
    cfg = dataclasses.replace(
        tiny.cfg,
        optimizer=config.Optimizer(learning_rate=3e-3, warmup=5, decay="constant"),
        training=config.Training(**{"batch_size": 4} | training),
    )
    tx, _ = make_optimizer(cfg.optimizer, 100)
    return train_state.create(tiny.params, tx, 0), jax.jit(make_train_step(tiny.network, cfg, tx)), tx, cfg


@pytest.fixture(scope="module")
def batch(tiny_gau):
    documents = [tiny_gau.lay(tiny_gau.pieces("12", (2, 2), "3", seed=s)) for s in range(4)]
    return tiny_gau.batch(*[[d] for d in documents], length=32)


@pytest.fixture(scope="module")
def stepped(tiny_gau, batch):
    """(first state, compiled step, [(state, metrics)] after 3 steps)."""
    state, step, _, _ = setup(tiny_gau)
    first, made = state, []
    for _ in range(3):
        state, metrics = step(state, batch)
        made.append((state, metrics))
    return first, step, made


def hexes(metrics):
    return [float(metrics[name]).hex() for name in ("loss", "text_loss", "image_loss", "grad_norm")]


def test_the_same_seed_gives_the_same_bytes(stepped, batch, tiny_gau):
    """With a program compiled anew: nothing depends on the run."""
    state, again, _, _ = setup(tiny_gau)
    for _, metrics in stepped[2]:
        state, found = again(state, batch)
        assert hexes(found) == hexes(metrics)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(stepped[2][-1][0].params), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    other = dataclasses.replace(stepped[0], key=jax.random.key(1))
    assert hexes(again(other, batch)[1]) != hexes(stepped[2][0][1])


def test_each_step_draws_its_own_noise(stepped, batch):
    first, step, _ = stepped
    later = dataclasses.replace(first, step=first.step + 1)
    assert float(step(first, batch)[1]["image_loss"]) != float(step(later, batch)[1]["image_loss"])
    np.testing.assert_allclose(step(first, batch)[1]["text_loss"], step(later, batch)[1]["text_loss"], rtol=1e-6)


def test_accumulating_is_the_same_step(tiny_gau, batch):
    """Gradients too: after one step of plain SGD the parameters differ by rounding only."""
    whole, parts = (
        make_train_step(
            tiny_gau.network,
            dataclasses.replace(tiny_gau.cfg, training=config.Training(batch_size=4, accumulate=n)),
            optax.sgd(1.0),
        )
        for n in (1, 4)
    )
    state = train_state.create(tiny_gau.params, optax.sgd(1.0), 0)
    uneven = dataclasses.replace(batch, text_weight=batch.text_weight * np.arange(4, dtype=np.float32)[:, None])
    (one, a), (other, b) = jax.jit(whole)(state, uneven), jax.jit(parts)(state, uneven)
    for name in ("loss", "text_loss", "image_loss", "grad_norm"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(stepped, batch):
    good, step, _ = stepped
    params = jax.tree.map(lambda p: p, good.params)
    params["image"]["patch_out"]["kernel"] = params["image"]["patch_out"]["kernel"] * 1e38
    bad = dataclasses.replace(good, params=params)
    after, metrics = step(bad, batch)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.skips), int(after.skipped), int(after.step)) == (1, 1, 1)
    kept = lambda state: jax.tree.leaves((state.params, state.ema, state.opt_state))
    for ours, theirs in zip(kept(after), kept(bad), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again, _ = step(after, batch)
    assert (int(again.skips), int(again.skipped)) == (2, 2)
    recovered, metrics = step(dataclasses.replace(again, params=good.params), batch)
    assert np.isfinite(metrics["loss"]) and (int(recovered.skips), int(recovered.skipped)) == (0, 2)
    assert any(not np.array_equal(a, b) for a, b in zip(kept(recovered), kept(good), strict=True))


@pytest.mark.parametrize("kind", ["gau", "attention"])
def test_it_learns_one_batch_by_heart(kind, request, stepped, tiny_gau):
    """From fresh parameters: a text, a picture, a text."""
    tiny = request.getfixturevalue(f"tiny_{kind}")
    fresh = dataclasses.replace(tiny, params=tiny.network.init(jax.random.key(0)))
    document = tiny.lay(tiny.pieces("12", (2, 2), "3"))
    batch = tiny.batch(*[[document]] * 4, length=32)
    state, step, _, _ = setup(fresh)
    step = stepped[1] if kind == "gau" else step
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append((float(metrics["text_loss"]), float(metrics["image_loss"])))
    before, after = np.mean(losses[:3], axis=0), np.mean(losses[-5:], axis=0)
    assert after[0] < 0.05 * before[0] and after[1] < 0.1 * before[1], (before, after)
    assert int(state.step) == 60 and int(state.skipped) == 0
