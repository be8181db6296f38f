"""Few-step training on the real network: what it starts from, what it changes, what it leaves alone, and what it draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff import config
from mmdiff.config import ConfigError
from mmdiff.data.vocabulary import text_start
from mmdiff.document import IMG, Document
from mmdiff.layout import ImagePlan, drop_text, plan_images, without_words
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model
from mmdiff.training import state as train_state
from mmdiff.training.loss import block_mean, block_steps, block_times, few_step_sums, loss_sums
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.run import merged
from mmdiff.training.step import make_train_step

OBJECTIVES = ("meanflow", "difference", "shortcut")


@pytest.fixture(scope="module", params=["gau", "attention"])
def stepped(request, new_tiny):
    return new_tiny(block=request.param, step_input=True)


def with_objective(tiny, objective, **training):
    cfg = dataclasses.replace(tiny.cfg, few_step=config.FewStep(objective=objective))
    return dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, **training)) if training else cfg


def batch_of(tiny):
    """Text and images, two documents in a row, clean and noised copies."""
    first = tiny.lay(tiny.pieces("12", (2, 3), "4"))
    second = tiny.lay(tiny.pieces("7", (1, 2), seed=3))
    return tiny.batch([first, second], [tiny.lay(tiny.pieces("56", (2, 2), "3", seed=5))], length=48)


def drawn(tiny, cfg, rows, seed=0):
    key = jax.random.key(seed)
    u = block_times(rows, key, cfg.diffusion)
    u, h = block_steps(rows, u, jax.random.fold_in(key, 1), cfg)
    return u, h, jax.random.normal(jax.random.fold_in(key, 2), rows.patches.shape)


def test_a_step_of_no_length_changes_nothing(stepped):
    """And one of some length does."""
    tiny, rows = stepped, batch_of(stepped)
    z, u = tiny.noise(rows)
    model = tiny.network.bind(tiny.params)
    run = lambda **step: model.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask, **step)
    np.testing.assert_array_equal(run(), run(step=jnp.zeros_like(u)))
    assert np.abs(run(step=u / 2) - run())[rows.noised].max() > 1e-2


def test_text_does_not_read_the_steps(stepped):
    """Text nats, and their gradient, are the ordinary loss's own: text is constant along the path of an image."""
    tiny, rows = stepped, batch_of(stepped)
    u, h, eps = drawn(tiny, with_objective(tiny, "meanflow"), rows)
    assert float(h.max()) > 0.05
    ordinary = lambda p: loss_sums(tiny.network, tiny.cfg.diffusion, p, rows, u, eps).text
    one, grads = jax.value_and_grad(ordinary)(tiny.params)
    for objective in OBJECTIVES if tiny.cfg.model.block == "gau" else OBJECTIVES[:1]:
        sums = functools.partial(few_step_sums, tiny.network, with_objective(tiny, objective))
        other, others = jax.value_and_grad(lambda p, sums=sums: sums(p, rows, u, h, eps).text)(tiny.params)
        np.testing.assert_allclose(one, other, rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), grads, others)


def test_the_context_does_not_move_with_the_noised_patches(stepped):
    """The derivative in z, u and h of the noised patches is exactly zero wherever a text or a clean image stands."""
    tiny, rows = stepped, batch_of(stepped)
    z, u = (jnp.asarray(a) for a in tiny.noise(rows))
    model, moves = tiny.network.bind(tiny.params), jnp.asarray(rows.noised, jnp.float32)
    run = lambda z, u, h: model.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask, step=h)
    _, slope = jax.jvp(run, (z, u, u / 2), (moves[..., None] * z, moves, moves))
    assert np.all(np.asarray(slope)[~rows.noised] == 0) and np.abs(np.asarray(slope)[rows.noised]).min(axis=-1).max() > 0
    _, wrong = jax.jvp(run, (z, u, u / 2), (z, moves, moves))  # control: clean patches moved too
    assert np.abs(np.asarray(wrong)[~rows.noised]).max() > 1e-3


