"""E7 and the language model that stands in: one command each, going on where it stopped."""

import copy
import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mmdiff.in_context.language import WORDS, Language, load_language, read_words
from mmdiff.pretrained.clip import CLIP
from mmdiff.pretrained.load import save_module
from mmdiff.tokenizers.model import Tokenizer as Trained
from mmdiff.tokenizers.network import TokenizerNetwork

from .tiny import SIZES, TOWERS, experiment, language, pieces, random_like

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def copying():
    return runpy.run_path(str(FOLDER / "stand_ins" / "copying_lm.py"))


def repeated(model) -> float:
    """Share of random tokens foretold when they come for the second time."""
    once = np.random.default_rng(0).integers(3, 512, (4, 30))
    ids = np.concatenate([once, once], axis=1)
    found = np.asarray(model.logits(model(model.embed(ids))[0]).argmax(-1))
    return float((found[:, 30:-1] == ids[:, 31:]).mean())


def test_heads_set_by_hand_copy_and_answer_as_examples_like_the_question_do(copying):
    fresh = copying["fresh"](0)
    which = Language(fresh, read_words(copying["made_words"](512, copying["sentences"](500)), "here"))
    begun = copying["begun"](0, which)
    assert repeated(begun) > 0.5 and repeated(fresh) < 0.1
    named = lambda model: copying["named"](Language(model, which.processor), 128, 2)
    assert named(begun) > 0.7 and named(fresh) < 0.6


def test_lessons_teach_what_can_be_known(copying):
    which = language()
    lessons = copying["Lessons"](which, ["a red circle"], 0)
    instruction, pairs, learnt = lessons.mapping()
    for place, (pair, counts) in enumerate(zip(pairs, learnt, strict=True)):
        assert counts == (pair in pairs[:place])  # only what stood there before
    ids, weights = lessons.filled(instruction, pairs, learnt)
    assert len(ids) == len(weights) and sum(w == 1 for w in weights) == 2 * sum(learnt)
    assert ids[-2:] == list(pairs[-1].wanted) and weights[-2:] == [1, 1]
    rows, counted = lessons.rows(2, 64)
    assert rows.shape == counted.shape == (2, 65) and 0 < counted.mean() < 1


def test_one_command_trains_it_and_it_is_loaded_like_the_real_one(copying, tmp_path, monkeypatch, capsys):
    sizes = copying["CONFIG"] | {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 2}
    copying["main"].__globals__.update(CONFIG=sizes, TOKENS=64, PHASES=((1.0, 32),), TESTED=2)
    monkeypatch.setattr(sys, "argv", ["copying_lm.py", "--out", str(tmp_path), "--steps", "2"])
    assert copying["main"]() == 0
    loaded, told = load_language(tmp_path), capsys.readouterr().out
    assert all(f"{name}: 0." in told or f"{name}: 1." in told for name in ("trained", "as it began", "untrained"))
    began = nnx.to_pure_dict(nnx.state(copying["begun"](0, loaded), nnx.Param))
    moved = jax.tree.map(lambda a, b: a.shape == b.shape and bool((a != b).any()), began, loaded.params)
    assert jax.tree.all(moved)


def test_words_are_made_by_one_command(tmp_path, monkeypatch, capsys):
    """With towers whose config.json leaves out what is usual."""
    script = runpy.run_path(str(FOLDER / "frozen_lm" / "words.py"))
    cfg = copy.deepcopy(TOWERS)
    del cfg["text_config"]["max_position_embeddings"]  # 77
    made = CLIP(cfg, nnx.Rngs(0))
    random_like(made, 2)
    save_module(made, tmp_path / "towers", cfg | {"words": "bytes"})
    which = language()
    sizes = SIZES | {"num_hidden_layers": 2, "vocab_size": 300, "tie_word_embeddings": True}
    save_module(nnx.merge(which.graph, which.params), tmp_path / "language", sizes)
    (tmp_path / "language" / WORDS).write_bytes(pieces(300))
    arguments = ["--language", tmp_path / "language", "--towers", tmp_path / "towers", "--out", tmp_path / "words"]
    monkeypatch.setattr(sys, "argv", ["words.py", *map(str, arguments), "--images", "8", "--templates", "a {}", "--least", "0"])
    assert script["main"]() == 0
    assert "300 local and " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["words.py", *map(str, [*arguments, "--towers", tmp_path / "language"])])
    assert script["main"]() == 65 and "not supported: text_config=None" in capsys.readouterr().err


