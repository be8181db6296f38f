"""Probe metrics: perfect answers score exactly 1, wrong ones less, errors are in levels and dots."""

import math

import pytest

from mmdiff import config
from mmdiff.data.probes import QUESTIONS
from mmdiff.document import Document, Text
from mmdiff.evaluation import probes
from mmdiff.evaluation.evaluate import METRICS, evaluate
from mmdiff.evaluation.task import Task

from .oracle import Confused, Oracle

COUNT = 12


def configured(*kinds: str) -> config.Config:
    mix = tuple((kind, 1.0) for kind in kinds)
    return config.Config(data=config.Data(source="probes", generator_image_size=64, generator=mix), model=config.Model(patch=8))


def asked(cfg: config.Config, *kinds: str) -> list[Document]:
    task = Task(Oracle(cfg, []), COUNT)
    return [document for kind in kinds for document in probes.held_out(task, kind)]


def told(documents, answer) -> list[Document]:
    """The same questions, answered by `answer` of the right one."""
    return [Document(*d.segments[:-1], Text(f" {answer(d.extra['answer'])}")) for d in documents]


def test_a_perfect_model_scores_one_and_a_confused_one_less():
    cfg = configured()
    documents = asked(cfg, *QUESTIONS)
    right = evaluate(Oracle(cfg, documents), ["probe_accuracy"], count=COUNT)
    wrong = evaluate(Confused(cfg, documents), ["probe_accuracy"], count=COUNT)
    sizes = {f"probe_accuracy_ocr_{d.extra['size']}" for d in documents if "size" in d.extra}
    names = {"probe_accuracy", *(f"probe_accuracy_{kind}" for kind in QUESTIONS), *sizes}
    errors = {"probe_colour_error", "probe_count_error"}
    assert set(right) == {f"{name}{end}" for name in names | errors for end in ("", "_stderr")} and len(sizes) > 2
    assert all(right[name] == 1.0 and right[f"{name}_stderr"] == 0.0 for name in names)
    assert all(right[name] == 0.0 for name in errors)
    assert all(wrong[name] < 0.7 for name in names - {"probe_accuracy_same"})  # a coin is right half of the time
    assert wrong["probe_colour_error"] > 30 and wrong["probe_count_error"] > 2


def test_the_whole_is_the_mean_of_the_kinds_asked():
    cfg = configured("count", "glyphs", "clock")
    documents = asked(cfg, "count", "clock")
    half = [*told(documents[: COUNT // 2], lambda _: "x"), *documents[COUNT // 2 :]]
    result = evaluate(Oracle(cfg, half), ["probe_accuracy"], count=COUNT)
    assert (result["probe_accuracy_count"], result["probe_accuracy_clock"], result["probe_accuracy"]) == (0.5, 1.0, 0.75)
    assert result["probe_accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / (COUNT - 1)) / 2)
    assert "probe_accuracy_ocr" not in result and not any("glyphs" in name for name in result)


def test_errors_are_in_levels_and_dots():
    cfg = configured("colour", "count")
    colours, counts = (asked(cfg, kind) for kind in ("colour", "count"))

    def nearly(answer: str) -> str:
        """Off by 6 levels in the last of three channels, by 2 dots."""
        if len(answer) < 6:
            return str(int(answer) + 2)
        return bytes([*bytes.fromhex(answer)[:2], (level := int(answer[4:], 16)) + (6 if level < 128 else -6)]).hex()

    result = evaluate(Oracle(cfg, told(colours + counts, nearly)), ["probe_accuracy"], count=COUNT)
    assert (result["probe_colour_error"], result["probe_count_error"], result["probe_accuracy"]) == (2.0, 2.0, 0.0)
    some = [*told(colours[:3] + counts[:3], lambda _: "many"), *told(colours[3:] + counts[3:], nearly)]
    result = evaluate(Oracle(cfg, some), ["probe_accuracy"], count=COUNT)
    assert (result["probe_colour_error"], result["probe_count_error"]) == (2.0, 2.0)
    none = evaluate(Oracle(cfg, told(colours + counts, lambda a: f"{a}g")), ["probe_accuracy"], count=COUNT)
    assert "probe_colour_error" not in none and "probe_count_error" not in none and none["probe_accuracy"] == 0


def test_it_applies_where_questions_were_asked():
    metric = METRICS["probe_accuracy"]
    assert metric.applies(Task(Oracle(configured(), []))) and metric.applies(Task(Oracle(configured("odd"), [])))
    for cfg in (configured("glyphs"), config.Config(data=config.Data(source="words"))):
        assert not metric.applies(Task(Oracle(cfg, [])))
    with pytest.raises(config.ConfigError, match="probe_accuracy cannot be measured on data.source='probes'"):
        evaluate(Oracle(configured("glyphs"), []), ["probe_accuracy"])