def test_both_derivatives_agree_on_the_network(stepped):
    tiny, rows = stepped, batch_of(stepped)
    sums = []
    for objective in ("meanflow", "difference", "shortcut"):
        cfg = with_objective(tiny, objective)
        u, h, eps = drawn(tiny, cfg, rows)
        h = jnp.minimum(h, 0.2)
        sums.append(float(few_step_sums(tiny.network, cfg, tiny.params, rows, u, h, eps).image))
    assert sums[0] == pytest.approx(sums[1], rel=0.02) and sums[0] != sums[1]
    assert abs(sums[2] - sums[0]) > 1e-4 * sums[0]


def test_times_and_lengths(stepped):
    """Half of the blocks take a step; it ends at a time of the same distribution, not below 0; a block has one of each."""
    tiny = stepped
    row = tiny.batch([tiny.lay(tiny.pieces((2, 2)))], length=48)
    rows = jax.tree.map(lambda a: jnp.tile(a, (4000, *[1] * (a.ndim - 1))), row)
    cfg = with_objective(tiny, "meanflow")
    u, h, _ = (np.asarray(a) for a in drawn(tiny, cfg, rows))
    noised = np.asarray(rows.noised)
    assert np.all(u[~noised] == 0) and np.all(h[~noised] == 0) and np.all(u[noised] > 0) and np.all(h <= u)
    first = noised.argmax(axis=1)
    u, h = (np.where(noised, a, np.nan)[np.arange(len(a)), first] for a in (u, h))
    chosen = h > 0
    assert chosen.mean() == pytest.approx(0.5, abs=0.03)
    ends = (u - h)[chosen]
    alone = np.asarray(u)[~chosen]
    # the larger and the smaller of two independent draws together are distributed as each of them
    both = np.sort(np.concatenate([u[chosen], ends]))
    ranks = np.searchsorted(np.sort(alone), both) / len(alone)
    assert np.abs(ranks - np.linspace(0, 1, len(both))).max() < 0.05
    assert np.abs(np.searchsorted(np.sort(alone), np.sort(ends)) / len(alone) - np.linspace(0, 1, len(ends))).max() > 0.1
    everyone = dataclasses.replace(cfg, few_step=config.FewStep(objective="meanflow", share=1.0))
    assert np.mean(np.asarray(drawn(tiny, everyone, rows)[1])[noised] > 0) > 0.99


def test_block_mean(stepped):
    rows = batch_of(stepped)
    values = jnp.asarray(np.random.default_rng(0).standard_normal(rows.tokens.shape))
    mean = np.asarray(block_mean(rows, values))
    for b in range(2):
        for start in np.unique(rows.block_start[b][rows.noised[b]]):
            mine = (rows.block_start[b] == start) & rows.noised[b]
            np.testing.assert_allclose(mean[b, mine], np.mean(np.asarray(values)[b, mine]), rtol=1e-5)


DOCUMENTS = [("12", (2, 3), "4", (1, 2), "56"), ((2, 2),), ("789", (1, 2), (2, 1))], [("3", (2, 2))]


@pytest.mark.parametrize("context", ["clean", "noised"])
def test_the_worse_prediction_is_that_of_documents_without_text(stepped, context):
    """`without_words` of packed rows reads as `drop_text` of each document, laid out by itself."""
    tiny = stepped
    layout = dataclasses.replace(tiny.cfg.layout, context=context)

    def laid(change):
        rows = [[tiny.pieces(*parts, seed=n) for n, parts in enumerate(row)] for row in DOCUMENTS]
        plans = [[plan_images(pieces, layout, True) for pieces in row] for row in rows]
        both = [list(zip(*pair, strict=True)) for pair in zip(rows, plans, strict=True)]
        return tiny.batch(*[[tiny.lay(change(pieces), plan, layout=layout) for pieces, plan in row] for row in both], length=72)

    rows, dropped = laid(list), laid(drop_text)
    assert rows.noised.sum() == dropped.noised.sum() and not np.array_equal(rows.noised, dropped.noised)
    textless, order = without_words(jax.tree.map(jnp.asarray, rows), text_start(tiny.vocabulary.max_grid))
    z, u = tiny.noise(rows)
    z_moved, u_moved = (np.take_along_axis(a, np.asarray(order).reshape(*order.shape, *[1] * (a.ndim - 2)), 1) for a in (z, u))
    ours = np.asarray(tiny.forward(textless, z_moved, u_moved)[1])[np.asarray(textless.noised)]
    z_dropped, u_dropped = np.zeros_like(z), np.zeros_like(u)
    for b in range(2):  # patches in the order in which they stand: clean copies and noised blocks
        z_dropped[b, dropped.is_patch[b]], u_dropped[b, dropped.is_patch[b]] = z[b, rows.is_patch[b]], u[b, rows.is_patch[b]]
    theirs = np.asarray(tiny.forward(dropped, z_dropped, u_dropped)[1])[dropped.noised]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    with_text = np.asarray(tiny.forward(rows, z, u)[1])[rows.noised]
    assert np.abs(with_text - ours).max() > 0.05  # control: the words do matter


