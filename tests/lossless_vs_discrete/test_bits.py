"""Bits of images: known entropy, the bound, what tokenizers and files take, what is lost in rounds."""

import json
import math
import runpy
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.data.probe_pictures import glyph_grid, read_glyphs
from mmdiff.layout import patchify

from . import FOLDER


def test_images_of_known_entropy_are_counted_and_a_selector_that_does_not_care_is_found_out(ran):
    selector = ran("selector.py")
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
        of["correlation"] = of["correlation_of_chances"] = selector["rank_correlation"](shares, entropies)
        of["chances"] = of["shares"]
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


def test_rows_of_known_entropy_hold_the_cells(ran, monkeypatch, tmp_path):
    entropy = ran("entropy.py")
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


class Coarse:
    """A tokenizer by hand: one code per image, the mean level of all its pixels."""

    size, codes, bits, grid = (16, 16), 256, 8.0, (1, 1)

    def encode(self, images):
        return np.asarray([[int(np.mean(image))] for image in images], np.int32)

    def reconstruct(self, images):
        return np.stack([np.full((16, 16, 3), code[0], np.uint8) for code in self.encode(images)])


def test_rates_are_counted_and_lossless_files_are_exact(ran):
    rate = ran("rate.py")
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


def test_drift_counts_changed_codes(ran):
    module = ran("drift.py")

    class Fading(Coarse):
        def reconstruct(self, images):
            return np.stack([np.full((16, 16, 3), max(code[0] - 10, 0), np.uint8) for code in self.encode(images)])

    flat = [np.full((16, 16, 3), level, np.uint8) for level in (100, 45)]
    still, fading = (module["drift"](tokenizer, flat, 3) for tokenizer in (Coarse(), Fading()))
    assert still["flips"] == [0, 0, 0] and min(still["psnr"]) > 67
    assert fading["flips"] == [0.0, 1.0, 1.0] and fading["psnr"] == sorted(fading["psnr"], reverse=True)


@pytest.mark.parametrize("script", ["rate.py", "drift.py"])
def test_what_was_found_of_one_tokenizer_stands_beside_that_of_another(script, ran, tmp_path, monkeypatch, capsys):
    module, kept, seen = ran(script), tmp_path / "kept.json", []
    monkeypatch.setattr("mmdiff.load_tokenizer", lambda path: seen.append(path.name) or Coarse())
    for name, images in (("one", "shapes"), ("two", "shapes"), ("one", "words")):
        told = ["--tokenizers", f"runs/{name}", "--images", images, "--count", "2", "--into", str(kept)]
        monkeypatch.setattr(sys, "argv", [script, *told, *(["--rounds", "1"] if script == "drift.py" else [])])
        assert module["main"]() == 0
    found = json.loads(kept.read_text())
    names = lambda of: [row["name"] for row in of["tokenizers"]]
    of = {name: list(of) for name, of in found.items()} if script == "drift.py" else {k: names(v) for k, v in found.items()}
    expected = {"one": ["shapes", "words"], "two": ["shapes"]}, {"shapes": ["one", "two"], "words": ["one"]}
    assert of == expected[script == "rate.py"] and seen == ["one", "two", "one"]
    assert capsys.readouterr().out.count("| two |") == 2  # in the second table and in the third


@pytest.mark.parametrize("name", ["shapes", "words", "probes"])
def test_held_out_images_are_of_the_size_asked_for(name, ran):
    images = ran("images.py")
    found = images["held_out"](name, (32, 32), 3)
    assert [image.shape for image in found] == [(32, 32, 3)] * 3 and (found[0] != found[1]).any()
    with pytest.raises(images["ConfigError"], match="unknown images"):
        images["held_out"]("faces", (32, 32), 3)
