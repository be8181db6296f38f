"""The experiments on lossless input and discrete tokenizers: their images, their counting, their going on after a kill."""

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config_files import load_experiment
from mmdiff.data.probe_pictures import glyph_grid, read_glyphs
from mmdiff.tokenizers.network import TokenizerNetwork

FOLDER = Path(__file__).parents[1] / "experiments" / "lossless_vs_discrete"


@pytest.mark.parametrize("name", ["config", "vq", "simvq", "fsq", "lfq", "rotation", "continuous", "gan", "latents"])
def test_every_tokenizer_of_the_experiments_can_be_made(name):
    cfg = load_experiment(f"{FOLDER / 'tokenizers.py'}:{name}")
    params = jax.eval_shape(TokenizerNetwork.of(cfg).init, jax.random.key(0))
    assert ("discriminator" in params) == (name == "gan")


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
