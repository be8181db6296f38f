"""`mmdiff sample`: what it writes, and one line for every mistake."""

import json

import numpy as np
import pytest

import mmdiff
from mmdiff import Image


def documents(folder):
    return [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]


def pixels(folder, number):
    return Image.open(folder / "images" / f"{number:04d}.png").pixels


def test_draws_variants_of_every_prompt_that_depend_on_their_seed_alone(command, tmp_path):
    out = tmp_path / "out"
    code, said, _ = command("sample", tmp_path, "--prompt", "one", "--prompt", "two", "--images", 2, "--out", out)
    assert code == 0
    assert said.splitlines()[0] == "one [images/0001.png]"
    assert f"wrote 4 documents with 4 images to {out}" in said
    assert [(d["segments"][0]["text"], d["seed"]) for d in documents(out)] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert pixels(out, 1).shape == (32, 32, 3)
    assert (pixels(out, 1) != pixels(out, 2)).any()
    command("sample", tmp_path, "--prompt", "one", "--seed", 1, "--out", tmp_path / "again")
    np.testing.assert_array_equal(pixels(tmp_path / "again", 1), pixels(out, 2))


def test_images_alone_may_be_asked_for_without_a_prompt_or_a_folder(command, tmp_path):
    code, said, _ = command("sample", tmp_path, "--images", 2, "--steps", 1)
    assert code == 0 and "wrote 2 documents with 2 images" in said
    assert (tmp_path / "samples" / "images" / "index.html").is_file()


def test_default_folders_are_new_ones(command, tmp_path):
    for name in ("a-circle", "a-circle-2"):
        assert command("sample", tmp_path, "--prompt", "a circle", "--steps", 1)[0] == 0
        assert (tmp_path / "samples" / name / "index.html").is_file()


def test_describes_and_continues_freely(command, tmp_path, scene):
    code, _, said = command("sample", tmp_path, "--image", scene, "--temperature", 0, "--out", tmp_path / "a")
    assert code == 0 and "40x48 cropped and resized to 32x32" in said
    (described,) = documents(tmp_path / "a")
    assert "image" in described["segments"][0] and described["prompt"] == 1
    assert pixels(tmp_path / "a", 1).shape == (32, 32, 3)
    code, *_ = command("sample", tmp_path, "--prompt", "x", "--images", 0, "--max-images", 0, "--out", tmp_path / "b")
    assert code == 0
    assert all("text" in segment for segment in documents(tmp_path / "b")[0]["segments"])


def test_edits_start_from_an_image_and_a_text(command, tmp_path, scene):
    command("sample", tmp_path, "--image", scene, "--prompt", "make it red", "--out", tmp_path / "a")
    (made,) = documents(tmp_path / "a")
    assert [next(iter(s)) for s in made["segments"]] == ["image", "text", "image"]
    again = tmp_path / "a" / "documents.jsonl"
    command("sample", tmp_path, "--document", again, "--images", 1, "--image-size", "16x24", "--out", tmp_path / "b")
    (made,) = documents(tmp_path / "b")
    assert [next(iter(s)) for s in made["segments"]] == ["image", "text", "image", "image"]
    assert pixels(tmp_path / "b", 3).shape == (16, 24, 3)


def test_inpainting_repaints_only_what_the_mask_shows(command, tmp_path):
    image = Image(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[8:20, 4:] = 255
    image.save(tmp_path / "image.png")
    Image(mask).save(tmp_path / "mask.png")
    arguments = ("sample", tmp_path, "--inpaint", tmp_path / "image.png", "--mask", tmp_path / "mask.png")
    assert command(*arguments, "--out", tmp_path / "out")[0] == 0
    changed = pixels(tmp_path / "out", 1) != image.pixels
    assert changed.any() and not changed[mask == 0].any()


MISTAKES = [
    ((), 2, "give --prompt"),
    (("--promt", "x"), 2, "did you mean '--prompt'"),
    (("--prompt", "x", "--steps", "0"), 2, "steps=0"),
    (("--prompt", "x", "--image-size", "a"), 2, "is no size"),
    (("--prompt", "x", "--images", "-1"), 2, "--images -1"),
    (("--mask", "m.png", "--prompt", "x"), 2, "--mask needs --inpaint"),
    (("--inpaint", "i.png"), 2, "--inpaint needs --mask"),
    (("--image", "missing.png"), 65, "missing.png' not found"),
    (("--document", "missing.jsonl"), 65, "missing.jsonl not found"),
    (("--prompt", "x", "--image-size", "9x8"), 65, "not divisible by model.patch=8"),
    (("--prompt", "x" * 500), 65, "needs 520 positions but the model was trained with layout.row_length=400"),
]


@pytest.mark.parametrize("arguments, expected, message", MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(command, tmp_path, arguments, expected, message):
    code, said, complaint = command("sample", tmp_path, *arguments)
    assert (code, said) == (expected, "")
    assert message in complaint and complaint.startswith("mmdiff sample: ") and complaint.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for extra in ([], ["--overwrite"]):
        code, _, complaint = command("sample", tmp_path, "--prompt", "x", "--out", tmp_path / "mine", *extra)
        assert code == 65 and "mine" in complaint
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_folder_that_is_no_run(tmp_path, capsys):
    from mmdiff.cli.main import main

    assert main(["sample", str(tmp_path), "--prompt", "x"]) == 65
    assert "config.json not found" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_has_examples(command):
    code, said, _ = command("sample", "--help")
    assert code == 0 and "mmdiff sample runs/quickstart --prompt" in said


def test_whole_command_on_a_saved_run(mmdiff_command, random_model, tmp_path):
    """Through `python -m mmdiff` and a real, empty run: no traceback."""
    (tmp_path / "config.json").write_text(random_model.cfg.to_json())
    random_model.vocabulary.save(tmp_path / "vocabulary.model")
    done = mmdiff_command("sample", tmp_path, "--prompt", "x")
    assert done.returncode == 65
    assert "no checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert mmdiff.__version__
