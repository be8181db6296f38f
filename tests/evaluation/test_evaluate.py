"""What the metrics mean: perfect answers score exactly 1, wrong ones less."""

import numpy as np
import pytest

from mmdiff import config
from mmdiff.document import DataError, Document, Image, Text
from mmdiff.evaluation import shapes, words
from mmdiff.evaluation.evaluate import METRICS, evaluate
from mmdiff.evaluation.patch_grid import gradient_ratio
from mmdiff.evaluation.phrases import class_of, parse_groups
from mmdiff.evaluation.prompts import drawings, pictures
from mmdiff.evaluation.task import Task, mean

from .oracle import Confused, Listed, Oracle

COUNT = 12
SHAPES = config.Config(data=config.Data(source="shapes", max_objects=2), model=config.Model(patch=8))
WORDS = config.Config(data=config.Data(source="words"), model=config.Model(patch=8))
SHAPES_METRICS = {
    "caption": ("caption_accuracy", "caption_exact"),
    "draw": ("image_accuracy", "image_exact"),
    "question": ("question_accuracy",),
    "edit": ("edit_accuracy", "edit_exact"),
}


BOTH = config.Config(data=config.Data(order="both"))


def shapes_documents(kind):
    return shapes.held_out(Task(Oracle(SHAPES, []), COUNT), kind)


@pytest.mark.parametrize("kind", SHAPES_METRICS)
def test_a_perfect_model_scores_one_on_shapes_and_a_confused_one_less(kind):
    names, documents = SHAPES_METRICS[kind], shapes_documents(kind)
    right = evaluate(Oracle(SHAPES, documents), [names[0]], count=COUNT)
    wrong = evaluate(Confused(SHAPES, documents), [names[0]], count=COUNT)
    for name in names:
        assert right[name] == 1.0 and right[f"{name}_stderr"] == 0.0
        assert wrong[name] < 0.8
    assert len(documents) == COUNT


def test_copying_the_image_is_reported_beside_edits():
    result = evaluate(Oracle(SHAPES, shapes_documents("edit")), ["edit_accuracy"], count=COUNT)
    assert 0.4 < result["edit_accuracy_of_copy"] < 0.9


def test_a_story_is_valid_only_with_both_images_and_an_end():
    stories, captions = shapes_documents("story"), shapes_documents("caption")
    name = ["interleaved_validity"]
    good = evaluate(Oracle(SHAPES, stories + captions), name, count=COUNT)
    assert good["interleaved_validity"] == good["caption_validity"] == 1.0
    endless = evaluate(Oracle(SHAPES, stories + captions, ended=False), name, count=COUNT)
    assert endless["interleaved_validity"] == endless["caption_validity"] == 0.0
    short = [Document(*d.segments[:3]) for d in stories]
    assert evaluate(Oracle(SHAPES, short + captions), name, count=COUNT)["interleaved_validity"] == 0.0
    more = [Document(*d.segments, d.images[0]) for d in captions]
    assert evaluate(Oracle(SHAPES, stories + more), name, count=COUNT)["caption_validity"] == 0.0


def test_adjoining_texts_of_a_story_count_as_one():
    image = Image(np.zeros((8, 8, 3), np.uint8))
    assert shapes.outline(Document("a", "b", image, image, "c")) == [Text, Image, Image, Text]


@pytest.mark.parametrize("metric, kind", [("read_accuracy", "read"), ("write_accuracy", "draw")])
def test_a_perfect_model_scores_one_on_words_and_a_confused_one_less(metric, kind):
    documents = words._held_out(Task(Oracle(WORDS, []), COUNT), kind)
    right = evaluate(Oracle(WORDS, documents), [metric], count=COUNT)
    wrong = evaluate(Confused(WORDS, documents), [metric], count=COUNT)
    stem = metric.removesuffix("accuracy")
    for name in (metric, f"{stem}exact", f"{stem}characters"):
        assert right[name] == 1.0
        assert wrong[name] < 0.7


def faces(captions):
    rng = np.random.default_rng(0)
    return [Document(Image(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), learn=False), c) for c in captions]


FACES = faces(["A woman with Black Hair, smiling.", "A man with brown hair.", "A man with black hair.", "A man."])
GROUPS = parse_groups("black hair|brown hair; smiling; man")


