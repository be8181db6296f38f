"""The experiments on lossless input and discrete tokenizers: their images, their counting, their going on after a kill."""

import json
import math
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure

from mmdiff.config_files import load_experiment, replaced
from mmdiff.data.batches import Batches
from mmdiff.data.probe_pictures import glyph_grid, read_glyphs
from mmdiff.data.sources import open_source, open_vocabulary
from mmdiff.layout import patchify
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.training.flops import training_flops

FOLDER = Path(__file__).parents[1] / "experiments" / "lossless_vs_discrete"
TOKENIZERS = ["config", "vq", "simvq", "fsq", "lfq", "rotation", "continuous", "convolutional", "gan", "latents"]
LARGER = ["vq_64", "fsq_64", "continuous_64"]


@pytest.mark.parametrize("name", TOKENIZERS + LARGER)
def test_every_tokenizer_of_the_experiments_can_be_made(name):
    cfg = load_experiment(f"{FOLDER / 'tokenizers.py'}:{name}")
    params = jax.eval_shape(TokenizerNetwork.of(cfg).init, jax.random.key(0))
    assert ("discriminator" in params) == (name == "gan")


@pytest.mark.parametrize("name", ["lavit", "lavit_fixed", "lavit_bidirectional", "seed", "seed_pairs"])
def test_tokenizers_on_a_frozen_encoder_can_be_made(name):
    cfg = load_experiment(f"{FOLDER / 'semantic.py'}:{name}")
    cfg = replaced(cfg, {f"tokenizer.tower.{key}": value for key, value in STAND_IN.items()})
    params = jax.eval_shape(TokenizerNetwork.of(cfg, None, 300).init, jax.random.key(0))
    assert {"seed": "between", "seed_pairs": "words"}.get(name, "selector") in params
    if name != "seed_pairs":
        file = "lavit_arms" if name.startswith("lavit_") else "systems"
        system = load_experiment(f"{FOLDER / file}.py:{name}")
        assert system.layout.images == "next_code" and system.model.patch == cfg.model.patch
        assert system.data.tokenizer.endswith(f"/{name}")


@pytest.mark.parametrize("name", ["lavit", "seed", "seed_pairs"])
def test_a_frozen_encoder_of_a_tokenizer_counts_once(name):
    """One more layer of it, in operations: forwards alone."""

    def flops(depth):
        cfg = load_experiment(f"{FOLDER / 'semantic.py'}:{name}")
        tower = {f"tokenizer.tower.{key}": value for key, value in (STAND_IN | {"depth": depth}).items()}
        return training_flops(replaced(cfg, tower), 300)

    cfg = load_experiment(f"{FOLDER / 'semantic.py'}:{name}")
    layer = 2 * 65 * (4 * 192 * 192 + 2 * 192 * 384 + 2 * 65 * 192)  # an image a row
    assert flops(5) - flops(4) == cfg.training.batch_size * layer


@pytest.mark.parametrize("file", ["systems", "orders", "lavit_arms"])
def test_every_system_of_the_experiments_can_be_made(file):
    found = runpy.run_path(str(FOLDER / f"{file}.py"))
    made = [
        load_experiment(f"{FOLDER / file}.py:{arm}") for arm in (*found["ARMS"], *(["pixels"] if file == "systems" else []))
    ]
    assert len({cfg.name for cfg in made}) == len(made)
    assert {cfg.training.steps for cfg in made} == {800}


@pytest.mark.parametrize("name", ["raw", "pixels"])
def test_rows_of_the_systems_take_their_documents(name):
    cfg = replaced(load_experiment(f"{FOLDER / 'systems.py'}:{name}"), {"data.size": 300})
    vocabulary = open_vocabulary(cfg, open_source(cfg, "train"))
    for split in ("train", "validation"):
        assert Batches(open_source(cfg, split), vocabulary, cfg, learn=split == "train").rows_per_epoch() > 0


