"""Prompts word for word; answers that count; intervals."""

import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.in_context import few_shot, prompts
from mmdiff.in_context.prompts import Pair

from .tiny import language


def test_classification_word_for_word():
    ids = prompts.classification(language(), ["red", "blue"], [(["a red", " photo"], "red"), (["sky"], "blue")], ["rose"])
    assert language().decode(ids) == (
        "For each of the following input output pairs, output is one of ['red' or 'blue']\n "
        "###\nInput: <  a red photo  >\nOutput:  red ###\nInput: <  sky  >\nOutput:  blue ###\nInput: <  rose  >\nOutput: "
    )
    assert ids[0] == language().processor.bos_id()


def test_restoration_word_for_word_and_ids_as_they_are():
    ids = prompts.restoration(language(), [Pair([260, 7], [3, 299])], [12, 13], 2)
    encode = language().encode
    first = encode("Learning a new language and predict the 2 tokens following the examples.\n", bos=True)
    before, between = encode("###\nInput: < "), encode(" >\nOutput: ")
    assert ids == [*first, *before, 260, 7, *between, 3, 299, *before, 12, 13, *between]


def test_captions_and_questions_end_with_what_is_asked():
    ids = prompts.caption(language(), [(["sky"], "a blue sky")], ["rose"])
    assert language().decode(ids).endswith("Output:  a blue sky. ###\nInput: <  rose  >\nOutput: ")
    ids = prompts.question(language(), [(["sky"], "what colour?", "blue")], ["rose"], "which form?")
    told = language().decode(ids)
    assert "Question: what colour?  Answer:  blue." in told and told.endswith("rose  > Question: which form?  Answer: ")


def test_answers_are_names_or_none():
    which = language()
    names = ["circle", "circle at", "cross"]
    spelt = [which.encode(name) for name in names]
    may = few_shot.open_tokens(which, names)
    for ids in spelt:
        assert all(may[place, token] for place, token in enumerate([*ids, which.end]))
    assert may[0].sum() == len({ids[0] for ids in spelt})  # and nothing else
    padded = lambda ids: np.array([*ids, which.end, which.end, which.end])
    assert few_shot.answered(which, padded(spelt[1]), names) == "circle at"  # of two that fit the longer
    assert few_shot.answered(which, padded(spelt[2]), names) == "cross"
    assert few_shot.answered(which, padded([5]), names) is None
    found = few_shot.classify(which, [[1, 5], [1, 6]], [names, ["a", "photo"]])
    assert len(found) == 2 and all(
        answer is None or answer in given for answer, given in zip(found, [names, ["a", "photo"]], strict=True)
    )
    with pytest.raises(ConfigError, match="2 prompts and 1 lists of names"):
        few_shot.classify(which, [[1], [2]], [names])


def test_intervals_hold_what_they_should():
    rng = np.random.default_rng(0)
    held = [low <= 0.7 <= high for _, low, high in (few_shot.interval(rng.random(80) < 0.7, 400) for _ in range(100))]
    assert 0.85 < np.mean(held) <= 1
    assert few_shot.interval([True, True]) == (1, 1, 1)
    share, low, high = few_shot.interval([True] * 30 + [False] * 10)
    assert share == 0.75 and 0.55 < low < 0.75 < high < 0.92
