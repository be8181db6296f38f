"""The words generator: pure, legible, split without leaks, and read back exactly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.config import ConfigError
from mmdiff.data import words
from mmdiff.data.words import (
    CHARACTERS,
    COLOURS,
    GLYPHS,
    PLACES,
    SIZES,
    WORD_LIST,
    Words,
    Writing,
    caption,
    character_accuracy,
    parse_caption,
    read_words,
    render,
    score_caption,
    split_of,
    writing_accuracy,
)
from mmdiff.document import Text

CONTENTS = st.text(CHARACTERS[:26], min_size=1, max_size=5) | st.integers(0, 999).map(str)
WRITINGS = st.builds(Writing, CONTENTS, *map(st.sampled_from, (SIZES, tuple(COLOURS), tuple(PLACES))))


def test_glyphs_are_distinct():
    drawings = np.stack([GLYPHS[character].reshape(-1) for character in CHARACTERS])
    distance = (drawings[:, None] != drawings[None]).sum(-1) + 99 * np.eye(len(drawings), dtype=int)
    assert list(GLYPHS) == list(CHARACTERS) and distance.min() >= 2
    assert all(len(word) <= words.LONGEST for word in WORD_LIST) and len(set(WORD_LIST)) == len(WORD_LIST) > 200


@settings(max_examples=150, deadline=None)
@given(writing=WRITINGS, size=st.sampled_from([32, 40, 64]))
def test_pictures_and_captions_lose_nothing(writing, size):
    assert read_words(render(writing, size)) == writing
    assert parse_caption(caption(writing)) == writing


@settings(max_examples=50, deadline=None)
@given(writing=WRITINGS, other=WRITINGS)
def test_different_writings_are_read_as_different(writing, other):
    assert (read_words(render(writing)) == other) == (writing == other)


def test_the_reader_is_exact_under_noise():
    rng = np.random.default_rng(0)
    documents = list(Words(1, 200))
    right = 0
    for document in documents:
        pixels = document.images[0].pixels + rng.normal(0, 12, (32, 64, 3))
        right += read_words(np.clip(pixels, 0, 255).astype(np.uint8)) == document.extra["writing"]
    assert right >= 198


def test_nothing_is_read_where_nothing_is_written():
    assert read_words(np.tile(np.uint8(words.GROUND), (32, 64, 1))) is None
    assert read_words(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)) is None
    assert read_words(np.full((20, 30, 3), 200, np.uint8)) is None


def test_scores():
    wanted = Writing("seven", "large", "red", "top")
    assert writing_accuracy(wanted, wanted) == character_accuracy(wanted, wanted) == 1
    assert writing_accuracy(wanted._replace(content="sevem"), wanted) == 3 / 4
    assert character_accuracy(wanted._replace(content="sevem"), wanted) == 4 / 5
    assert character_accuracy(wanted._replace(content="eve"), wanted) == 3 / 5
    assert character_accuracy(wanted._replace(content="x" * 20), wanted) == 0
    assert writing_accuracy(None, wanted) == character_accuracy(None, wanted) == 0
    assert score_caption(caption(wanted), wanted) == 1
    assert score_caption("the word 'seven' in small red letters at the top", wanted) == 3 / 4
    assert score_caption("seven", wanted) == 0
    assert parse_caption("the word 'seven' in small red digits at the top") is None


def test_documents_are_a_function_of_seed_and_index():
    first, again = Words(3, 50), Words(3, 500)
    assert all(first[i] == again[i] for i in range(50))
    assert [d.texts for d in first] != [d.texts for d in Words(4, 50)]
    with pytest.raises(IndexError):
        first[50]


@pytest.mark.parametrize("split", words.SPLITS)
def test_splits_do_not_leak(split):
    documents = list(Words(0, 300, split=split))
    assert {split_of(d.extra["writing"]) for d in documents} == {split}
    contents = {d.extra["writing"].content for d in documents}
    train = {d.extra["writing"].content for d in Words(0, 3000)}
    assert contents.isdisjoint(train) == (split == "unseen")
    texts = {d.texts[0] for d in documents}
    assert texts.isdisjoint({d.texts[0] for d in Words(0, 3000)}) == (split != "train")


def test_documents_have_the_promised_form():
    kinds = set()
    for document in Words(0, 60):
        kind, writing = document.extra["kind"], document.extra["writing"]
        kinds.add(kind)
        text, picture = document.segments if kind == "draw" else document.segments[::-1]
        assert isinstance(text, Text) and text == Text(caption(writing))
        assert picture.learn == (kind == "draw") and picture.pixels.shape == (32, 64, 3)
        assert read_words(picture.pixels) == writing == Writing(*json.loads(json.dumps(document.extra))["writing"])
    assert kinds == set(words.KINDS)
    assert len(list(Words(0, 10).texts())) == 10


def test_mistakes_are_one_line():
    for bad, message in [
        ({"mix": [("raed", 1)]}, "did you mean 'read'"),
        ({"image_size": 24}, "from 32 to 128"),
        ({"split": "unsen"}, "did you mean 'unseen'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Words(0, 10, **bad)