def test_guidance_is_learnt_where_it_acts(stepped):
    """Errors of h = 0 by hand: |U - (w truth + (1 - w) U without text)|^2 within the interval, the plain one outside it."""
    tiny = stepped
    pieces = [tiny.pieces("12", (2, 3), "4"), tiny.pieces("7", (2, 2), seed=3)]
    rows = tiny.batch(*[[tiny.lay(p)] for p in pieces], length=32)
    z, u = tiny.noise(rows)
    assert len(np.unique(u[rows.noised])) == 2
    middle = float(np.mean([u[0].max(), u[1].max()]))
    x = rows.patches / np.float32(127.5) - 1
    eps = np.where(rows.noised[..., None], (z - (1 - u[..., None]) * x) / np.maximum(u, 1e-6)[..., None], 0)
    velocity = lambda rows, z, u: (
        (z - np.asarray(tiny.forward(rows, z, u)[1])) / np.maximum(u, tiny.cfg.diffusion.clip)[..., None]
    )
    own, truth = velocity(rows, z, u)[rows.noised], (eps - x)[rows.noised]
    worse = []
    for b in range(2):
        alone = tiny.batch([tiny.lay(drop_text(pieces[b]), [ImagePlan(True, 1)])], length=32)
        z_alone = np.zeros_like(z[:1])
        z_alone[alone.is_patch] = z[b][rows.is_patch[b]]
        worse.append(velocity(alone, z_alone, np.where(alone.noised, u[b].max(), 0).astype(np.float32))[alone.noised])
    acts = (u > middle)[rows.noised][:, None]
    target = np.where(acts, 3 * truth - 2 * np.concatenate(worse), truth)
    weight = rows.image_weight[rows.noised]
    cfg = dataclasses.replace(
        tiny.cfg,
        few_step=config.FewStep(objective="shortcut", guidance=3.0, guidance_interval=(middle / (1 - middle), float("inf"))),
    )
    sums = few_step_sums(tiny.network, cfg, tiny.params, rows, jnp.asarray(u), jnp.zeros_like(u), jnp.asarray(eps))
    assert float(sums.image) == pytest.approx(float(((own - target) ** 2).mean(axis=-1) @ weight), rel=1e-4)
    plain = float(((own - truth) ** 2).mean(axis=-1) @ weight)
    assert abs(float(sums.image) - plain) > 0.05 * plain


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_learns_and_pieces_of_a_batch_add_up(new_tiny, objective):
    tiny = new_tiny(step_input=True)
    rows = batch_of(tiny)
    states = []
    for pieces in (1, 2):
        cfg = with_objective(tiny, objective, batch_size=2, accumulate=pieces)
        tx, _ = make_optimizer(config.Optimizer(learning_rate=3e-3, warmup=1, decay="constant"), 10)
        step = jax.jit(make_train_step(tiny.network, cfg, tx))
        state, values = step(train_state.create(tiny.params, tx, 0), rows)
        states.append(state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), states[0].params, states[1].params)
    first = float(values["loss"])
    for _ in range(15):
        state, values = step(state, rows)
    assert np.isfinite(float(values["loss"])) and float(values["loss"]) < first
    assert not np.array_equal(state.params["image"]["step_in"]["kernel"], tiny.params["image"]["step_in"]["kernel"])


