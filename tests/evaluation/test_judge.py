"""The judge of drawings: right where the eye can tell, wrong drawings score lower, and it says what it cannot learn."""

import numpy as np
import pytest

from mmdiff import config
from mmdiff.document import DataError, Document, Image
from mmdiff.evaluation import judge
from mmdiff.evaluation.evaluate import evaluate
from mmdiff.evaluation.phrases import classes, parse_groups

from .oracle import Confused, Listed, Oracle

GROUPS = parse_groups("red|green;dark")
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
CFG = config.Config(model=config.Model(patch=8))


def scenes(count, seed):
    """Plain coloured pictures with noise and what they show; blue is none of the group."""
    rng, found = np.random.default_rng(seed), []
    for index in range(count):
        name, dark = list(COLOURS)[index % 3], bool(index // 3 % 2)
        picture = np.array(COLOURS[name]) * (90 if dark else 220) + rng.integers(0, 30, (16, 16, 3))
        found.append((picture.astype(np.uint8), f"A {'dark ' if dark else ''}{name} picture {index}."))
    return found


@pytest.fixture(scope="module")
def trained():
    pictures, texts = zip(*scenes(60, 0), strict=True)
    return judge.train(pictures, texts, GROUPS, steps=60)


def test_classes_are_phrases_or_none_of_them():
    assert classes(["a dark red car", "a blue car", "Green."], GROUPS).tolist() == [[0, 0], [2, 1], [1, 1]]


def test_it_sees_what_unseen_pictures_show(trained):
    pictures, texts = zip(*scenes(70, 1), strict=True)  # not a multiple of what it looks at in one go
    assert (trained(pictures) == classes(texts, GROUPS)).mean() > 0.97


def test_the_same_again(trained):
    pictures, texts = zip(*scenes(60, 0), strict=True)
    again = judge.train(pictures, texts, GROUPS, steps=60)
    noise = [np.random.default_rng(n).integers(0, 256, (16, 16, 3)).astype(np.uint8) for n in range(64)]
    assert (again(noise) == trained(noise)).all()


def test_drawings_are_judged_beside_the_real_images_of_their_prompts(trained, monkeypatch):
    monkeypatch.setattr(judge, "_judge_of", lambda task: trained)
    documents = [Document(text, Image(pixels)) for pixels, text in scenes(24, 2)]
    asked = {"source": Listed(documents), "phrases": GROUPS}
    right = evaluate(Oracle(CFG, documents), ["phrase_drawn"], **asked)
    wrong = evaluate(Confused(CFG, documents), ["phrase_drawn"], **asked)  # each draws the next one's picture
    assert right["phrase_drawn"] == right["phrase_judge"] == wrong["phrase_judge"] > 0.97
    assert wrong["phrase_drawn_red"] < 0.1 < wrong["phrase_drawn_dark"] < 0.8
    assert not any(name.startswith("phrase_accuracy") for name in right)


def test_it_is_kept_and_read_back(trained, tmp_path):
    trained.save(tmp_path / "judge.npz")
    pictures, _ = zip(*scenes(9, 3), strict=True)
    read = judge.load(tmp_path / "judge.npz")
    assert read.groups == GROUPS and read.digest == trained.digest and (read(pictures) == trained(pictures)).all()
    other = judge.Judge([["red"], *GROUPS[1:]], trained.side, trained.params)
    other.save(tmp_path / "other.npz")
    with pytest.raises(DataError, match="another network"):
        judge.load(tmp_path / "other.npz")
    with pytest.raises(DataError, match="no judge of drawings"):
        judge.load(tmp_path / "none.npz")
    np.savez(tmp_path / "encoder.npz", side=32, patch=np.zeros(3))
    with pytest.raises(DataError, match="no judge of drawings"):
        judge.load(tmp_path / "encoder.npz")


def test_what_cannot_be_learnt_is_said():
    with pytest.raises(DataError, match="there are none"):
        judge.train([], [], GROUPS)
    pictures = [np.zeros((16, 16, 3), np.uint8)] * 2
    with pytest.raises(DataError, match="do not differ in 'dark'"):
        judge.train(pictures, ["red", "green"], GROUPS)
    with pytest.raises(config.ConfigError, match="needs phrases"):
        evaluate(Oracle(CFG, []), ["phrase_drawn"], source=Listed([Document("red", Image(pictures[0]))]))
