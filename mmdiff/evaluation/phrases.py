"""How well captions name what a user cares about, and what naming the most frequent answer would score.

A group is a list of phrases that exclude one another, such as "black hair", "brown hair", "blond hair". The class of a
caption is the first phrase of the group that it contains as whole words (case aside), or none of them. A caption the
model writes is right when it has the class of the true one; the majority is the class most frequent among the very
captions it is measured on, which favours the majority.
"""

import re
from collections.abc import Sequence

import numpy as np

from mmdiff.config import ConfigError
from mmdiff.document import Document
from mmdiff.evaluation.prompts import pictures
from mmdiff.evaluation.task import Task, mean


def parse_groups(text: str) -> list[list[str]]:
    """Groups from "black hair|brown hair; smiling": `;` between groups, `|` between the phrases of one.

    Raises:
      ConfigError: an empty group, or two groups that begin alike (they are reported by their first phrase).
    """
    groups = [[phrase.strip() for phrase in group.split("|") if phrase.strip()] for group in text.split(";")]
    if not all(groups):
        raise ConfigError(f"phrases {text!r} has an empty group; write for example 'black hair|brown hair;smiling'.")
    names = [name_of(group) for group in groups]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"phrases {text!r}: two groups begin with {twice.replace('_', ' ')!r}; reorder one of them.")
    return groups


def phrase_accuracy(task: Task) -> dict[str, float]:
    """For each group, named by its first phrase: `phrase_accuracy_<name>` and `phrase_majority_<name>`; of several groups
    also their mean, `phrase_accuracy`."""
    if not task.phrases:
        raise ConfigError("phrase_accuracy needs phrases, for example --phrases 'black hair|brown hair;smiling'.")
    found = pictures(task.source, task.model.cfg, task.count)
    written = task.describe([Document(image) for image, _ in found])
    true = classes([text for _, text in found], task.phrases)
    result = means("phrase_accuracy", classes(written, task.phrases) == true, task.phrases)
    for group, column in zip(task.phrases, true.T, strict=True):
        result[f"phrase_majority_{name_of(group)}"] = np.unique(column, return_counts=True)[1].max() / len(column)
    return result


def classes(texts: Sequence[str], groups: Sequence[Sequence[str]]) -> np.ndarray:
    """Classes int [n, groups] of texts: the number of the phrase in its group, or the length of the group for none."""
    found = [[class_of(text, group) for group in groups] for text in texts]
    numbers = [[len(g) if p is None else list(g).index(p) for p, g in zip(row, groups, strict=True)] for row in found]
    return np.array(numbers, np.int64).reshape(len(texts), len(groups))


def means(name: str, right: np.ndarray, groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """`<name>`, over all groups, and `<name>_<group>` of right answers bool [n, groups], with their standard errors."""
    result = mean(name, right.mean(-1)) if len(groups) > 1 else {}
    for column, group in zip(right.T, groups, strict=True):
        result |= mean(f"{name}_{name_of(group)}", column)
    return result


def class_of(text: str, group: Sequence[str]) -> str | None:
    """The first phrase of the group that stands in the text as whole words."""
    return next((p for p in group if re.search(rf"(?<!\w){re.escape(p)}(?!\w)", text, re.IGNORECASE)), None)


def name_of(group: Sequence[str]) -> str:
    return re.sub(r"\W+", "_", group[0].lower()).strip("_")
