"""`mmdiff evaluate`: a table, one JSON object, and one line for every mistake."""

import dataclasses
import json

import jax
import numpy as np
import PIL.Image
import pytest

import mmdiff
from mmdiff.cli.evaluate import as_json, table
from mmdiff.evaluation import judge, ladder
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model

FAST = ("--metrics", "image_accuracy,x_error", "--count", "2", "--steps", "1")


def test_json_is_one_object_and_nothing_else(command, tmp_path):
    code, said, _ = command("evaluate", tmp_path, *FAST, "--json")
    result = json.loads(said)
    assert code == 0 and said.count("\n") == 1
    wanted = {"image_accuracy", "image_accuracy_stderr", "image_exact", "image_exact_stderr", "x_error", "protocol"}
    assert set(result) == wanted
    assert (result["protocol"]["steps"], result["protocol"]["split"]) == (1, "validation")
    assert command("evaluate", tmp_path, *FAST, "--json")[1] == said  # every seed is fixed


def test_table_has_a_line_per_number(command, tmp_path):
    code, said, beside = command("evaluate", tmp_path, *FAST)
    assert code == 0 and beside.startswith("protocol: ") and "solver unipc2, steps 1" in beside
    assert [line.split()[0] for line in said.splitlines()] == ["image_accuracy", "image_exact", "x_error"]


def test_likelihoods_and_phrases_are_measured_when_asked_for(command, tmp_path):
    arguments = ("--metrics", "text_bits_per_byte,image_bits_per_dim", "--phrases", "red|blue;circle", "--count", "2")
    code, said, _ = command("evaluate", tmp_path, *arguments, "--json")
    result = json.loads(said)
    assert code == 0
    assert {"text_bits_per_byte", "image_bits_per_dim", "phrase_accuracy_red", "phrase_majority_circle"} <= set(result)
    assert 0 < result["image_bits_per_dim"] < 9


def test_a_judge_that_was_kept_brings_its_phrases(command, tmp_path):
    pictures = [np.full((32, 32, 3), level, np.uint8) for level in (0, 200)]
    judge.train(pictures, ["a circle", "red"], [["circle"], ["red", "blue"]], steps=1).save(tmp_path / "judge.npz")
    asked = ("--metrics", "phrase_drawn", "--judge", tmp_path / "judge.npz", "--count", "2", "--steps", "1", "--json")
    code, said, _ = command("evaluate", tmp_path, *asked)
    result = json.loads(said)
    assert code == 0 and {"phrase_drawn", "phrase_drawn_red", "phrase_judge_circle"} <= set(result)
    assert result["protocol"]["judge"] == judge.load(tmp_path / "judge.npz").digest


def test_sets_of_images_are_compared_in_the_features_asked_for(command, tmp_path):
    asked = ("--metrics", "kid_patch_dct,density_coverage", "--features", "patch_dct", "--count", "6", "--steps", "1")
    code, said, _ = command("evaluate", tmp_path, *asked, "--json")
    result = json.loads(said)
    assert code == 0
    assert {"kid_patch_dct", "density_patch_dct", "coverage_patch_dct"} <= set(result)
    assert (result["protocol"]["generated"], len(result["protocol"]["features"]["patch_dct"]["hash"])) == (6, 16)


def test_what_is_not_a_number_is_null():
    assert as_json({"a": 0.5, "b": float("nan")}) == '{"a": 0.5, "b": null}'
    assert table({"a": 0.5, "a_stderr": 0.1}) == "a    0.5000  ± 0.1000"


