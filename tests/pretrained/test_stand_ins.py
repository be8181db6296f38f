"""Stand-ins for pretrained parts: trained, written and read back as the real thing."""

import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mmdiff.evaluation import judge
from mmdiff.evaluation.phrases import classes
from mmdiff.pretrained.clip import load_clip
from mmdiff.pretrained.encoder import normalised

FOLDER = Path(__file__).parents[2] / "experiments" / "stand_ins"


@pytest.fixture(scope="module")
def two_tower():
    script = runpy.run_path(str(FOLDER / "two_tower.py"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    script["TEXT"].update(small)
    script["VISION"].update(small)
    script["main"].__globals__.update(EXAMPLES=24, TESTED=8, BATCH=8)
    return script


def test_one_command_trains_it_and_it_is_loaded_like_the_real_one(two_tower, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["two_tower.py", "--out", str(tmp_path), "--steps", "2", "--patch", "16"])
    assert two_tower["main"]() == 0
    assert "of 8 unseen scenes find their caption" in capsys.readouterr().out
    images, _ = two_tower["scenes"](8, "test")
    again = two_tower["trained"](*two_tower["scenes"](24, "train"), 2, 0, two_tower["settings"](64, 16))
    model = load_clip(tmp_path)
    for one, two in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(one, two)  # the same seed, the same bytes
    vectors = model.embed_images(normalised(images, 64))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)


def test_equal_captions_are_one(two_tower):
    """Vectors that belong together agree wholly and all others are at right angles: with s = 10 the loss has a closed form."""

    class Perfect:
        log_scale = np.log(10.0)[None]

        def __init__(self, which):
            self.embed_images = self.embed_texts = lambda _: np.eye(3)[which]

    def loss_of(which, texts):
        return float(two_tower["loss_of"](Perfect(which), np.zeros((3, 64, 64, 3), np.uint8), np.array(texts)))

    pair = [[1, 2], [3, 4], [3, 4]]
    found = loss_of([0, 1, 1], pair)
    assert found == pytest.approx((np.log(1 + 2 * np.exp(-10)) + 2 * np.log(2 + np.exp(-10))) / 3, rel=1e-4)
    assert loss_of([0, 1, 2], [[1, 2], [3, 4], [5, 6]]) == pytest.approx(np.log(1 + 2 * np.exp(-10)), rel=1e-2)
    assert loss_of([0, 1, 2], pair) > 3  # told apart, though they say the same


def test_words_end(two_tower):
    ids = two_tower["as_bytes"]("ab")
    assert ids[:3].tolist() == [97, 98, 256] and (ids[2:] == 256).all()
    assert two_tower["as_bytes"]("x" * 500)[-1] == 256


def test_a_classifier_of_attributes_is_trained_and_judges_a_run_as_it_was_kept(tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(FOLDER / "attribute_classifier.py"))
    script["main"].__globals__.update(EXAMPLES=40, TESTED=8)
    file = tmp_path / "kept" / "attributes.npz"
    monkeypatch.setattr(sys, "argv", ["attribute_classifier.py", "--out", str(file), "--steps", "2"])
    assert script["main"]() == 0
    assert "8 unseen scenes: 0." in capsys.readouterr().out
    images, texts = script["scenes"](8, "test", 32)
    told, kept = classes(texts, script["GROUPS"]), judge.load(file)
    assert [len(group) for group in kept.groups] == [48] * 4 and (told < 48).sum(-1).min() >= 1
    again = judge.train(*script["scenes"](40, "train", 32), script["GROUPS"], steps=2)
    assert again.digest == kept.digest != judge.train(*script["scenes"](40, "train", 32), script["GROUPS"], steps=1).digest
    np.testing.assert_array_equal(again(images), kept(images))


@pytest.mark.parametrize(
    ("script", "given", "told"),
    [
        ("stand_ins/attribute_classifier.py", "--out x --steps 0", "--steps 0 must be at least 1"),
        ("stand_ins/attribute_classifier.py", "--out x --side 0", "image_size=0: shapes needs a multiple of 8"),
        ("stand_ins/copying_lm.py", "--out x --steps -1", "--steps -1 must be at least 1"),
        ("stand_ins/qformer.py", "--encoder x --out x --steps 0", "--steps 0 must be at least 1"),
        ("stand_ins/two_tower.py", "--out x --steps 0", "--steps 0 must be at least 1"),
        ("stand_ins/two_tower.py", "--out x --patch 0", "--patch 0 must be at least 1"),
        ("stand_ins/two_tower.py", "--out x --side -8", "image_size=-8: shapes needs a multiple of 8"),
        ("frozen_lm/words.py", "--language x --towers x --out x --images 0", "--images 0 must be at least 1"),
        ("frozen_lm/tasks.py", "--language x --words x --tokenizer x --workdir x --lora-steps 0", "--lora-steps 0 must be at"),
    ],
)
def test_counts_that_mean_nothing_are_told(script, given, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *given.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER.parent / script))["main"]()
    assert ended.value.code == 2 and f"error: {told}" in capsys.readouterr().err.replace("data.generator_", "")