def test_shared_tokens_name_what_is_like_the_question(copying):
    most_shared = runpy.run_path(str(FOLDER / "frozen_lm" / "tasks.py"))["most_shared"]
    examples = [(["a red", " circle"], "dog"), (["a blue", " circle"], "cat"), (["a red", " cross"], "dog")]
    rng = np.random.default_rng(0)
    assert most_shared(language(), ["cat", "dog"], examples, [" red"], rng) == "dog"
    alike = [(["a red"], "dog"), (["a red"], "cat")]
    drawn = {most_shared(language(), ["cat", "dog"], alike, ["a red"], rng) for _ in range(20)}
    assert drawn == {"cat", "dog"}  # neither more than the other


def test_holes_are_filled_with_the_last_token_shown():
    repeated = runpy.run_path(str(FOLDER / "frozen_lm" / "tasks.py"))["repeated"]
    tokens, holes = np.array([[5, 6, 7, 8], [5, 6, 7, 8]]), np.array([[0, 1, 1, 0], [1, 1, 0, 1]], bool)
    np.testing.assert_array_equal(repeated(tokens, holes), [[5, 5, 5, 8], [-1, -1, 7, 7]])


def test_tasks_are_measured_once_and_told_in_tables(tmp_path, monkeypatch, capsys):
    cfg = experiment(tmp_path)
    network = TokenizerNetwork.of(cfg)
    params = jax.jit(network.init)(jax.random.key(0)) | network.given()
    which = language()
    sizes = SIZES | {"num_hidden_layers": 2, "vocab_size": 300, "tie_word_embeddings": True}
    save_module(nnx.merge(which.graph, which.params), tmp_path / "language", sizes)
    (tmp_path / "language" / WORDS).write_bytes(pieces(300))
    script = runpy.run_path(str(FOLDER / "frozen_lm" / "tasks.py"))
    script["main"].__globals__["POOL"] = 60
    monkeypatch.setattr("mmdiff.load_tokenizer", lambda path: Trained(cfg, params))
    arguments = ["--language", tmp_path / "language", "--words", tmp_path / "words.safetensors", "--tokenizer", "here"]
    arguments += ["--workdir", tmp_path / "out", "--images", 11, "--episodes", 4, "--lora-steps", 1, "--shown", 2]
    only = [
        "inpainting / faithful",
        "inpainting / no leak / vote",
        "colour, 2 ways, 1 shots, own names / trained",
        "colour, 2 ways, 1 shots, own names / shared",
        "questions / shuffled",
    ]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *map(str, arguments), "--only", *only])
    assert script["main"]() == script["main"]() == 0
    told = capsys.readouterr()
    assert told.err.count("inpainting / faithful / vote:") == 1  # the second time it was there
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())}
    assert len(rows) == 7
    vote, leak = (rows[f"inpainting / {protocol} / vote"]["accuracy"] for protocol in ("faithful", "no leak"))
    assert vote > 0.95 and leak < vote
    assert rows["inpainting / faithful / trained"]["accuracy"] < 0.5  # a random model copies nothing
    classes = rows["colour, 2 ways, 1 shots, own names / trained"]
    assert classes["chance"] == 0.5 and classes["low"] <= classes["accuracy"] <= classes["high"]
    assert told.out.count(f"| inpainting | {vote:.3f} |") == 2
    names = script["other_names"](which, "")
    assert all(len(which.encode(name)) == 1 for name in names)
    assert set(script["other_names"](which, names[0])) <= set(names) - {names[0]}
    params["codebook"]["global"] = params["codebook"]["global"] + 1
    assert script["main"]() == 65 and "was trained with other words" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["tasks.py", *map(str, arguments), "--images", "5"])
        script["main"]()
