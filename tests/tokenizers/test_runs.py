"""A tokenizer's run from the command line: trained, resumed to the same bits, measured; and what refuses it."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mmdiff
from mmdiff.cli.main import main
from mmdiff.config import Config, ConfigError, Data, Layout, Model, Optimizer, Tokenizer, Training
from mmdiff.config_files import replaced
from mmdiff.document import DataError
from mmdiff.evaluation.evaluate import evaluate
from mmdiff.evaluation.reconstruction import peak_ratio, similarity
from mmdiff.models.network import Network
from mmdiff.training.checkpoint import restore_params
from mmdiff.training.loop import train

CFG = Config(
    model=Model(network="vit_autoencoder", width=32, depth=1, patch=8, head_width=16),
    tokenizer=Tokenizer(quantizer="vq", codes=16, code_width=4),
    layout=Layout(markers=False, row_length=16),
    data=Data(source="shapes", generator=(("draw", 1.0),), vocabulary="bytes", size=64),
    optimizer=Optimizer(learning_rate=3e-3, warmup=2),
    training=Training(
        steps=6, batch_size=4, log_every=1, checkpoint_every=3, sample_every=6, validate_every=3, validation_rows=8
    ),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, train(CFG, folder)


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: float(r["loss"]).hex() for r in records if "loss" in r}


def test_a_run_is_validated_and_shown(run):
    folder, validation = run
    assert {"psnr", "codes_used", "code_bits", "bits_per_image"} <= set(validation)
    assert 0 < validation["codes_used"] <= 1 and validation["code_bits"] <= 4
    assert validation["bits_per_image"] == pytest.approx(16 * validation["code_bits"])
    assert (folder / "samples" / "0000006.png").is_file()


def test_a_resumed_run_has_the_same_bits(run, tmp_path):
    folder, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "6")  # as if it had been killed before that was written
    (copy / "metrics.jsonl").unlink()
    train(CFG, copy)
    assert sorted(lines(copy)) == [4, 5, 6]
    assert lines(copy) == {step: loss for step, loss in lines(folder).items() if step > 3}
    one, two = (restore_params(place / "checkpoints")[0] for place in (folder, copy))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_measured_by_the_evaluate_command(run, capsys):
    folder, _ = run
    assert main(["evaluate", str(folder), "--features", "random", "--count", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"psnr", "ssim", "bits_nominal", "codes_used", "code_bits", "bits_per_image", "image_accuracy", "frechet_random"}
    assert expected <= set(found) and not {"x_error", "caption_accuracy", "edit_accuracy", "write_accuracy"} & set(found)
    assert found["bits_nominal"] == 16 * 4 and found["protocol"]["quantizer"] == "vq"
    assert main(["evaluate", str(folder), "--metrics", "x_error"]) == 65
    assert "cannot be measured" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--steps", "4"]) == 2
    assert "draws nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("source", "name"), [("shapes", "image"), ("words", "write")])
def test_what_comes_back_is_read_as_drawings_are(source, name):
    """Of copies all is right, of another image's little."""
    changed = replaced(CFG, {"data.source": source, "layout.row_length": 32})
    exact = lambda given: evaluate(SimpleNamespace(cfg=changed, reconstruct=given), [f"{name}_accuracy"], count=12)
    assert exact(np.stack)[f"{name}_exact"] == 1
    assert exact(lambda images: np.roll(np.stack(images), 1, axis=0))[f"{name}_exact"] < 0.5


def test_a_tokenizer_is_no_model_and_a_model_no_tokenizer(run, tmp_path):
    folder, _ = run
    tokenizer = mmdiff.load_tokenizer(folder)
    image = np.zeros((32, 32, 3), np.uint8)
    assert tokenizer.decode(tokenizer.encode([image])).shape == (1, 32, 32, 3)
    with pytest.raises(DataError, match="load_tokenizer"):
        mmdiff.load(folder)
    with pytest.raises(ConfigError, match="is an image tokenizer"):
        Network.of(CFG, 300)
    (tmp_path / "config.json").write_text(Config().to_json())
    with pytest.raises(DataError, match="no tokenizer"):
        mmdiff.load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="holds no run"):
        mmdiff.load_tokenizer(tmp_path / "absent")


def test_peak_ratio_and_similarity_of_known_images():
    flat = np.full((16, 16, 3), 100, np.uint8)
    assert peak_ratio(flat, flat + 1) == pytest.approx(20 * np.log10(255))
    assert peak_ratio(flat, flat) == pytest.approx(10 * np.log10(255**2 / 0.01))
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    assert similarity(picture, picture) == pytest.approx(1, abs=1e-5)
    assert similarity(picture, rng.permutation(picture)) < 0.3
    # of two constant images only the first factor is not 1: (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2
    a, b = 100 / 255, 150 / 255
    assert similarity(flat, flat + 50) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-4)
