"""LaVIT as a tokenizer: trained by the same command, of its own length for every image, whole without its encoder's folder."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmdiff
from mmdiff.adapters.folders import front_end_parameters
from mmdiff.adapters.front_end import look
from mmdiff.cli.main import main
from mmdiff.config import Config, ConfigError, Data, FrontEnd, Layout, Model, Optimizer, Sampling, Training
from mmdiff.config_files import replaced
from mmdiff.data.batches import Batches, Choice
from mmdiff.document import IMG, DataError, Document, Image
from mmdiff.models.network import Network
from mmdiff.pretrained.clip import load_clip
from mmdiff.pretrained.encoder import normalised
from mmdiff.tokenizers.model import Tokenizer as Trained
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.tokenizers.tower import read_sizes
from mmdiff.training.checkpoint import restore_params
from mmdiff.training.loop import train
from mmdiff.training.run import merged

from .semantic import encoder, experiment, pixels

COUNT = 16  # patches of the encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run whose encoder's folder has gone since."""
    place = tmp_path_factory.mktemp("lavit")
    elsewhere = place / "clip"
    shutil.copytree(folder, elsewhere)
    validation = train(experiment("lavit", str(elsewhere)), place / "run")
    shutil.rmtree(elsewhere)
    return place / "run", validation


@pytest.fixture(scope="module")
def tokenizer(run):
    return mmdiff.load_tokenizer(run[0])


def test_it_is_trained_validated_and_shown(run):
    folder, validation = run
    assert {"psnr", "keep_ratio", "keep_ratio_std", "feature_cosine", "codes_used", "code_bits"} <= set(validation)
    assert 0 < validation["keep_ratio"] <= 1
    per_image = validation["keep_ratio"] * COUNT * validation["code_bits"]
    assert validation["bits_per_image"] == pytest.approx(per_image, rel=1e-5)
    assert (folder / "samples" / "0000004.png").is_file()
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"feature_loss", "image_loss", "keep_ratio", "quantizer_loss"} <= set(logged[0])


def test_the_encoder_is_the_given_one_to_the_bit_after_training(run, folder):
    kept, clip = restore_params(run[0] / "checkpoints")[0]["tower"], load_clip(folder)
    np.testing.assert_array_equal(
        kept["vision"]["encoder"]["layers"]["0"]["q"]["kernel"], clip.vision.encoder.layers[0].q.kernel[...]
    )
    fresh, _ = restore_params(run[0] / "checkpoints", ema=False)
    for one, two in zip(jax.tree.leaves(kept), jax.tree.leaves(fresh["tower"]), strict=True):
        np.testing.assert_array_equal(one, two)  # nor does the average drift


def test_features_are_those_of_the_folder_before_the_last_layer_without_class(tokenizer, folder):
    images = pixels(2)
    found = tokenizer.network.bind(tokenizer.params).module.tower(images / 127.5 - 1)
    clip = load_clip(folder)
    x = clip.vision(normalised(images, 32), layers=1)
    assert len(clip.vision.encoder.layers) == 2
    np.testing.assert_allclose(found[0], x[:, 1:], atol=1e-4)
    np.testing.assert_allclose(found[1], clip.embed_images(normalised(images, 32)), atol=1e-5)


def test_images_have_codes_of_their_own_length_and_come_back_from_any(tokenizer):
    images = pixels(COUNT)
    ids = tokenizer.encode(images)
    lengths = [len(row) for row in ids]
    assert len(set(lengths)) > 1 and all(1 <= length <= COUNT for length in lengths)
    alone = [tokenizer.encode([image])[0] for image in images]  # one at a time
    assert all((a == b).all() for a, b in zip(ids, alone, strict=True))
    made = tokenizer.decode(ids)
    np.testing.assert_array_equal(made, tokenizer.reconstruct(images))
    np.testing.assert_array_equal(tokenizer.decode(ids[::-1]), made[::-1])
    every = [np.resize(np.arange(24), k) for k in range(1, COUNT + 1)]
    drawn = tokenizer.decode(every)
    assert drawn.shape == (COUNT, 32, 32, 3) and len({image.tobytes() for image in drawn}) == COUNT
    others = tokenizer.encode(images, seed=1)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(ids, others, strict=True))
    for wrong, what in (
        ([[]], r"ids\[0\] of shape \(0,\)"),
        ([np.zeros(COUNT + 1, int)], r"ids\[0\] of shape \(17,\)"),
        ([[24]], r"ids\[0\] from 24 to 24"),
        ([[1, 2], [-1, 3, 4]], r"ids\[1\] from -1 to 4"),  # of different lengths
        ([[0.5]], "of type float64, no integers"),
        ([["1"]], "of type <U1, no integers"),
        (["12"], r"of shape \(\)"),
        ([ids], "ids are no rows of integers"),
        (5, "ids are no rows of integers"),
    ):
        with pytest.raises(DataError, match=what + ".*: this tokenizer decodes 1 to 16 for each image, from 0 to 23") as told:
            tokenizer.decode(wrong)
        assert "\n" not in str(told.value)


