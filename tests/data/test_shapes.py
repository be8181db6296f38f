"""The shapes generator: pure, unambiguous, split without leaks, and read back exactly."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.config import ConfigError
from mmdiff.data import shapes
from mmdiff.data.shapes import COLOURS, FORMS, PLACES, SIZES, Shapes, Thing, as_scene, caption, held_out, render
from mmdiff.data.shapes_reader import (
    UNKNOWN,
    attribute_accuracy,
    caption_exact,
    parse_caption,
    read_scene,
    score_caption,
)
from mmdiff.document import Image, Text

THINGS = st.builds(Thing, *map(st.sampled_from, (SIZES, tuple(COLOURS), FORMS, PLACES)))
SCENES = st.lists(THINGS, min_size=1, max_size=4, unique_by=lambda thing: thing.place).map(as_scene)


def random_scenes(count: int, seed: int = 0) -> list[shapes.Scene]:
    return [Shapes(seed, count)[i].extra["scene"] for i in range(count)]


def test_every_thing_in_every_place_is_read_exactly():
    for size in (24, 32, 40, 64, 128):
        for thing in (Thing(s, c, f, PLACES[0]) for s in SIZES for c in COLOURS for f in FORMS):
            scene = as_scene([thing._replace(place=place) for place in PLACES])
            assert read_scene(render(scene, size)) == scene


@settings(max_examples=300, deadline=None)
@given(scene=SCENES, size=st.sampled_from([24, 32, 56, 64]))
def test_pictures_and_captions_lose_nothing(scene, size):
    assert read_scene(render(scene, size)) == scene
    assert parse_caption(caption(scene)) == scene
    assert as_scene(json.loads(json.dumps(scene[::-1]))) == scene


@pytest.mark.parametrize("size", [24, 32])
def test_the_reader_is_exact_under_noise(size):
    rng = np.random.default_rng(0)
    scenes = random_scenes(1000)
    noisy = [np.clip(render(s, size) + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8) for s in scenes]
    assert np.mean([read_scene(pixels) == scene for pixels, scene in zip(noisy, scenes, strict=True)]) >= 0.99


def test_the_reader_is_exact_under_blur_and_dimming():
    for scene in random_scenes(300):
        pixels = render(scene).astype(np.float32)
        for axis in (0, 1):  # the kernel 1 2 1
            edge = np.pad(pixels, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
            pixels = sum(w * np.take(edge, range(o, o + 32), axis) for o, w in enumerate((0.25, 0.5, 0.25)))
        assert read_scene(pixels.astype(np.uint8)) == scene
        assert read_scene((0.85 * render(scene)).astype(np.uint8)) == scene


@settings(max_examples=200, deadline=None)
@given(scene=SCENES, other=SCENES)
def test_different_scenes_are_read_as_different(scene, other):
    assert (read_scene(render(scene)) == other) == (scene == other)
    assert (attribute_accuracy(read_scene(render(scene)), other) == 1) == (scene == other)


def test_what_resembles_nothing_is_unknown_or_absent():
    assert read_scene(render(())) == ()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert [thing.form for thing in read_scene(noise)] == [UNKNOWN] * 4
    faint = np.full((32, 32, 3), 70, np.uint8)
    assert [thing.form for thing in read_scene(faint)] == [UNKNOWN] * 4
    assert attribute_accuracy(read_scene(noise), as_scene([Thing("small", "red", "cross", "top left")])) == 1 / 16
    assert isinstance(read_scene(np.zeros((17, 40, 3), np.uint8)), tuple)


def test_accuracy_counts_wrong_missing_and_extra_attributes():
    one = Thing("large", "red", "circle", "top left")
    two = Thing("small", "blue", "cross", "bottom right")
    assert attribute_accuracy((one, two), (one, two)) == 1
    assert attribute_accuracy((one._replace(colour="blue"), two), (one, two)) == 7 / 8
    assert attribute_accuracy((one._replace(place="top right"), two), (one, two)) == 7 / 8
    assert attribute_accuracy((one,), (one, two)) == attribute_accuracy((one, two), (one,)) == 1 / 2
    assert attribute_accuracy((), (one,)) == 0 and attribute_accuracy((), ()) == 1


def test_captions_are_scored_by_attribute():
    scene = as_scene([Thing("large", "red", "circle", "top left"), Thing("small", "blue", "cross", "bottom right")])
    text = caption(scene)
    swapped = " and ".join(reversed(text.split(" and ")))
    assert score_caption(text, scene) == score_caption(swapped, scene) == 1 and caption_exact(swapped, scene)
    assert score_caption(text.replace("red", "green"), scene) == 7 / 8
    assert not caption_exact(text.replace("red", "green"), scene)
    assert score_caption(text.split(" and ")[0], scene) == 1 / 2
    assert score_caption(text + ", a shape", scene) == 2 / 3 and parse_caption(text + ", a shape") is None
    repeated = " and ".join([text.split(" and ")[0]] * 2)
    assert score_caption(repeated, scene) == 1 / 2 and parse_caption(repeated) is None
    assert score_caption("", scene) == score_caption("nonsense", scene) == 0 and parse_caption("") is None


def test_documents_are_a_function_of_seed_and_index():
    first, again = Shapes(3, 50), Shapes(3, 500)
    assert all(first[i] == again[i] and first[i].extra == again[i].extra for i in range(50))
    assert [first[i].texts for i in range(50)] != [Shapes(4, 50)[i].texts for i in range(50)]
    assert caption(Shapes(0, 20, mix=[("draw", 1)])[7].extra["scene"]) == GOLDEN
    with pytest.raises(IndexError):
        first[50]
    assert len(first) == len(list(first)) == 50


GOLDEN = (
    "a large purple cross at the top left, a large purple circle at the bottom left and a large blue cross at the bottom right"
)


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_share_no_scene(split):
    data = Shapes(0, 400, split=split)
    for document in data:
        for image in document.images:
            assert held_out(caption(read_scene(image.pixels))) == (split == "test")
    singles = [(Thing(s, c, f, p),) for s in SIZES for c in COLOURS for f in FORMS for p in PLACES]
    assert 0.05 < np.mean([held_out(caption(scene)) for scene in singles]) < 0.15


def test_each_kind_has_the_promised_form_and_its_images_show_its_scenes():
    signs = {
        "draw": "T+I+",
        "caption": "I-T+",
        "question": "I-T-T+",
        "edit": "I-T-I+",
        "story": "T+I+T+I+T+",
    }
    seen = set()
    for document in Shapes(0, 300):
        extra = document.extra
        kind = extra["kind"]
        seen.add(kind)
        form = "".join(("T" if isinstance(s, Text) else "I") + "-+"[s.learn] for s in document.segments)
        assert form == signs[kind]
        scenes = [extra["scene"], extra["target"]] if "target" in extra else [extra["scene"]]
        assert [read_scene(image.pixels) for image in document.images] == scenes
        assert json.loads(json.dumps(extra))["kind"] == kind
        if kind == "story":
            assert caption_exact(document.texts[0], scenes[0]) and caption_exact(document.texts[2], scenes[1])
    assert seen == set(shapes.KINDS)


def answer(question: str, scene: shapes.Scene) -> set[str]:
    """Every answer that fits, found without the generator's help."""

    def meant(words: str) -> list[Thing]:
        place = re.search(r" at the (.*)", words)
        needed = set(re.sub(r" at the .*", "", words).replace("crosses", "cross").split())
        needed = {w.removesuffix("s") if w != "cross" else w for w in needed} - {"the", "a", "shape", ""}
        return [t for t in scene if needed <= set(t) and (place is None or t.place == place[1])]

    if found := re.fullmatch(r"what is at the (.*)\?", question):
        return {f"a {t}" for t in scene if t.place == found[1]} or {"nothing"}
    if found := re.fullmatch(r"how many (.*) are there\?", question):
        return {shapes.NUMBERS[len(meant(found[1]))]}
    if found := re.fullmatch(r"is there (.*)\?", question):
        return {"yes" if meant(found[1]) else "no"}
    if found := re.fullmatch(r"where is (.*)\?", question):
        return {t.place for t in meant(found[1])}
    if found := re.fullmatch(r"what colour is (.*)\?", question):
        return {t.colour for t in meant(found[1])}
    found = re.fullmatch(r"is (.*) large or small\?", question)
    return {t.size for t in meant(found[1])}