def test_arms_of_lavit_differ_in_one_thing_each():
    lavit, regression, fixed, _, continuous = (
        load_experiment(f"{FOLDER / 'lavit_arms.py'}:{arm}") for arm in runpy.run_path(str(FOLDER / "lavit_arms.py"))["ARMS"]
    )
    assert replaced(regression, {"layout.images": "next_code", "name": "lavit"}) == lavit
    assert replaced(fixed, {"data.tokenizer": lavit.data.tokenizer, "name": "lavit"}) == lavit
    assert continuous.front_end.init == lavit.data.tokenizer and continuous.training == lavit.training
    assert (continuous.model, continuous.optimizer) == (lavit.model, lavit.optimizer)


STAND_IN = {"side": 32, "patch": 4, "width": 192, "hidden": 384, "depth": 4, "heads": 6, "embedding": 64}


def test_images_of_known_entropy_are_counted_and_a_selector_that_does_not_care_is_found_out(monkeypatch):
    selector = ran("selector.py", monkeypatch)
    selector["interval"].__globals__["DRAWS"] = 100
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels, told = selector["drawn"](rng)
        plain = np.array([(cell == selector["GREY"]).all() for cell in patchify(pixels, 8)])
        np.testing.assert_array_equal(plain, ~told)
    assert selector["entropy"](np.arange(16) < 1) == pytest.approx(math.log2(11 * 16 * 2**4))  # one cell: which, and what
    assert selector["entropy"](np.zeros(16)) == pytest.approx(math.log2(11))  # there is one such image

    def record(shares, entropies):
        of = {"shares": shares.tolist(), "share": shares.mean(), "of_cells_with_bits": 0.8, "of_plain_cells": 0.1}
        of["correlation"] = selector["rank_correlation"](shares, entropies)
        flat = of | {"shares": rng.random(len(shares)).tolist(), "correlation": 0.0}
        return {"trained": of, "untrained": flat, "entropies": entropies.tolist()}

    entropies = rng.random(200) * 300
    good = record(entropies / entropies.mean() / 3 + 0.01 * rng.random(200), entropies)
    text, holds = selector["report"]([good, good])
    assert holds and "DOES NOT HOLD" not in text
    careless = record(np.full(200, 1 / 3) + 0.01 * rng.random(200), entropies)
    text, holds = selector["report"]([careless])
    assert not holds and "DOES NOT HOLD: rank correlation at least 0.6" in text
    text, holds = selector["report"]([good | {"untrained": good["trained"]}])
    assert not holds and "DOES NOT HOLD: not so before training" in text