def test_drawing_in_one_evaluation_is_one_evaluation(stepped, monkeypatch):
    """One step from sigma_max: net(z, u, u), here of the noise that the document's key gives."""
    tiny = stepped
    model = Model(tiny.cfg, tiny.params, tiny.vocabulary)
    draws = functools.partial(
        model.generate, [Document("12", IMG)], image_size=(4, 6), max_tokens=0, solver="few_step", seed=[1]
    )
    seen = draws(steps=1, grid="uniform_u")[0].images[-1].pixels
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 2**30)
    noise = jax.random.normal(jax.random.fold_in(key, 0), (6, 12))
    u = np.float32(80 / 81)
    rows = tiny.batch([tiny.lay(tiny.pieces("12", (2, 3)), end=False)])
    block = np.flatnonzero(np.asarray(rows.noised[0]))
    z = np.zeros(rows.patches.shape, np.float32)
    z[0, block] = u * np.asarray(noise)
    times = np.where(rows.noised, u, 0)
    network = tiny.network.bind(tiny.params)
    hidden = network.hidden(rows.tokens, rows.is_patch, z, times, rows.cell, rows.position, rows.mask, step=times)
    x_hat = np.asarray(network.predict(hidden, rows.cell))[0, block]
    pixels = np.clip(np.rint((x_hat + 1) * 127.5), 0, 255).reshape(2, 3, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(4, 6, 3)
    assert np.abs(pixels - seen).max() <= 1
    untold = draws(steps=1, grid="uniform_u", solver="ddim")[0].images[-1].pixels
    assert np.abs(untold.astype(int) - seen).max() > 3  # the network is told the length, and it matters


def test_parameters_of_another_run(new_tiny):
    plain, stepped = new_tiny(), new_tiny(step_input=True)
    fresh = stepped.network.init(jax.random.key(7))
    whole = merged(fresh, plain.params, "runs/plain")
    step = whole["image"].pop("step_in")
    assert np.all(step["kernel"] == 0)  # so that training starts from the very function that the other run had
    jax.tree.map(np.testing.assert_array_equal, whole, plain.params)
    with pytest.raises(ConfigError, match="runs/deep.*parameter blocks/.*of shape .3,.*has shape .2,"):
        merged(fresh, new_tiny(depth=3).params, "runs/deep")
    with pytest.raises(ConfigError, match="image/step_in/kernel.*has no place"):
        merged(plain.params, stepped.params, "runs/few")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": {"step_input": False}}, r"few_step\.objective='meanflow' needs model\.step_input=True"),
        ({"diffusion": {"prediction": "v"}}, r"diffusion\.prediction='x'.*not 'v'"),
        ({"diffusion": {"schedule": "cosine"}}, "schedule='flow'.*'cosine'"),
        ({"model": {"attention": "blockwise"}}, r"only dense attention.*'blockwise'.*few_step\.objective='difference'"),
        ({"layout": {"row_length": 4096}}, "row_length=4096"),
        ({"few_step": {"share": 0.0}}, r"few_step\.share=0\.0"),
        ({"few_step": {"guidance": 2.0}, "layout": {"markers": False}}, r"few_step\.guidance=2\.0.*layout\.markers=False"),
    ],
)
def test_what_cannot_work_is_refused(new_tiny, change, complaint):
    cfg = with_objective(new_tiny(step_input=True), "meanflow")
    with pytest.raises(ConfigError, match=complaint):
        dataclasses.replace(cfg, **{name: dataclasses.replace(getattr(cfg, name), **own) for name, own in change.items()})


def test_a_model_that_was_not_trained_for_it_says_so(tiny_gau):
    with pytest.raises(ConfigError, match="--few-step"):
        Model(tiny_gau.cfg, tiny_gau.params, tiny_gau.vocabulary).generate(
            [Document("1", IMG)], image_size=(4, 4), solver="few_step"
        )
    with pytest.raises(ConfigError, match=r"solver='few_step' needs model\.step_input"):
        dataclasses.replace(tiny_gau.cfg, sampling=config.Sampling(solver="few_step"))
    with pytest.raises(ConfigError, match="time_embedding"):
        config.Model(step_input=True, time_embedding="table")
    assert Network.of(tiny_gau.cfg, 10).cfg.step_input is False
