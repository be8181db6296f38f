"""What a tokenizer's step changes and what it leaves alone; the discriminator and the autoencoder do not teach each other."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal
from safetensors.numpy import save_file

from mmdiff.config import ConfigError, Tokenizer
from mmdiff.document import DataError
from mmdiff.layout import ImagePiece, ImagePlan, lay_out, pack, patchify, stack
from mmdiff.tokenizers import discriminator
from mmdiff.tokenizers.discriminator import balance, judged, perceptual, read_vgg
from mmdiff.tokenizers.model import Tokenizer as Trained
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.tokenizers.quantizers.base import Learning
from mmdiff.tokenizers.training import losses, make_tokenizer_step
from mmdiff.training import state as train_state
from mmdiff.training.flops import training_flops
from mmdiff.training.optimizer import make_optimizer

from .tiny import MODELS, QUANTIZERS, SIZE, experiment

ADVERSARIAL = dataclasses.replace(QUANTIZERS["fsq"], adversarial=0.5)


def pixels(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *SIZE, 3)).astype(np.uint8)


def rows_of(cfg, images):
    """Two images a row; an odd one stands alone, before padding."""
    side, count = cfg.model.patch, SIZE[0] * SIZE[1] // cfg.model.patch**2
    grid = SIZE[0] // side, SIZE[1] // side
    laid = []
    for image in images:
        piece = ImagePiece(patchify(image, side), *grid)
        laid.append(lay_out([piece], [ImagePlan(False, 1)], None, cfg.layout, patch_values=3 * side**2)[0])
    return stack([pack(laid[i : i + 2], 2 * count) for i in range(0, len(laid), 2)])


def setup(cfg):
    network = TokenizerNetwork.of(cfg)
    tx, _ = make_optimizer(cfg.optimizer, cfg.training.steps)
    state = train_state.create(jax.jit(network.init)(jax.random.key(1)), tx, 0)
    return network, tx, state


def scaled(images):
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


@pytest.mark.parametrize(("model", "name"), [("conv", "vq"), ("vit", "simvq"), ("vit", "none")])
def test_every_tokenizer_learns_to_give_back_what_it_sees(model, name):
    cfg = experiment(model, QUANTIZERS[name])
    network, tx, state = setup(cfg)
    rows = rows_of(cfg, pixels(4))
    step = jax.jit(make_tokenizer_step(network, cfg, tx))
    found = []
    for _ in range(12):
        state, metrics = step(state, rows)
        found.append(float(metrics["image_loss"]))
    assert found[-1] < 0.9 * found[0] and int(metrics["skipped"]) == 0


def test_rows_hold_whole_images_and_padding_is_none():
    cfg = experiment()
    network, images = TokenizerNetwork.of(cfg), pixels(3)
    found, weight = network.images(rows_of(cfg, images))
    assert weight.tolist() == [1, 1, 1, 0]
    np.testing.assert_array_equal(np.rint((np.asarray(found[:3]) + 1) * 127.5), images)


@pytest.mark.parametrize("name", ["vq", "lfq"])
def test_padding_changes_nothing(name):
    cfg = experiment("vit", QUANTIZERS[name])
    network = TokenizerNetwork.of(cfg)
    params, key = jax.jit(network.init)(jax.random.key(1)), jax.random.key(2)
    run = jax.jit(lambda images, weight: losses(network, params, images, weight, key=key))
    images = np.concatenate([scaled(pixels(3)), np.ones((1, *SIZE, 3), np.float32)])
    other = np.concatenate([scaled(pixels(3)), scaled(pixels(1, 9))])
    weight = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    for one, two in zip(jax.tree.leaves(run(images, weight)), jax.tree.leaves(run(other, weight)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert run(images, weight)[0] != run(images, jnp.ones(4))[0]  # the control: it does count with a weight


@pytest.fixture(scope="module")
def started():
    """(network, state, rows, compiled step) of a tokenizer whose optimiser decays weights."""
    cfg = experiment("vit")
    cfg = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, weight_decay=0.1))
    network, tx, state = setup(cfg)
    return network, state, rows_of(cfg, pixels(4)), jax.jit(make_tokenizer_step(network, cfg, tx))


def test_a_codebook_is_changed_by_its_own_rule_alone(started):
    network, state, rows, step = started
    images, weight = network.images(rows)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 3)
    grads = jax.jit(jax.grad(lambda p: losses(network, p, images, weight, key=key)[0]))(state.params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["codebook"]))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(grads["encoder"]))

    @jax.jit
    def by_its_rule(params):
        model = network.bind(params)
        return model.quantise(model.encode(images), Learning(key, jnp.ones((4, 8)))).state

    expected, (after, _) = by_its_rule(state.params), step(state, rows)
    for tree in (after.params, after.ema):
        for name, leaf in expected.items():
            np.testing.assert_allclose(tree["codebook"][name], leaf, rtol=1e-5, atol=1e-6)
    assert not np.allclose(after.params["codebook"]["codes"], state.params["codebook"]["codes"])


def test_a_step_that_is_not_finite_leaves_the_codebook_too(started):
    _, state, rows, step = started
    broken = jax.tree.map(lambda a: a, state.params)
    broken["encoder"]["patch_in"]["bias"] = jnp.full_like(broken["encoder"]["patch_in"]["bias"], jnp.nan)
    after, metrics = step(dataclasses.replace(state, params=broken), rows)
    assert int(metrics["skipped"]) == 1
    for old, new in zip(jax.tree.leaves(state.params["codebook"]), jax.tree.leaves(after.params["codebook"]), strict=True):
        np.testing.assert_array_equal(old, new)


# The discriminator.


@pytest.fixture(scope="module")
def contest():
    """(network, params, images, weight) of a tokenizer with a discriminator."""
    cfg = experiment("vit", ADVERSARIAL)
    network = TokenizerNetwork.of(cfg)
    images, weight = network.images(rows_of(cfg, pixels(3)))
    return network, jax.jit(network.init)(jax.random.key(1)), images, weight


def test_gradients_are_those_of_the_written_out_loss(contest):
    """error + scale * fool to the autoencoder, judge to the discriminator, each from its own plain expression."""
    network, params, images, weight = contest

    def made_by(params):
        model = network.bind(params)
        return model.decode(model.quantise(model.encode(images), Learning()).codes), model.module.discriminator

    mean = lambda each: jnp.sum(each.reshape(len(each), -1).mean(-1) * weight) / weight.sum()
    error = lambda p: mean(jnp.square(made_by(p)[0] - images))
    fool = lambda p: -mean(made_by(p)[1](made_by(p)[0]))
    judge = lambda p: mean(judged(made_by(p)[1](images), made_by(p)[1](jax.lax.stop_gradient(made_by(p)[0])))[:, None])
    wrong, fooled, judging = jax.jit(lambda p: tuple(jax.grad(f)(p) for f in (error, fool, judge)))(params)
    scale = 0.5 * balance(wrong["decoder"]["out"], fooled["decoder"]["out"])
    both = jax.jit(jax.grad(lambda p, share: losses(network, p, images, weight, adversarial=share)[0]))
    found = both(params, 0.5)
    for part in ("encoder", "decoder"):
        expected = jax.tree.map(lambda a, b: a + scale * b, wrong[part], fooled[part])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6), found[part], expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found["discriminator"], judging["discriminator"]
    )
    alone = both(params, 0.0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(alone["discriminator"]))  # before adversarial_start
    assert any(not np.allclose(a, b) for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True))


def test_the_balance_makes_both_pulls_equally_strong():
    error, fool = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray(4.0)}, {"a": jnp.asarray([0.0, 0.1]), "b": jnp.asarray(0.0)}
    assert balance(error, fool) == pytest.approx(5 / 0.1001, rel=1e-5)
    assert balance(error, jax.tree.map(jnp.zeros_like, fool)) == discriminator.MOST


def test_the_discriminator_waits_for_its_start():
    cfg = experiment("vit", dataclasses.replace(ADVERSARIAL, adversarial_start=2))
    network, tx, state = setup(cfg)
    step, rows = jax.jit(make_tokenizer_step(network, cfg, tx)), rows_of(cfg, pixels(4))
    seen = [jax.tree.leaves(state.params["discriminator"])]
    for _ in range(3):
        state, _ = step(state, rows)
        seen.append(jax.tree.leaves(state.params["discriminator"]))
    same = [all((a == b).all() for a, b in zip(one, two, strict=True)) for one, two in itertools.pairwise(seen)]
    assert same == [True, True, False]
    assert training_flops(cfg, 0) == training_flops(experiment("vit", ADVERSARIAL), 0) > 0  # not counted, with or without


# The perceptual distance.


def test_perceptual_distance_against_convolutions_by_scipy(tmp_path, monkeypatch):
    monkeypatch.setattr(discriminator, "VGG", ((2, 3), (4,)))
    rng = np.random.default_rng(0)
    shapes = {0: (2, 3), 2: (3, 2), 5: (4, 3)}
    arrays = {f"features.{n}.weight": rng.normal(size=(*s, 3, 3)).astype(np.float32) for n, s in shapes.items()}
    arrays |= {f"features.{n}.bias": rng.normal(size=s[0]).astype(np.float32) for n, s in shapes.items()}
    np.savez(tmp_path / "vgg.npz", **arrays)
    save_file(arrays | {"classifier.0.bias": np.zeros(2, np.float32)}, tmp_path / "vgg.safetensors")
    weights, same = (read_vgg(tmp_path / f"vgg.{end}") for end in ("npz", "safetensors"))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(same), strict=True))

    def layer(x, n):  # [c, h, w]
        kernel = arrays[f"features.{n}.weight"]
        out = [sum(scipy.signal.correlate2d(a, k, "same") for a, k in zip(x, ks, strict=True)) for ks in kernel]
        return np.maximum(np.stack(out) + arrays[f"features.{n}.bias"][:, None, None], 0)

    def features(x):
        x = ((x + 1) / 2 - discriminator.VGG_MEAN) / discriminator.VGG_STD
        first = layer(layer(x.transpose(2, 0, 1), 0), 2)
        pooled = first.reshape(3, 4, 2, 8, 2).max((2, 4))
        return first, layer(pooled, 5)

    one, two = (np.asarray(scaled(pixels(1, seed))[0], np.float64) for seed in (3, 4))
    expected = 0.0
    for a, b in zip(features(one), features(two), strict=True):
        unit = lambda f: f / np.sqrt((f**2).sum(0) + 1e-10)
        expected += ((unit(a) - unit(b)) ** 2).sum(0).mean()
    found = perceptual(weights, jnp.asarray(one[None], jnp.float32), jnp.asarray(two[None], jnp.float32))
    np.testing.assert_allclose(found, [expected], rtol=1e-4)
    same = jnp.asarray(one[None], jnp.float32)
    assert perceptual(weights, same, same)[0] == 0
    del arrays["features.2.bias"]
    np.savez(tmp_path / "less.npz", **arrays)
    with pytest.raises(DataError, match=r"features\.2\.weight must be .* give torchvision's VGG-16"):
        read_vgg(tmp_path / "less.npz")


# Trained tokenizers.


@pytest.mark.parametrize("model", MODELS)
def test_codes_and_back_are_the_reconstruction(model):
    cfg = experiment(model, dataclasses.replace(QUANTIZERS["vq"], latents=3 if model == "vit" else 0))
    tokenizer = Trained(cfg, jax.jit(TokenizerNetwork.of(cfg).init)(jax.random.key(0)))
    images = list(pixels(5))
    ids = tokenizer.encode(images)
    assert ids.shape == (5, 3 if model == "vit" else 8) and ids.dtype == np.int32
    np.testing.assert_array_equal(tokenizer.decode(ids), tokenizer.reconstruct(images))
    np.testing.assert_array_equal(tokenizer.encode(images[3:]), ids[3:])
    assert tokenizer.bits == pytest.approx(ids.shape[1] * np.log2(24)) and tokenizer.size == SIZE
    assert len(tokenizer.encode([])) == 0
    with pytest.raises(DataError, match="takes uint8"):
        tokenizer.encode([images[0][:4]])
    with pytest.raises(DataError, match="from 0 to 23"):
        tokenizer.decode(np.full(ids.shape, 24))


def test_a_continuous_twin_has_no_ids():
    cfg = experiment("vit", QUANTIZERS["none"])
    tokenizer = Trained(cfg, jax.jit(TokenizerNetwork.of(cfg).init)(jax.random.key(0)))
    assert tokenizer.reconstruct(list(pixels(2))).shape == (2, *SIZE, 3) and tokenizer.bits == np.inf
    with pytest.raises(ConfigError, match="no ids"):
        tokenizer.encode(list(pixels(2)))


def test_every_code_of_the_transformer_sees_the_whole_image():
    cfg = experiment("vit", QUANTIZERS["none"])
    network = TokenizerNetwork.of(cfg)
    params, images = jax.jit(network.init)(jax.random.key(0)), scaled(pixels(1))
    code = lambda images: network.bind(params).encode(images)[0, 0].sum()
    assert (np.asarray(jax.jit(jax.grad(code))(images))[0] != 0).all()


# Configuration.


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": dataclasses.replace(MODELS["conv"], depth=2), "tokenizer": Tokenizer(latents=4)}, "tokenizer.latents=4"),
        ({"training": dataclasses.replace(experiment().training, accumulate=2)}, "training.accumulate=2"),
        ({"model": dataclasses.replace(MODELS["vit"], network="uvit", lossless=False)}, "leave them at their defaults"),
    ],
)
def test_what_does_not_go_together_is_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(experiment("conv", QUANTIZERS["vq"]), **change)


def test_a_patch_must_be_what_the_convolutions_leave():
    with pytest.raises(ConfigError, match="model.patch=8 must be 4"):
        dataclasses.replace(MODELS["conv"], patch=8)


def test_the_optimizer_keeps_nothing_that_moves_a_codebook():
    cfg = experiment("vit")
    _, tx, state = setup(cfg)
    grads = jax.tree.map(jnp.ones_like, state.params) | {"codebook": jax.tree.map(jnp.zeros_like, state.params["codebook"])}
    updates, _ = jax.jit(tx.update)(grads, state.opt_state, state.params)
    assert optax.tree.norm(updates["codebook"]) == 0 < optax.tree.norm(updates["encoder"])
