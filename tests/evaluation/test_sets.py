"""Comparing sets of images: perfect, spoilt and copying models, equal counts, refusals, and the protocol."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mmdiff import config
from mmdiff.cli.evaluate import as_json
from mmdiff.data.sources import open_source
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import DataError, Document, Image
from mmdiff.evaluation import encoder, sets
from mmdiff.evaluation.evaluate import METRICS, chosen, evaluate, measure
from mmdiff.evaluation.prompts import drawings
from mmdiff.evaluation.protocol import lines, protocol
from mmdiff.evaluation.task import Comparison, Task
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model

from .oracle import Listed

COUNT = 24
DATA = config.Data(source="shapes", max_objects=2, size=60, generator=(("draw", 1.0),))
CFG = config.Config(data=DATA, model=config.Model(patch=8))
ALONE = config.Config(data=DATA, model=config.Model(patch=8), layout=config.Layout(markers=False))
SPACE = ["precision_recall", "density_coverage", "nearest_train_ratio"]


class Painter:
    """Draws what it is given, in turn."""

    options, path, tuned, weak, tokenizer = Model.options, Model.path, {}, None, None

    def __init__(self, pixels, cfg=CFG):
        self.cfg, self.pixels, self.vocabulary, self.calls = cfg, list(pixels), Vocabulary.bytes(), 0

    def generate(self, prompts, **options):
        self.calls += 1
        return [Document(Image(pixels)) for _, pixels in zip(prompts, self.pixels, strict=False)]


@functools.cache
def of_split(split, cfg=CFG, count=COUNT):
    return [d.image.pixels for d in drawings(open_source(cfg, split), cfg, count)]


def noisy(images):
    rng = np.random.default_rng(0)
    return [np.clip(x + rng.normal(0, 40, x.shape), 0, 255).astype(np.uint8) for x in images]


@pytest.mark.parametrize("cfg", [CFG, ALONE], ids=["captioned", "images alone"])
@pytest.mark.parametrize("name", ["random", "patch_dct"])
def test_a_perfect_model_is_at_no_distance_and_a_noisy_one_is_far(name, cfg):
    asked = [f"frechet_{name}", f"kid_{name}", *SPACE]
    comparison = Comparison(features=name)
    right = evaluate(Painter(of_split("validation", cfg)[::-1], cfg), asked, count=COUNT, comparison=comparison)
    wrong = evaluate(Painter(noisy(of_split("validation", cfg)), cfg), asked, count=COUNT, comparison=comparison)
    assert right[f"frechet_{name}"] == pytest.approx(0, abs=1e-4) and wrong[f"frechet_{name}"] > 0.05
    assert right[f"kid_{name}"] < wrong[f"kid_{name}"]
    for kind in ("precision", "recall", "coverage"):
        assert right[f"{kind}_{name}"] == 1 > wrong[f"{kind}_{name}"]
    assert right[f"nearest_train_ratio_{name}"] == 1 < wrong[f"nearest_train_ratio_{name}"]
    assert right[f"density_{name}"] > wrong[f"density_{name}"]
    assert not any("fid" in key for key in right)


def test_a_model_that_copies_training_images_is_found_out():
    result = evaluate(Painter(of_split("train")), ["nearest_train_ratio"], count=COUNT)
    assert result["nearest_train_ratio_random"] == result["nearest_train_closest_random"] == 0
    prompted = Comparison(split="train")  # held-out images are still those of the validation split
    assert evaluate(Painter(of_split("train")), ["nearest_train_ratio"], count=COUNT, comparison=prompted) == result


def test_real_images_are_those_of_the_split_and_never_more_than_the_generated():
    few = Listed([Document("a", Image(pixels)) for pixels in of_split("validation")[:7]])
    task = Task(Painter(of_split("validation")), COUNT, given=few)
    found = measure(task, ["precision_recall"])
    assert (len(task.generated), len(task.wanted), found["precision_random"]) == (7, 7, 1)
    trained = Task(Painter(of_split("train")), COUNT, comparison=Comparison(split="train"))
    assert measure(trained, ["precision_recall"])["recall_random"] == 1
    assert np.array_equal(trained.wanted[3].image.pixels, of_split("train")[3])


def test_images_are_drawn_once_for_all_metrics():
    painter = Painter(of_split("validation"))
    evaluate(painter, ["patch_grid_ratio", "frechet_random", "frechet_patch_dct", "precision_recall"], count=COUNT)
    assert painter.calls == 1


def test_too_few_images_are_refused_and_few_are_warned_of(capsys):
    for name, least in (("frechet_random", 2), ("kid_random", 4), ("precision_recall", 4), ("density_coverage", 6)):
        with pytest.raises(DataError, match=f"{name} needs at least {least} images, and there are {least - 1}: raise --count"):
            evaluate(Painter(of_split("validation")), [name], count=least - 1)
        evaluate(Painter(of_split("validation")), [name], count=least)
    assert capsys.readouterr().err.count("\n") == 1
    task = Task(Painter(of_split("validation")), COUNT)
    measure(task, ["frechet_random", "kid_random"])
    (line,) = protocol(task)["warnings"]
    assert "24 images are not more than the 128 features" in line
    assert capsys.readouterr().err == f"warning: {line}\n"


def test_the_protocol_says_what_numbers_rest_on():
    task = Task(Painter(of_split("validation")), COUNT, 3, {"steps": 7, "guidance": 2.0})
    result = measure(task, ["kid_random", "kid_patch_dct", "nearest_train_ratio"])
    found = protocol(task)
    wanted = {"generated": COUNT, "real": COUNT, "split": "validation", "seed": 3, "pixels": "uint8"}
    wanted |= {"train_images": 60, "prompts": "of the real images"}
    wanted |= {"solver": "unipc2", "steps": 7, "grid": "uniform_logsnr", "guidance": 2.0, "image_sizes": ["32x32"]}
    assert found | wanted == found
    assert set(found["features"]) == {"random", "patch_dct"}
    made = found["features"]["random"]
    assert (len(made["hash"]), made["width"], made["resize"]) == (16, 128, "bilinear, antialiased, to 32x32")
    assert json.loads(as_json(result, found))["protocol"] == found
    assert "generated 24, real 24" in lines(found) and f"features random: hash {made['hash']}" in lines(found)
    undrawn = Task(Painter([]), COUNT)
    assert "generated" not in protocol(undrawn)


def test_an_encoder_is_trained_once_for_a_run_and_shared_by_its_file(tmp_path, monkeypatch, capsys):
    trained = encoder.trained
    monkeypatch.setattr(encoder, "trained", lambda images, side, cached: trained(images, side, cached, steps=2))
    asked = ["frechet_encoder", "kid_encoder"]
    first = Task(Painter(of_split("validation")), COUNT, comparison=Comparison(cache=tmp_path))
    result = measure(first, asked)
    assert capsys.readouterr().err.count("training the encoder") == 1
    (path,) = tmp_path.iterdir()
    again = Task(Painter(of_split("validation")), COUNT, comparison=Comparison(cache=tmp_path))
    assert measure(again, asked) == pytest.approx(result, rel=1e-5, abs=1e-6)
    other = Task(Painter(of_split("validation")), COUNT, comparison=Comparison("encoder", path))
    measure(other, asked)
    assert "training" not in capsys.readouterr().err
    assert first.notes["features"] == again.notes["features"] == other.notes["features"]
    wider = config.Config(data=config.Data(source="shapes", max_objects=1, size=60), model=CFG.model)
    assert sets.encoder_path(Task(Painter([], wider), comparison=Comparison(cache=tmp_path)), 32) != path


MISTAKES = [
    (Comparison("dino"), [], "unknown features 'dino'"),
    (Comparison("encodr"), [], "did you mean 'encoder'"),
    (Comparison("inception"), [], "--weights pt_inception"),
    (Comparison(), ["fid_inception"], "--features inception --weights"),
    (Comparison("random", Path("w.npz")), [], "needs --features inception or encoder"),
    (Comparison("inception", Path("w.npz"), "abc"), [], "64 hexadecimal digits"),
    (Comparison("inception", Path("absent.pth")), [], "absent.pth cannot be read"),
    (Comparison("encoder", Path("absent.npz")), [], "absent.npz not found"),
    (Comparison(split="test"), [], "split='test'"),
]


@pytest.mark.parametrize("comparison, metrics, message", MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_choice_that_cannot_work_is_refused_before_anything_is_drawn(comparison, metrics, message):
    painter = Painter([])
    with pytest.raises(config.ConfigError, match=message):
        evaluate(painter, metrics, comparison=comparison)
    assert not painter.calls


def test_only_inception_is_called_fid():
    named = [name for name in METRICS if "fid" in name]
    assert named == ["fid_inception"]
    assert sets.in_space("encoder")[:2] == ["frechet_encoder", "kid_encoder"]
    usual = chosen(Task(Painter([])), None)
    assert chosen(Task(Painter([]), comparison=Comparison("patch_dct")), None) == usual + sets.in_space("patch_dct")
    assert not set(usual) & set(sets.in_space("random"))
    assert all(set(sets.in_space(name)) <= set(METRICS) for name in ("random", "patch_dct", "encoder", "inception"))


def test_a_network_of_images_alone_is_measured_whole():
    small = config.Model(width=32, depth=1, patch=8, key_width=16, lossless=False)
    cfg = config.Config(data=DATA, model=small, layout=config.Layout(markers=False, row_length=64))
    vocabulary = Vocabulary.bytes()
    model = Model(cfg, Network.of(cfg, vocabulary.size).init(jax.random.key(0)), vocabulary)
    asked = ["frechet_patch_dct", "precision_recall", "patch_grid_ratio", "x_error"]
    result = evaluate(model, asked, count=6, steps=1)
    assert result["frechet_patch_dct"] > 1 and result["precision_random"] == 0  # it draws grey
    assert all(np.isfinite(value) for name, value in result.items() if name != "patch_grid_ratio")