def test_questions_have_exactly_one_answer():
    documents = list(Shapes(0, 1500, mix=[("question", 1)]))
    for document in documents:
        question, reply = document.extra["question"], document.extra["answer"]
        assert answer(question, document.extra["scene"]) == {reply}
        assert document.texts == [question, f" {reply}"]
    replies = {document.extra["answer"] for document in documents}
    assert {"yes", "no", "nothing", *shapes.NUMBERS, *COLOURS, *SIZES, *PLACES} <= replies
    assert len({answer("is there a red cross?", d.extra["scene"]).pop() for d in documents}) == 2


def test_edits_change_one_thing_and_name_it_without_doubt():
    for document in Shapes(0, 600, mix=[("edit", 1)]):
        before, after, text = (document.extra[key] for key in ("scene", "target", "instruction"))
        gone, new = set(before) - set(after), set(after) - set(before)
        assert (len(gone), len(new)) == {"remove": (1, 0), "add": (0, 1)}.get(text.split()[0], (1, 1))
        assert 1 <= len(after) <= 3 and len({thing.place for thing in after}) == len(after)
        if gone:
            words = re.match(r"\w+ (the .*?(?:" + "|".join(FORMS) + r")(?: at the (?:" + "|".join(PLACES) + "))?)", text)
            meant = set(words[1].replace(" at", "").split()) - {"the"}
            assert [t for t in before if meant <= set(" ".join(t).split())] == list(gone)
        if new and text.split()[0] != "add":
            assert sum(a != b for a, b in zip(*gone, *new, strict=True)) == 1


def test_mistakes_are_one_line():
    for bad, message in [
        ({"mix": [("drow", 1)]}, "did you mean 'draw'"),
        ({"mix": [("zzz", 1)]}, "choose from draw, caption"),
        ({"mix": [("draw", -1)]}, "must not be negative"),
        ({"mix": [("draw", 0)]}, "above 0"),
        ({"image_size": 30}, "multiple of 8"),
        ({"image_size": 256}, "multiple of 8"),
        ({"max_objects": 4}, "1, 2 or 3"),
        ({"split": "tset"}, "did you mean 'test'"),
    ]:
        with pytest.raises(ConfigError, match=message) as error:
            Shapes(0, 10, **bad)
        assert "\n" not in str(error.value)


def test_options_take_effect():
    assert all(len(d.extra["scene"]) == 1 for d in Shapes(0, 100, max_objects=1))
    assert {d.extra["kind"] for d in Shapes(0, 100, mix=(("edit", 1.0), ("draw", 3.0)))} == {"edit", "draw"}
    assert Shapes(0, 2, image_size=64)[0].images[0].pixels.shape == (64, 64, 3)
    assert len(list(Shapes(0, 10, mix=[("draw", 1)]).texts())) == 10
    assert isinstance(Shapes(0, 1)[0].images[0], Image)