def test_the_likelier_choice_draws_nothing(tokenizer):
    settings = dataclasses.replace(tokenizer.cfg.tokenizer, deterministic=True)
    sure = Trained(dataclasses.replace(tokenizer.cfg, tokenizer=settings), tokenizer.params)
    images = pixels(COUNT)

    @jax.jit
    def choices(params, images):
        module = sure.network.bind(params).module
        return module.selector(module.tower(images)[0])

    choice = np.asarray(choices(sure.params, images.astype(np.float32) / 127.5 - 1))
    expected = np.maximum((choice[..., 0] >= choice[..., 1]).sum(-1), 1)
    assert [len(row) for row in sure.encode(images)] == expected.tolist()
    every = Trained(replaced(tokenizer.cfg, {"tokenizer.keep": 1.0}), tokenizer.params)
    assert {len(row) for row in every.encode(images)} == {COUNT}
    for settled in (sure, every):
        with pytest.raises(ConfigError, match="draws nothing at random"):
            settled.encode(images, seed=1)


def test_a_tokenizer_survives_its_file(tokenizer):
    again = Trained.from_bytes(tokenizer.to_bytes(), "it")
    assert again.fingerprint == tokenizer.fingerprint
    for one, two in zip(jax.tree.leaves(again.params), jax.tree.leaves(tokenizer.params), strict=True):
        np.testing.assert_array_equal(one, two)
    assert jax.tree.structure(again.params) == jax.tree.structure(tokenizer.params)


@pytest.fixture(scope="module")
def learnt(tokenizer):
    """(params, images, losses of parameters, images and weights)."""
    network, params = tokenizer.network, jax.tree.map(jnp.asarray, tokenizer.params)
    images = jnp.asarray(pixels(4) / 127.5 - 1, jnp.float32)

    @jax.jit
    def losses(params, images, weight):
        return network.losses(params, images, weight, jax.random.key(0), False)

    return params, images, losses


def test_each_part_learns_from_its_own_loss(learnt):
    params, images, losses = learnt
    size = lambda tree: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))
    of = lambda name: jax.grad(lambda p: losses(p, images, jnp.ones(4))[1][0][name])
    features, pixels = jax.jit(lambda p: (of("feature_loss")(p), of("image_loss")(p)))(params)
    assert all(size(features[part]) > 0 for part in ("selector", "merger", "narrow", "decoder"))
    assert size(features["tower"]) == size(features["codebook"]) == size(features["pixels"]) == 0
    assert size(pixels["pixels"]) > 0 and all(size(part) == 0 for name, part in pixels.items() if name != "pixels")