def test_phrase_accuracy_stands_beside_the_majority():
    cfg = config.Config(model=config.Model(patch=8))
    result = evaluate(Oracle(cfg, FACES), ["phrase_accuracy"], source=Listed(FACES), phrases=GROUPS)
    assert [result[f"phrase_accuracy_{n}"] for n in ("black_hair", "smiling", "man")] == [1, 1, 1]
    assert [result[f"phrase_majority_{n}"] for n in ("black_hair", "smiling", "man")] == [0.5, 0.75, 0.75]
    assert result["phrase_accuracy"] == 1
    told = [Document(d.segments[0], "A man with black hair.") for d in FACES]
    result = evaluate(Oracle(cfg, told), ["phrase_accuracy"], source=Listed(FACES), phrases=GROUPS)
    assert [result[f"phrase_accuracy_{n}"] for n in ("black_hair", "smiling", "man")] == [0.5, 0.75, 0.75]
    assert result["phrase_accuracy"] == 2 / 3  # of groups and captions alike
    with pytest.raises(DataError, match="no document"):
        evaluate(Oracle(cfg, []), ["phrase_accuracy"], source=Listed([Document("text")]), phrases=GROUPS)


def test_a_phrase_is_whole_words():
    assert class_of("a woman", ["man"]) is None
    assert class_of("A Man.", ["man"]) == "man"
    assert class_of("brown hair and black hair", ["black hair", "brown hair"]) == "black hair"
    for bad in ("", "a;;b", "a|b;a|c"):
        with pytest.raises(config.ConfigError):
            parse_groups(bad)


def test_patch_grid_ratio_is_one_for_the_data_itself_and_more_for_blocks():
    rng = np.random.default_rng(0)
    documents = [Document(f"{i}", Image(rng.integers(0, 256, (16, 24, 3)).astype(np.uint8))) for i in range(4)]
    blocky = [Document(d.segments[0], Image(d.images[0].pixels // 8 + blocks(rng))) for d in documents]
    cfg = config.Config(model=config.Model(patch=8))
    same = evaluate(Oracle(cfg, documents), ["patch_grid_ratio"], source=Listed(documents))
    assert same["patch_grid_ratio"] == 1.0
    assert same["patch_grid_ratio_real"] == pytest.approx(1.0, abs=0.1)
    assert evaluate(Oracle(cfg, blocky), ["patch_grid_ratio"], source=Listed(documents))["patch_grid_ratio"] > 2


def blocks(rng):
    return rng.integers(0, 200, (2, 3, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)


def test_gradient_ratio_by_hand():
    row = np.array([0, 1, 4, 5], np.uint8)  # differences 1, 3 (across), 1
    assert gradient_ratio([np.broadcast_to(row[None, :, None], (1, 4, 3))], 2) == 3.0
    assert np.isnan(gradient_ratio([np.zeros((2, 2, 3), np.uint8)], 2))


def test_sampling_options_reach_the_images_and_wrong_ones_are_refused():
    oracle = Oracle(SHAPES, shapes_documents("draw"))
    evaluate(oracle, ["image_accuracy"], count=COUNT, steps=3, guidance=2.0, seed=5)
    (call,) = oracle.calls
    assert (call["steps"], call["guidance"], call["seed"], call["image_size"]) == (3, 2.0, 5, (32, 32))
    with pytest.raises(config.ConfigError, match="steps=0"):
        evaluate(oracle, ["image_accuracy"], steps=0)


def test_metrics_are_checked_before_anything_is_measured():
    oracle = Oracle(SHAPES, [])
    with pytest.raises(config.ConfigError, match="did you mean 'caption_accuracy'"):
        evaluate(oracle, ["captoin_accuracy"])
    with pytest.raises(config.ConfigError, match="read_accuracy cannot be measured"):
        evaluate(oracle, ["read_accuracy"])
    with pytest.raises(DataError, match="no held-out documents"):
        evaluate(oracle, ["x_error"], source=Listed([]))
    assert not oracle.calls
    assert {"caption_accuracy", "image_accuracy", "text_bits_per_byte", "x_error"} <= set(METRICS)


def test_mean_has_the_usual_standard_error():
    result = mean("a", [0.0, 1.0, 1.0, 0.0])
    assert result == {"a": 0.5, "a_stderr": pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2)}


def test_prompts_follow_what_the_model_learns():
    image, other = (Image(np.full((8, 8, 3), v, np.uint8), learn) for v, learn in ((1, False), (2, True)))
    edit, pair = Document(image, "make it two", other), Document("two", other)
    assert [repr(d.prompt) for d in drawings(Listed([edit, pair]), config.Config(), 5)] == [
        "Document(Image(8x8), 'make it two', IMG)",
        "Document('two', IMG)",
    ]
    assert [text for _, text in pictures(Listed([edit, pair, Document(image, "one")]), config.Config(), 5)] == ["one"]
    assert [text for _, text in pictures(Listed([pair]), BOTH, 5)] == ["two"]
    (drawing,) = drawings(Listed([Document(other, "two")]), BOTH, 5)
    assert repr(drawing.prompt) == "Document('two', IMG)"
