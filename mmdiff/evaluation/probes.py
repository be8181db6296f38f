"""Metrics on the generator `probes`: answers about fine detail, of the configuration's held-out split.

A guess that knows the kinds but does not look is right once in 2 (same), 30 (count), 64 (spot), 100 (ocr), 144 (clock) or
side^2 (odd) questions, and hardly ever for colour. See mmdiff/data/probes.py.
"""

import math
import re
from collections.abc import Callable, Sequence

from mmdiff.data.probes import DEFAULT_MIX, QUESTIONS, SIZES, Probes
from mmdiff.document import Document
from mmdiff.evaluation.task import Task, mean


def asked(task: Task) -> list[str]:
    """The kinds of questions in the mix that the model was trained on."""
    data = task.model.cfg.data
    mix = {} if task.reconstructs else dict(data.generator or DEFAULT_MIX)
    return [kind for kind in QUESTIONS if data.source == "probes" and mix.get(kind, 0) > 0]


def probe_accuracy(task: Task) -> dict[str, float]:
    """`probe_accuracy_<kind>`: share of greedy answers that are exactly right, `count` questions per kind;
    `probe_accuracy`: its mean over kinds; `probe_accuracy_ocr_<size>`: of the digits of one size;
    `probe_colour_error`: mean |difference| of the three levels, over the answers that are colours at all;
    `probe_count_error`: mean |difference|, over the answers that are numbers. The errors are left out where no answer is."""
    kinds = asked(task)
    result: dict[str, float] = {}
    for kind in kinds:
        documents = held_out(task, kind)
        answers = task.describe([Document(*d.segments[:-1]) for d in documents])
        wanted = [d.extra["answer"] for d in documents]
        right = [a == w for a, w in zip(answers, wanted, strict=True)]
        result |= mean(f"probe_accuracy_{kind}", right)
        if kind == "ocr":
            for size in SIZES:
                of_size = [r for r, d in zip(right, documents, strict=True) if d.extra["size"] == size]
                if of_size:
                    result |= mean(f"probe_accuracy_ocr_{size}", of_size)
        elif kind == "colour":
            result |= _error("probe_colour_error", answers, wanted, r"[0-9a-f]{6}", bytes.fromhex)
        elif kind == "count":
            result |= _error("probe_count_error", answers, wanted, r"[0-9]{1,3}", lambda text: [int(text)])
    overall = sum(result[f"probe_accuracy_{kind}"] for kind in kinds) / len(kinds)
    error = math.hypot(*(result[f"probe_accuracy_{kind}_stderr"] for kind in kinds)) / len(kinds)
    return {"probe_accuracy": overall, "probe_accuracy_stderr": error} | result


def held_out(task: Task, kind: str) -> list[Document]:
    """`task.count` held-out documents of one kind; the same for every run of these settings."""
    data = task.model.cfg.data
    made = Probes(0, task.count, data.generator_image_size, ((kind, 1.0),), data.validation_split)
    return [made[i] for i in range(task.count)]


def _error(
    name: str, answers: Sequence[str], wanted: Sequence[str], pattern: str, parse: Callable[[str], Sequence[int]]
) -> dict[str, float]:
    """Mean absolute difference of the numbers that answers stand for; nothing where no answer fits the pattern."""
    pairs = [(parse(a), parse(w)) for a, w in zip(answers, wanted, strict=True) if re.fullmatch(pattern, a)]
    errors = [sum(abs(x - y) for x, y in zip(a, w, strict=True)) / len(w) for a, w in pairs]
    return mean(name, errors) if errors else {}
