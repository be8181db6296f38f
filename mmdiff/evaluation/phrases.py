"""How well captions name what a user cares about, and what naming the most frequent answer would score.

A group is a list of phrases that exclude one another, such as "black hair", "brown hair", "blond hair". The class of a
caption is the first phrase of the group that it contains as whole words (case aside), or none of them. A caption the
model writes is right when it has the class of the true one; the majority is the class most frequent among the very
captions it is measured on, which favours the majority.
"""

import collections
import re
from collections.abc import Sequence

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
    """For each group, named by its first phrase: `phrase_accuracy_<name>` and `phrase_majority_<name>`."""
    if not task.phrases:
        raise ConfigError("phrase_accuracy needs phrases, for example --phrases 'black hair|brown hair;smiling'.")
    found = pictures(task.source, task.model.cfg, task.count)
    written = task.describe([Document(image) for image, _ in found])
    result: dict[str, float] = {}
    for group in task.phrases:
        true = [class_of(text, group) for _, text in found]
        right = [class_of(text, group) == wanted for text, wanted in zip(written, true, strict=True)]
        result |= mean(f"phrase_accuracy_{name_of(group)}", right)
        result[f"phrase_majority_{name_of(group)}"] = collections.Counter(true).most_common(1)[0][1] / len(true)
    return result


def class_of(text: str, group: Sequence[str]) -> str | None:
    """The first phrase of the group that stands in the text as whole words."""
    return next((p for p in group if re.search(rf"(?<!\w){re.escape(p)}(?!\w)", text, re.IGNORECASE)), None)


def name_of(group: Sequence[str]) -> str:
    return re.sub(r"\W+", "_", group[0].lower()).strip("_")
