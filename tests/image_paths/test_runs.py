"""Runs on the codes of a tokenizer, from the command line: trained, resumed to the same bits, measured, sampled, refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import mmdiff
from mmdiff.cli.main import main
from mmdiff.config import Config, ConfigError, Data, Layout, Model, Optimizer, Sampling, Tokenizer, Training
from mmdiff.data.batches import Batches
from mmdiff.document import IMG, DataError, Document, Image
from mmdiff.tokenizers.model import Tokenizer as Trained
from mmdiff.training.checkpoint import restore_params
from mmdiff.training.loop import train
from mmdiff.training.run import TOKENIZER_FILE, find_tokenizer

TOKENIZER = Config(
    model=Model(network="vit_autoencoder", width=16, depth=1, patch=8, head_width=16),
    tokenizer=Tokenizer(quantizer="vq", codes=16, code_width=4),
    layout=Layout(markers=False, row_length=16),
    data=Data(source="shapes", generator=(("draw", 1.0),), vocabulary="bytes", size=16),
    training=Training(steps=2, batch_size=4, checkpoint_every=2, sample_every=0, validate_every=0),
)


def system(images: str, tokenizer, **more) -> Config:
    cfg = Config(
        model=Model(width=32, depth=1, patch=8, block="attention", head_width=16, lossless=False),
        layout=Layout(row_length=192, images=images, max_grid=8),
        data=Data(
            source="shapes",
            generator=(("draw", 0.5), ("caption", 0.5)),
            vocabulary="bytes",
            size=32,
            tokenizer=str(tokenizer) if tokenizer else "",
        ),
        optimizer=Optimizer(learning_rate=3e-3, warmup=2),
        training=Training(
            steps=4, batch_size=4, log_every=1, checkpoint_every=2, sample_every=4, validate_every=2, validation_rows=4
        ),
        sampling=Sampling(steps=3) if images == "masked_code" else Sampling(),
    )
    return dataclasses.replace(cfg, **more)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    train(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module", params=["next_code", "masked_code"])
def run(request, tokenizer, tmp_path_factory):
    """A run, whose tokenizer's own folder has gone since."""
    folder = tmp_path_factory.mktemp(request.param)
    elsewhere = folder / "moved"
    shutil.copytree(tokenizer, elsewhere)
    cfg = system(request.param, elsewhere)
    validation = train(cfg, folder / "run")
    shutil.rmtree(elsewhere)
    return folder / "run", cfg, validation


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: float(r["loss"]).hex() for r in records if "loss" in r}


def test_a_run_keeps_its_tokenizer_and_is_validated(run, tokenizer):
    folder, _, validation = run
    assert {"code_bits", "text_bits_per_byte"} <= set(validation) and "x_error" not in validation
    assert 0 < validation["code_bits"] < 12
    kept = Trained.from_bytes((folder / TOKENIZER_FILE).read_bytes(), "it")
    original = mmdiff.load_tokenizer(tokenizer)
    assert kept.fingerprint == original.fingerprint
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(kept.encode(pixels), original.encode(pixels))
    assert kept.to_bytes() == original.to_bytes()
    assert (folder / "samples" / "0000004.png").is_file()