def test_only_kept_patches_and_real_images_count(learnt):
    params, images, losses = learnt
    other = images.at[3].set(-1.0)
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])
    one, two = losses(params, images, weight), losses(params, other, weight)
    assert one[0] != losses(params, images, jnp.ones(4))[0]
    for a, b in zip(jax.tree.leaves(one[1][1]), jax.tree.leaves(two[1][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    before, after = params["codebook"]["counts"], losses(params, images, jnp.ones(4))[1][1]["counts"]
    seen = (after - 0.99 * before).sum() / 0.01
    np.testing.assert_allclose(seen, losses(params, images, jnp.ones(4))[1][0]["keep_ratio"] * 4 * COUNT, rtol=1e-3)


def test_the_loss_is_the_sum_of_its_terms(learnt):
    params, images, losses = learnt
    loss, (parts, _) = losses(params, images, jnp.ones(4))
    expected = parts["feature_loss"] + 2 * (1 / 3 - parts["keep_ratio"]) ** 2 + parts["quantizer_loss"] + parts["image_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# In front of a model that reads.


def test_a_model_may_read_the_merged_features_before_they_are_quantised(run, folder, tokenizer):
    tower = dataclasses.replace(tokenizer.cfg.tokenizer.tower, embedding=0)
    front = FrontEnd(kind="merger", encoder=folder, init=str(run[0]), tower=tower, tokens=COUNT, depth=1)
    cfg = Config(
        model=Model(width=32, depth=1, patch=8, block="attention", head_width=16, lossless=False),
        layout=Layout(row_length=64, images="read", max_grid=COUNT),
        front_end=front,
        data=Data(image_size=(32, 32)),
    )
    given, network = front_end_parameters(front, 32), Network.of(cfg, 300)
    params = merged(jax.jit(network.init)(jax.random.key(0)), given, "here")
    images = jnp.asarray(pixels(6) / 127.5 - 1, jnp.float32)

    @jax.jit
    def vectors(params, images):
        module = network.bind(params)
        return module.image.vectors(images, module.tower), module.image.adapter.out(jnp.zeros((1, tower.width)))

    settings = dataclasses.replace(tokenizer.cfg.tokenizer, deterministic=True)
    sure = Trained(dataclasses.replace(tokenizer.cfg, tokenizer=settings), tokenizer.params)

    @jax.jit
    def whole(tokenizer_params, images):
        bound = sure.network.bind(tokenizer_params)
        features, _ = bound.module.tower(images)
        keep = bound.keep(features, None)
        return bound.module.merger(features, keep), keep

    found, zero = vectors(params, images)
    dense, keep = map(np.asarray, whole(sure.params, images))
    kernel, blank = params["image"]["adapter"]["out"]["kernel"], params["image"]["adapter"]["blank"]
    assert len(set(keep.sum(-1).tolist())) > 1 and found.shape == (6, COUNT, 32)
    for one, merged_ones, kept_ones in zip(np.asarray(found), dense, keep > 0, strict=True):
        count = kept_ones.sum()
        np.testing.assert_allclose(one[:count], merged_ones[kept_ones] @ kernel + zero, atol=1e-3)
        np.testing.assert_array_equal(one[count:], np.broadcast_to(blank, (COUNT - count, 32)))
    assert "selector" in given["tower"] and network.frozen == ("tower",)

    def kept(most):
        module = network.bind(params)
        features = look(module.tower, images, front)
        return np.asarray(module.tower.keep(features, most)), np.asarray(module.tower.selector(features[:, 1:]))[..., 0]

    every, chance = kept(COUNT)
    few, _ = kept(3)
    np.testing.assert_array_equal(every, keep)
    likeliest = chance >= np.sort(chance, axis=-1)[:, -3:][:, :1]
    np.testing.assert_array_equal(few, keep * likeliest)
    assert (few.sum(-1) < keep.sum(-1)).any()

    def refused(told, **changes):
        with pytest.raises(ConfigError, match=told):
            front_end_parameters(dataclasses.replace(front, **changes), 32)

    refused(r"front_end\.depth=2, and the merger in .* has 1 layers", depth=2)
    refused(r"front_end\.kind='merger' needs front_end\.init", init="")
    refused("must be 'clip', 1 and True", frozen=False)


# On its codes.


def system(tokenizer, layout=None) -> Config:
    return Config(
        model=Model(width=32, depth=1, patch=8, block="attention", head_width=16, lossless=False),
        layout=layout or Layout(row_length=192, images="next_code", max_grid=COUNT),
        data=Data(source="shapes", generator=(("draw", 1.0),), vocabulary="bytes", size=24, tokenizer=str(tokenizer)),
        optimizer=Optimizer(learning_rate=3e-3, warmup=2),
        training=Training(steps=2, batch_size=4, log_every=1, sample_every=0, validation_rows=4),
    )


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("system") / "run"
    assert train(system(run[0]), folder)["code_bits"] > 0
    return mmdiff.load(folder)


def test_rows_hold_as_many_codes_as_the_image_has(trained, tokenizer):
    images = [Image(image) for image in pixels(3)]
    listed = Listed([Document("a", image) for image in images])
    batches = Batches(listed, trained.vocabulary, trained.cfg, learn=False, tokenizer=Once(trained.tokenizer))
    for index, image in enumerate(images):
        (ids,) = tokenizer.encode([image.pixels])
        rows = batches.laid(index, Choice(False, False, False, False))
        codes = rows.tokens[rows.is_patch] - trained.vocabulary.codes_range[0]
        np.testing.assert_array_equal(codes, ids)
        before = rows.tokens[np.flatnonzero(rows.is_patch)[0] - 2 :][:2]
        assert before.tolist() == [trained.vocabulary.rows(1), trained.vocabulary.cols(len(ids))]
    assert batches.tokenizer.calls == 3  # lengths and codes from one look at each image


def test_documents_of_different_lengths_are_drawn_together_as_alone(trained):
    prompts = [Document(text, IMG) for text in ("a", "bb", "a circle")]
    coded, decode = [], trained.tokenizer.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained.tokenizer, "decode", lambda ids: coded.append(ids[0]) or decode(ids))
        together = trained.generate(prompts, max_tokens=0, seed=[1, 2, 3])
    assert len({len(ids) for ids in coded}) > 1 and all(1 <= len(ids) <= COUNT for ids in coded)
    (alone,) = trained.generate(prompts[1:2], max_tokens=0, seed=[2])
    np.testing.assert_array_equal(together[1].images[0].pixels, alone.images[0].pixels)
    assert (together[0].images[0].pixels != alone.images[0].pixels).any()
    with pytest.raises(ConfigError, match="knows images of 32x32 alone"):
        trained.generate(prompts, image_size=(64, 64))


def test_codes_of_many_lengths_are_masked_and_drawn_many_at_a_time(run, tmp_path):
    layout = Layout(row_length=192, images="masked_code", max_grid=COUNT)
    cfg = system(run[0], layout)
    assert train(dataclasses.replace(cfg, sampling=Sampling(steps=3)), tmp_path)["code_bits"] > 0
    model = mmdiff.load(tmp_path)
    images = [Image(image) for image in pixels(3)]
    lengths = {len(ids) for ids in model.tokenizer.encode([image.pixels for image in images])}
    assert len(lengths) > 1
    drawn = model.generate([Document(text, IMG) for text in ("a", "bb", "a circle")], max_tokens=0, seed=[1, 2, 3])
    assert [document.images[0].pixels.shape for document in drawn] == [(32, 32, 3)] * 3
    (alone,) = model.generate([Document("bb", IMG)], max_tokens=0, seed=[2])
    np.testing.assert_array_equal(drawn[1].images[0].pixels, alone.images[0].pixels)


def test_what_does_not_fit_is_refused_in_one_line(run, folder, tmp_path):
    cfg = experiment("lavit", folder)

    def refused(make, told, kind=ConfigError):
        with pytest.raises(kind, match=told) as problem:
            make()
        assert "\n" not in str(problem.value)

    change = lambda **values: dataclasses.replace(cfg, tokenizer=dataclasses.replace(cfg.tokenizer, **values))
    refused(lambda: change(encoder=""), "set tokenizer.encoder to its folder")
    refused(lambda: change(adversarial=0.5), "tokenizer.adversarial=0.5 has no meaning with model.network='lavit'")
    refused(lambda: change(latents=4), "needs model.network='vit_autoencoder' or 'seed'")
    refused(lambda: TokenizerNetwork.of(cfg), "says nothing about the encoder")
    refused(lambda: train(change(encoder=str(tmp_path)), tmp_path / "run"), "config.json: not there", DataError)
    other = dataclasses.replace(read_sizes(folder), depth=3)
    refused(lambda: train(change(tower=other), tmp_path / "run"), "leave that out")
    plain = dataclasses.replace(cfg.model, network="vit_autoencoder")
    refused(lambda: dataclasses.replace(cfg, model=plain), "tokenizer.encoder='.*' has no meaning")
    narrow = system(run[0], Layout(row_length=192, images="next_code", max_grid=8))
    refused(lambda: train(narrow, tmp_path / "narrow"), "layout.max_grid=8: an image may have 16 codes")


class Once:
    """A tokenizer that counts what it is asked to code."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, images):
        self.calls += len(images)
        return self.tokenizer.encode(images)


class Listed(list):
    """Documents as a source."""

    def outline(self, index):
        return [s if not isinstance(s, Image) else (s.height, s.width, s.learn) for s in self[index].segments]

    def where(self, index):
        return f"document {index}"


def test_it_is_measured_by_the_evaluate_command(run, capsys):
    assert main(["evaluate", str(run[0]), "--metrics", "psnr,code_use", "--count", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_nominal"] == pytest.approx(COUNT * np.log2(24)) and found["bits_per_image"] < found["bits_nominal"]