@pytest.fixture(scope="module")
def cliff():
    return runpy.run_path(str(FOLDER / "cliff.py"))


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_cells_are_those_of_the_generator_and_read_back(cliff, bits):
    symbols = np.random.default_rng(bits).integers(0, 2**bits, 50)
    images = np.asarray(cliff["cells"](jnp.asarray(symbols), bits))
    expected = np.stack([glyph_grid(np.array([[s]]), bits, 8) for s in symbols])
    np.testing.assert_allclose((images + 1) * 127.5, expected, atol=1e-4)
    assert cliff["read"](jnp.asarray(images), bits).tolist() == symbols.tolist()
    noisy = images + np.random.default_rng(0).normal(0, 2.0, images.shape)
    assert cliff["read"](jnp.asarray(noisy), bits).tolist() != symbols.tolist()
    levels = np.rint((noisy.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    both = np.asarray(cliff["read"](jnp.asarray(levels / 127.5 - 1), bits)), [read_glyphs(x, bits, 8)[0, 0] for x in levels]
    assert (both[0] == both[1]).mean() > 0.9  # equal but for means that lie on the edge


def test_the_bound_is_counted_right_and_a_run_goes_on(cliff, tmp_path, monkeypatch, capsys):
    arguments = ["--workdir", str(tmp_path), "--arms", "FSQ 4x4", "--seeds", "2", "--steps", "20", "--entropies", "8"]
    monkeypatch.setattr(sys, "argv", ["cliff.py", *arguments])
    assert cliff["main"]() == cliff["main"]() == 0
    told = capsys.readouterr()
    assert told.err.count("FSQ 4x4, H = 8:") == 1  # the second time it was there
    (found,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert found["bound"] == 2**-4 and found["capacity"] == 4 and max(found["codes_seen"]) <= 16
    assert told.out.count("| FSQ 4x4 | 4.0 |") == 2 and "ABOVE" not in told.out
    broken = found | {"recovered": [0.9], "obeys": False}
    assert "ABOVE THE BOUND" in cliff["table"]([broken])


def test_the_input_layer_gives_back_what_its_width_can_hold():
    module = runpy.run_path(str(FOLDER / "input_layer.py"))
    wide, narrow = (
        module["line"](
            module["RawPatches"](module["config"].Model(patch=2, width=width, lossless=False), module["nnx"].Rngs(params=0)),
            np.random.default_rng(0).integers(0, 256, (4, 12)).astype(np.uint8),
            module["patch_cells"](2, 2),
            2,
            width,
        )
        for width in (24, 8)
    )
    assert wide["float32"] == 1.0 and narrow["float32"] < 0.5


def ran(name, monkeypatch):
    """The names of an experiment, run as a script would be: with its folder at hand."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / name))


def test_rows_of_known_entropy_hold_the_cells(monkeypatch, tmp_path):
    entropy = ran("entropy.py", monkeypatch)
    symbols = np.array([5, 200, 77])
    rows = entropy["rows_of"](entropy["cells"](jnp.asarray(symbols), 8))
    for row, symbol in enumerate(symbols):
        pixels = np.asarray(rows.patches)[row][rows.is_patch[row]].reshape(8, 8, 3)
        np.testing.assert_array_equal(pixels, glyph_grid(np.array([[symbol]]), 8, 8))
    assert rows.image_weight.sum() == pytest.approx(3)
    measured = []
    entropy["main"].__globals__["measure"] = lambda bits, *_: (
        measured.append(bits) or {"entropy": bits, "found": [7.0], "stderr": [0.01], "as_claimed": bits < 8}
    )
    for wanted, ended in (("4", 0), ("8", 1), ("8", 1)):
        monkeypatch.setattr(sys, "argv", ["entropy.py", "--workdir", str(tmp_path), "--entropies", wanted])
        assert entropy["main"]() == ended
    assert measured == [4, 8]  # what was finished is not done again


@pytest.mark.parametrize("script", ["all.sh", "systems.sh"])
def test_scripts_run_commands_that_there_are(tmp_path, script):
    """With something else in place of mmdiff and python, which writes down what it is asked for."""
    here = tmp_path / "experiments" / FOLDER.name
    here.mkdir(parents=True)
    for name in (script, "lanes.sh"):
        (here / name).write_bytes((FOLDER / name).read_bytes())
    for name in ("mmdiff", "python"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $@" >> {tmp_path}/calls\n')
        (tmp_path / name).chmod(0o755)

    def run():
        environment = os.environ | {"BIN": str(tmp_path), "WORDS": "words", "FACES": "faces"}
        done = subprocess.run(["bash", here / script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("all in 0 minutes"), done.stderr
        return (tmp_path / "calls").read_text().splitlines()

    calls = run()
    assert len(calls) > 10 and run() == calls  # the second time all of it is done
    for call in calls:
        program, *words = call.split()
        file, _, name = words[0 if program == "python" else 1].partition(":")
        text = (FOLDER.parents[1] / file).read_text()
        assert program == "python" or name in runpy.run_path(str(FOLDER.parents[1] / file))
        options = [word for word in words if word.startswith("--")]
        assert words[-1] != "--arms" and (program != "python" or all(f'"{option}"' in text for option in options)), call


class Coarse:
    """A tokenizer by hand: one code per image, the mean level of all its pixels."""

    size, codes, bits, grid = (16, 16), 256, 8.0, (1, 1)

    def encode(self, images):
        return np.asarray([[int(np.mean(image))] for image in images], np.int32)

    def reconstruct(self, images):
        return np.stack([np.full((16, 16, 3), code[0], np.uint8) for code in self.encode(images)])


def test_rates_are_counted_and_lossless_files_are_exact(monkeypatch):
    rate = ran("rate.py", monkeypatch)
    rng = np.random.default_rng(0)
    real = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(4)]
    rows = {row["name"]: row for row in rate["by_codecs"](real)}
    assert (
        rows["PNG"]["bits"] > 16 * 16 * 24 and rows["WebP lossless"]["bits"] > 0.95 * 16 * 16 * 24
    )  # noise has no shorter form
    assert rows["JPEG 5"]["bits"] < rows["JPEG 95"]["bits"] and rows["JPEG 5"]["psnr"] < rows["JPEG 95"]["psnr"] < np.inf
    flat = [np.full((16, 16, 3), level, np.uint8) for level in (0, 0, 10, 200)]
    row = rate["by_tokenizer"](Coarse(), flat, None)
    assert (row["nominal"], row["entropy"], row["used"]) == (8.0, pytest.approx(1.5), 3 / 256) and row["psnr"] > 67
    longer = Coarse()
    longer.grid, longer.bits = (1, 4), 32.0  # of which every image has one
    assert rate["by_tokenizer"](longer, flat, None) == row
    assert "| x | 8 | 2 |  | 1% |" in rate["lines"]("set", [], [{"name": "x"} | row])


def test_drift_counts_changed_codes(monkeypatch):
    module = ran("drift.py", monkeypatch)

    class Fading(Coarse):
        def reconstruct(self, images):
            return np.stack([np.full((16, 16, 3), max(code[0] - 10, 0), np.uint8) for code in self.encode(images)])

    flat = [np.full((16, 16, 3), level, np.uint8) for level in (100, 45)]
    still, fading = (module["drift"](tokenizer, flat, 3) for tokenizer in (Coarse(), Fading()))
    assert still["flips"] == [0, 0, 0] and min(still["psnr"]) > 67
    assert fading["flips"] == [0.0, 1.0, 1.0] and fading["psnr"] == sorted(fading["psnr"], reverse=True)


@pytest.mark.parametrize("name", ["shapes", "words", "probes"])
def test_held_out_images_are_of_the_size_asked_for(name, monkeypatch):
    images = ran("images.py", monkeypatch)
    found = images["held_out"](name, (32, 32), 3)
    assert [image.shape for image in found] == [(32, 32, 3)] * 3 and (found[0] != found[1]).any()
    with pytest.raises(images["ConfigError"], match="unknown images"):
        images["held_out"]("faces", (32, 32), 3)


@pytest.fixture
def readers(monkeypatch):
    return ran("readers.py", monkeypatch)


def test_examples_hold_what_was_asked_and_what_the_tokenizer_left(readers):
    documents = readers["held_out"](readers["QUESTIONS"], 3)
    assert len(documents) == 3 * 6 + 15
    plain, through = (readers["examples"](documents, tokenizer) for tokenizer in (None, TokenizerOf64()))
    np.testing.assert_array_equal(through.images, plain.images // 2)
    for index, document in enumerate(documents):
        shown = [image.pixels for image in document.images]
        np.testing.assert_array_equal(plain.images[index], shown * (2 // len(shown)))
        signs = "".join(readers["SIGNS"][sign] for sign in plain.answer[index]).strip()
        assert signs == (document.extra["answer"] if document.extra["kind"] != "same" else document.extra["answer"][0])
    assert set(plain.size[plain.kind == 0]) >= {1, 2} and not plain.size[plain.kind > 0].any()


def test_readers_are_shown_what_stands_out(readers):
    """Against what the generator says: dots counted, an odd pixel found, the colour of a swatch taken from its middle."""
    documents = readers["held_out"](["count", "odd", "colour"], 20)
    images, answers = np.stack([d.images[0].pixels for d in documents]), [d.extra["answer"] for d in documents]
    ground = np.median(images, axis=(1, 2), keepdims=True)
    figure = jnp.asarray(np.linalg.norm(images - ground, axis=-1) / 127.5, jnp.float32)
    assert np.asarray(readers["number"](figure))[:20].tolist() == [int(answer) for answer in answers[:20]]
    top, bottom, left, right = (np.asarray(at)[20:40] for at in readers["outline"](figure))
    assert [f"{row} {col}" for row, col in zip(top, left, strict=True)] == answers[20:40]
    assert (bottom - top == 1).all() and (right - left == 1).all()
    seen, middle = readers["window"](figure, jnp.asarray(images))
    assert [bytes(pixel).hex() for pixel in np.asarray(middle)[40:]] == answers[40:]
    size = readers["WINDOW"]
    assert seen.shape == (60, size, size) and 0.95 < seen[20:40].max() <= 1
    assert seen[20:40].min() > 0.25  # the odd pixel fills its window, interpolated
    blank = readers["window"](jnp.zeros((1, 64, 64)), jnp.zeros((1, 64, 64, 3), jnp.uint8))
    assert np.isfinite(blank[0]).all() and int(readers["number"](jnp.zeros((1, 64, 64)))[0]) == 0


def test_a_reader_learns_what_stands_still_there_and_right_answers_are_counted(readers):
    source = readers["Probes"](0, 32, 64, (("ocr", 1.0),))
    data = readers["examples"]([source[i] for i in range(32)])
    readers["trained"].__globals__["BATCH"] = 16
    params = readers["trained"](data, 80, 0)
    found = readers["asked"](params, data)
    assert found["ocr"] > 0.9  # by heart
    other = data._replace(answer=data.answer[::-1])
    assert readers["asked"](params, other)["ocr"] < 0.3
    sizes = np.array([(data.size == size).mean() for size in range(1, 6)])
    np.testing.assert_allclose(sizes @ [found[f"ocr {size}"] for size in range(1, 6)], found["ocr"], rtol=1e-6)


def test_readers_are_trained_asked_and_kept(readers, monkeypatch, tmp_path, capsys):
    readers["main"].__globals__["mmdiff"] = types.SimpleNamespace(load_tokenizer=lambda path: TokenizerOf64())
    arguments = ["--workdir", str(tmp_path), "--tokenizers", "coarse", "--kinds", "ocr", "--seeds", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["readers.py", *arguments, "--count", "4", "--examples", "20"])
    assert readers["main"]() == readers["main"]() == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["front_end"], r["reader"]) for r in records] == [
        ("raw patches", "fixed"),
        ("raw patches", "own"),
        ("coarse", "fixed"),
        ("coarse", "own"),
    ]
    assert all(0 <= share <= 1 for r in records for share in r["right"].values())
    told = capsys.readouterr().out
    raw_fixed, raw_own, fixed, own = (r["right"]["ocr"] for r in records)
    row = f"| ocr | {raw_own:.3f}, fixed {raw_fixed:.3f} | {own:.3f}, fixed {fixed:.3f} |"
    assert told.count("| question | raw patches | coarse |") == told.count(row) == 2
    monkeypatch.setattr(sys, "argv", ["readers.py", *arguments[:-1], "3", "--count", "4", "--examples", "20"])
    assert readers["main"]() == 0  # other steps: other readers, and what was there stays
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["steps"] for r in records] == [2] * 4 + [3] * 4 and len(list(tmp_path.glob("fixed-ocr-*.npz"))) == 2
    assert capsys.readouterr().out.count("| ocr 1 |") == 1
    monkeypatch.setattr(sys, "argv", ["readers.py", *arguments[:4], "--kinds", "letter"])
    with pytest.raises(SystemExit):
        readers["main"]()
    assert "--kinds letter needs --words FOLDER" in capsys.readouterr().err
    arguments[5:6] = ["letter", "--words", str(words(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["readers.py", *arguments, "--count", "4", "--examples", "20"])
    assert readers["main"]() == 0 and "| letter | " in capsys.readouterr().out


class TokenizerOf64:
    """Halves the levels."""

    def reconstruct(self, images):
        return np.stack([image // 2 for image in images])


def test_arms_are_compared_on_equal_terms(monkeypatch):
    joint = ran("joint.py", monkeypatch)
    file = joint["HERE"] / "systems.py"
    claims, arms = joint["systems"](file)
    assert claims.startswith("Claims, before any was run") and len(claims.splitlines()) == 1
    settings = {arm: joint["settings"](file, arm, 1, 32) for arm in arms}
    one = settings["raw"]
    for arm, cfg in settings.items():
        assert (cfg.training.seed, cfg.training.steps, cfg.training.checkpoint_every, cfg.training.keep_every) == (1, 32, 2, 2)
        assert (cfg.model.width, cfg.model.depth, cfg.optimizer) == (one.model.width, one.model.depth, one.optimizer), arm
        assert cfg.layout.row_length == one.layout.row_length and cfg.data.generator == one.data.generator
    assert {cfg.layout.images for cfg in settings.values()} == {
        "denoised",
        "read",
        "next_code",
        "masked_code",
        "next_embedding",
    }
    low, high = joint["interval"]([0.5, 0.7, 0.6], [0.01] * 3)
    assert 0.5 < low < 0.56 and 0.64 < high < 0.7
    assert joint["interval"]([0.5], [0.0]) == (0.5, 0.5)
    cost = {"parameters": 10, "positions": 5.0, "flops": 1e9, "flops_with_tokenizer": 2e9}
    records = [
        {"arm": "raw", "seed": seed, "share": share, "metrics": {"image_accuracy": share * (1 + seed), "code_bits": 1.0}} | cost
        for seed in range(2)
        for share in joint["SHARES"]
    ]
    found = joint["summary"](records, "image_accuracy")
    assert found["raw", 0.5][0] == 0.75 and ("read", 1.0) not in found
    assert "| raw | 10 | 1e+09 | 2e+09 |" in joint["table"](records) and "1.500 (" in joint["table"](records)
    assert joint["page"](records, claims).count("<svg") == 3


def test_the_picture_shows_the_results_that_are_there(monkeypatch, tmp_path):
    plots = ran("plots.py", monkeypatch)
    cell = {"arm": "VQ 256", "capacity": 8.0, "entropy": 12, "recovered": [0.05, 0.07], "bound": 0.0625}
    rate = {
        "words": {
            "tokenizers": [{"name": "vq", "nominal": 640.0, "entropy": 500.0, "psnr": 20.0}],
            "codecs": [{"name": "PNG", "bits": 9000.0, "header": 500, "psnr": float("inf")}]
            + [{"name": f"JPEG {q}", "bits": 5000.0 + q, "header": 4000, "psnr": 25.0 + q} for q in (5, 10)],
        }
    }
    shares = {"a": 0.9, "b": 0.2}
    right = [{"front_end": name, "reader": "own", "seed": 0, "right": {"odd": shares[name]}} for name in shares]
    drawn = {"image_accuracy": 0.5, "image_accuracy_stderr": 0.01}
    run = [{"arm": "raw", "seed": seed, "share": 1.0, "flops": 2e12, "metrics": drawn} for seed in (0, 1)]

    def panel(draw, found):
        axes = Figure().subplots()
        draw(axes, found)
        return axes

    line = panel(plots["cliff"], [cell]).lines[0]
    assert list(line.get_xdata()) == [4.0] and list(line.get_ydata()) == [pytest.approx(0.06)]
    assert [bar.get_width() for bar in panel(plots["ledger"], rate).patches] == [640.0, 500.0, 9000.0]
    assert [list(line.get_xdata()) for line in panel(plots["rate"], rate).lines[::2]] == [[1005.0, 1010.0], [500.0, 640.0]]
    assert [bar.get_height() for bar in panel(plots["readers"], right).patches] == [0.9, 0.2]
    assert list(panel(plots["curves"]("image_accuracy"), run).lines[0].get_ydata()) == [0.5]
    (tmp_path / "rate.json").write_text(json.dumps(rate))
    plots["draw"](tmp_path, tmp_path / "all.png")  # most files are missing
    assert (tmp_path / "all.png").stat().st_size > 10_000


def words(folder):
    """Two words to learn from and one held out, wider and narrower than high."""
    lines, shown = [], (("Bread", "train", 40), ("7up", "train", 20), ("?", "train", 30), ("Tea", "test", 9))
    for number, (text, split, width) in enumerate(shown):
        pixels = np.random.default_rng(number).integers(0, 256, (20, width, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"segments": [{"image": f"{number}.png"}, {"text": text}], "split": split}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


def test_photographed_words_are_asked_for_their_first_sign(monkeypatch, tmp_path):
    photographed = ran("photographed.py", monkeypatch)
    folder = words(tmp_path)
    (test,) = photographed["held_out"](folder)
    assert test.extra == {"kind": "letter", "answer": "t"}
    narrow = test.images[0].pixels  # its last column goes on to the right
    assert narrow.shape == (64, 64, 3) and np.abs(np.diff(narrow[:, 40:].astype(int), axis=1)).max() == 0
    learnt = photographed["examples"](folder, 50)
    assert {document.extra["answer"] for document in learnt} == {"b", "7"}  # not "?", nor what is held out
    assert all(a == b for a, b in zip(learnt, photographed["examples"](folder, 50), strict=True))
    assert len({document.images[0].pixels.tobytes() for document in learnt}) == 50


def test_alterations_keep_the_middle_and_bring_nothing_from_outside(monkeypatch):
    photographed = ran("photographed.py", monkeypatch)
    sizes = {"TURN": 0.2, "SHEAR": 0.2, "STRETCH": 0.2, "MOVE": 0.0, "CONTRAST": 0.0}
    photographed["altered"].__globals__.update(sizes)
    plain = np.full((64, 64, 3), 200, np.uint8)
    plain[28:36, 28:36] = 90
    for seed in range(20):
        made = np.asarray(photographed["altered"](PIL.Image.fromarray(plain), np.random.default_rng(seed))).astype(int)
        edge, middle = made[0, 0, 0], made[31, 31, 0]
        assert abs(abs(edge - middle) - 110) <= 2  # moved up or down, or turned light to dark, all at once
        assert made[0].std() < 1 and made[-1].std() < 1


def test_the_report_says_what_is_lost_won_and_open(monkeypatch, tmp_path):
    report = ran("report.py", monkeypatch)
    near, far = [(0.50, 0.01), (0.52, 0.01), (0.51, 0.01)], [(0.80, 0.01), (0.82, 0.01), (0.81, 0.01)]
    low, high = report["gain"](far, near, 1)
    assert 0.27 < low < 0.3 < high < 0.33 and report["gain"](far, near, -1)[1] < 0
    assert report["gain"](near, near, 1)[0] < 0 < report["gain"](near, near, 1)[1]
    right = [
        {"front_end": name, "reader": reader, "seed": seed, "count": 300, "right": {"odd": share, "same": 0.9}}
        for name, reader, share in (("raw patches", "own", 0.95), ("vq", "own", 0.3), ("vq", "fixed", 0.99))
        for seed in range(3)
    ]
    shared = {"count": 200, "steps": 800, "parameters": 10, "positions": 5.0, "flops": 1e9, "flops_with_tokenizer": 2e9}
    drawn = {"raw": 0.8, "vq_ar": 0.9, "masked": 0.8}
    runs = [
        shared | {"arm": arm, "seed": seed, "share": 1.0, "metrics": {"image_accuracy": value, "image_accuracy_stderr": 0.01}}
        for arm, value in drawn.items()
        for seed in range(3)
    ]
    found = [*report["of_readers"](right), *report["of_joint"](runs)]
    verdicts = {(c.experiment, c.measure, c.what): c.verdict for c in found}
    assert verdicts == {
        ("E4", "reading: odd", "vq"): "loses",
        ("E4", "reading: same", "vq"): "open",
        ("E5", "attributes drawn as asked, at the end", "vq_ar"): "wins",
        ("E5", "attributes drawn as asked, at the end", "masked"): "open",
    }
    few = [row for row in runs if row["seed"] < 2]  # too few to say how far seeds lie apart
    assert {c.verdict for c in report["of_joint"](few)} == {"open"}
    for name, records in (("readers", right), ("joint", runs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    page = report["page"](tmp_path)
    assert "1 of 4 comparisons" in page and "cliff/results.jsonl" in page and page.count("<table>") == 5