MISTAKES = [
    (("--metrics", "imge_accuracy"), 2, "did you mean 'image_accuracy'"),
    (("--metrics", "read_accuracy"), 65, "cannot be measured on data.source='shapes'"),
    (("--metrics", "phrase_accuracy"), 65, "needs phrases"),
    (("--phrases", "a;;b"), 2, "empty group"),
    (("--judge", "judge.npz"), 2, "--judge is for --metrics phrase_drawn"),
    (("--metrics", "phrase_drawn", "--judge", "judge.npz", "--phrases", "red"), 2, "leave out --phrases"),
    (("--metrics", "phrase_drawn", "--judge", "absent.npz"), 65, "absent.npz holds no judge"),
    (("--count", "0"), 2, "--count 0"),
    (("--steps", "0"), 2, "steps=0"),
    (("--ladder", "--steps", "4"), 2, "leave out --steps"),
    (("--weak", "runs/other"), 2, "--weak is for --autoguidance"),
    (("--few", "runs/few"), 2, "--few is for --ladder"),
    (("--solver", "euler"), 2, "invalid choice: 'euler'"),
    (("--features", "inception"), 2, "--weights pt_inception"),
    (("--metrics", "fid_inception", "--weights", "w.pth"), 2, "--features inception --weights"),
    (("--features", "inception", "--weights", "absent.pth"), 2, "absent.pth cannot be read"),
    (("--metrics", "density_coverage", "--count", "5", "--steps", "1"), 65, "needs at least 6 images"),
    (("--cuont", "3"), 2, "did you mean '--count'"),
]


@pytest.mark.parametrize("arguments, expected, message", MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_one_line(command, tmp_path, arguments, expected, message):
    code, said, complaint = command("evaluate", tmp_path, *arguments)
    assert (code, said) == (expected, "")
    assert message in complaint and complaint.startswith("mmdiff evaluate: ") and complaint.count("\n") == 1


def test_help_names_every_metric(command):
    code, said, _ = command("evaluate", "--help")
    assert code == 0
    assert all(
        name in said
        for name in (
            "caption_accuracy",
            "write_accuracy",
            "image_bits_per_dim",
            "examples:",
            "fid_inception",
            "eight fixed",
            "across",
        )
    )


def test_a_ladder_goes_through_solvers_grids_and_evaluations(command, random_model, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "NFE", (1, 2, 3))
    monkeypatch.setattr(random_model, "tuned", {("heun", 3): [80.0, 1.0]})
    asked = ("--ladder", "--count", "3", "--features", "patch_dct", "--solver", "heun")
    code, said, _ = command("evaluate", tmp_path, *asked)
    assert code == 0
    told = [line.split()[:4] for line in said.splitlines()[:-1]]
    expected = [("tuned", 3), *((grid, nfe) for grid in ("uniform_logsnr", "uniform_u") for nfe in (1, 3))]
    assert told == [["heun", grid, str(nfe), "NFE"] for grid, nfe in expected]  # 2 would be 1 again
    assert all("frechet_patch_dct" in line and "image_accuracy" in line for line in said.splitlines()[:-1])
    rungs = json.loads((tmp_path / "evaluation" / "ladder.json").read_text())
    assert len(rungs) == 5 and all(rung["seconds"] > 0 for rung in rungs)
    one, other = (rung["numbers"]["frechet_patch_dct"] for rung in rungs[1:3])
    assert one != other and rungs[1]["numbers"] == pytest.approx(rungs[3]["numbers"])  # one step from sigma_max is one step
    page = (tmp_path / "evaluation" / "ladder.html").read_text()
    assert page.count("<svg") == len(rungs[0]["numbers"]) - 2 == 3 and "uniform_u" in page and "image_exact" in page
    sheet = PIL.Image.open(tmp_path / "evaluation" / "ladder.png")
    assert sheet.width > 3 * 96 and sheet.height > 2 * 96  # a row for 1 evaluation, one for 3


def test_a_ladder_takes_a_few_step_model_beside(command, random_model, tmp_path, monkeypatch):
    code, _, complaint = command("evaluate", tmp_path, "--ladder", "--few", tmp_path)
    assert code == 65 and "--few-step" in complaint
    cfg = dataclasses.replace(random_model.cfg, model=dataclasses.replace(random_model.cfg.model, step_input=True))
    params = Network(cfg.model, random_model.vocabulary.size).init(jax.random.key(0))
    few = Model(cfg, params, random_model.vocabulary)
    monkeypatch.setattr(mmdiff, "load", lambda workdir, **_: few if str(workdir) == "few" else random_model)
    monkeypatch.setattr(ladder, "NFE", (1,))
    asked = ("--ladder", "--count", "2", "--features", "patch_dct", "--metrics", "frechet_patch_dct", "--solver", "ddim")
    code, said, _ = command("evaluate", tmp_path, *asked, "--few", "few")
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()[:-1]] == ["ddim", "ddim", *["few_step"] * 4]