def test_a_resumed_run_has_the_same_bits(run, tmp_path):
    folder, cfg, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    (copy / "metrics.jsonl").unlink()
    train(cfg, copy)
    assert lines(copy) == {step: loss for step, loss in lines(folder).items() if step > 2}
    one, two = (restore_params(place / "checkpoints")[0] for place in (folder, copy))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_measured_and_sampled_by_the_commands(run, capsys, tmp_path):
    folder, cfg, _ = run
    assert main(["evaluate", str(folder), "--count", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"code_bits", "image_accuracy", "caption_accuracy", "text_bits_per_byte"} <= set(found)
    assert not {"x_error", "psnr"} & set(found)
    assert "solver" not in found["protocol"] and ("steps" in found["protocol"]) == (cfg.layout.images == "masked_code")
    assert main(["sample", str(folder), "--prompt", "a red circle", "--images", "2", "--out", str(tmp_path / "out")]) == 0
    assert "2 images" in capsys.readouterr().out
    assert main(["evaluate", str(folder), "--metrics", "x_error"]) == 65
    assert "x_error cannot be measured" in capsys.readouterr().err
    model = mmdiff.load(folder)
    (drawn,) = model.generate([Document("a red circle", IMG)], max_tokens=0)
    assert drawn.images[0].pixels.shape == (32, 32, 3)


@pytest.mark.parametrize("images", ["next_code", "masked_code"])
def test_latents_without_places_stand_in_one_row(images, tmp_path):
    """Five codes for a whole image, whose patches would be 4 x 4."""
    settings = dataclasses.replace(TOKENIZER, tokenizer=dataclasses.replace(TOKENIZER.tokenizer, latents=5))
    made = Trained(settings, Trained(settings, {}).network.init(jax.random.key(0)))
    cfg = system(images, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmdiff.training.run.load_tokenizer", lambda path: made)
        train(dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, steps=2, sample_every=0)), tmp_path / "run")
        narrow = dataclasses.replace(cfg, layout=dataclasses.replace(cfg.layout, max_grid=4))
        with pytest.raises(ConfigError, match=r"an image of 5 patch columns does not fit layout\.max_grid=4"):
            train(narrow, tmp_path / "narrow")
    model = mmdiff.load(tmp_path / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    batches = Batches(Listed([Document("a", Image(pixels))]), model.vocabulary, model.cfg, tokenizer=model.tokenizer)
    rows = batches.batch(0)
    first = np.flatnonzero(rows.is_patch[0])[:5]
    np.testing.assert_array_equal(rows.cell[0, first], [[0, column, 1, 5] for column in range(5)])
    start = model.vocabulary.codes_range[0]
    if images == "next_code":
        np.testing.assert_array_equal(rows.tokens[0, first] - start, made.encode([pixels])[0])
    (drawn,) = model.generate([Document("a", IMG, "b", Image(pixels), IMG)], max_tokens=0)
    assert len(drawn.images) == 3 and drawn.images[0].pixels.shape == (32, 32, 3)


def test_another_tokenizer_is_other_data(run, tokenizer):
    """Its codes enter what a checkpoint is compared by; a run of raw patches is known by what it was known by before."""
    folder, cfg, _ = run
    model = mmdiff.load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    listed = Listed([Document("a", Image(image)) for image in pixels])
    one = Batches(listed, model.vocabulary, cfg, tokenizer=model.tokenizer)
    other = Trained(model.tokenizer.cfg, jax.tree.map(lambda a: a + 0.01, model.tokenizer.params))
    assert one.fingerprint != Batches(listed, model.vocabulary, cfg, tokenizer=other).fingerprint
    assert one.fingerprint == Batches(listed, model.vocabulary, cfg, tokenizer=model.tokenizer).fingerprint


class Listed(list):
    """Documents as a source."""

    def outline(self, index):
        return [s if not isinstance(s, Image) else (s.height, s.width, s.learn) for s in self[index].segments]

    def where(self, index):
        return f"document {index}"


def test_what_does_not_fit_a_tokenizer_is_refused_before_training(tokenizer, tmp_path):
    def refused(cfg, told, kind=ConfigError):
        with pytest.raises(kind, match=told) as problem:
            train(cfg, tmp_path / "never")
        assert "\n" not in str(problem.value) and not (tmp_path / "never" / "checkpoints").exists()

    cfg = system("next_code", tokenizer)
    refused(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, patch=4)), "set it to 8")
    refused(system("next_code", tmp_path / "nowhere"), "holds no run", DataError)
    larger = dataclasses.replace(cfg.data, generator_image_size=64)
    refused(dataclasses.replace(cfg, data=larger), "the tokenizer takes 32x32")
    other = dataclasses.replace(TOKENIZER, tokenizer=Tokenizer(quantizer="none"))
    made = Trained(other, Trained(other, {}).network.init(jax.random.key(0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmdiff.training.run.load_tokenizer", lambda path: made)
        with pytest.raises(ConfigError, match="has no codes"):
            find_tokenizer(system("next_code", tokenizer), tmp_path)
    (tmp_path / TOKENIZER_FILE).write_bytes(b"no archive")
    with pytest.raises(DataError, match="is no tokenizer, or a damaged one"):
        find_tokenizer(cfg, tmp_path)
