"""N-way K-shot classification by a frozen language model: examples with their names, then an image without.

    (1) at place j only tokens stand open that place j of some name has, the end of the text behind the last one included
    (2) an answer counts as the name that it begins with

(1) makes the answer one of few, not always one of the names: tokens of two names may mix, and such an answer is none. With
names of one token each, chance is 1 / N. As published (Zhu et al., arXiv 2403.07874), the image in question is not among the
examples; in the code published with it, it is, with its name: an answer that can be copied, which is not done here.
"""

from collections.abc import Sequence

import numpy as np

from mmdiff.config import require
from mmdiff.in_context.language import Language


def open_tokens(language: Language, names: Sequence[str]) -> np.ndarray:
    """(1): bool [places, v]."""
    spelt = [[*language.encode(name), language.end] for name in names]
    may = np.zeros((max(map(len, spelt)), language.size), bool)
    for ids in spelt:
        may[np.arange(len(ids)), ids] = True
        may[len(ids) :, language.end] = True  # behind the end of a shorter name something must stand
    return may


def classify(language: Language, prompts: Sequence[Sequence[int]], names: Sequence[Sequence[str]]) -> list[str | None]:
    """For each prompt the one of its names that is answered, or None."""
    require(len(prompts) == len(names), f"{len(prompts)} prompts and {len(names)} lists of names: give one for each.")
    if not prompts:
        return []
    open_ = [open_tokens(language, each) for each in names]
    longest = max(len(may) for may in open_)
    filled = [np.concatenate([may, np.repeat(may[-1:], longest - len(may), 0)]) for may in open_]
    found = language.greedy(prompts, longest, filled)
    return [answered(language, ids, each) for ids, each in zip(found, names, strict=True)]


def answered(language: Language, ids: np.ndarray, names: Sequence[str]) -> str | None:
    """(2); of several the longest."""
    fits = [name for name in names if (spelt := language.encode(name)) == ids[: len(spelt)].tolist()]
    return max(fits, key=lambda name: len(language.encode(name)), default=None)


def interval(right: Sequence[bool], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Share that is right, and the bounds between which 95% of the shares of bootstrap samples lie."""
    values = np.asarray(right, np.float64)
    require(len(values) > 0, "an interval needs at least one answer.")
    drawn = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[drawn].mean(-1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)
