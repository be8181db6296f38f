"""An evaluation in progress: the model, the held-out documents, and how much is asked of it."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmdiff import config
from mmdiff.data.batches import Batches
from mmdiff.data.sources import Source, open_source
from mmdiff.document import DataError, Document
from mmdiff.evaluation import prompts
from mmdiff.evaluation.prompts import Drawing
from mmdiff.training.validate import validate

VALIDATION_ROWS = 64  # when the configuration switches validation off


SPLITS = ("validation", "train")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How sets of generated and real images are compared (mmdiff/evaluation/sets.py)."""

    features: str | None = None
    """One of features.NAMES; None: random, and its metrics only where they are named."""
    weights: Path | None = None
    """File of these features' weights: inception, encoder."""
    weights_sha256: str | None = None
    """inception: hash of another file than the known one."""
    split: str = "validation"
    """Whose images are real, and whose prompts are drawn: one of SPLITS."""
    cache: Path | None = None
    """Folder where the encoder is kept."""

    @property
    def space(self) -> str:
        return self.features or "random"


@dataclasses.dataclass(frozen=True)
class Task:
    """What every metric reads. `drawing`: sampling options of the images, where they differ from the configuration's."""

    model: Any
    count: int = 200
    seed: int = 0
    drawing: dict[str, Any] = dataclasses.field(default_factory=dict)
    phrases: Sequence[Sequence[str]] = ()
    given: Source | None = None
    comparison: Comparison = Comparison()
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What metrics add to the protocol."""
    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What several metrics share, by `once`."""

    @functools.cached_property
    def source(self) -> Source:
        """The held-out documents. Raises DataError when there are none."""
        source = open_source(self.model.cfg, "validation") if self.given is None else self.given
        if not len(source):
            raise DataError("the data has no held-out documents; give a folder that has some (--data).")
        return source

    @functools.cached_property
    def wanted(self) -> list[Drawing]:
        """The drawings whose results are compared with the data, as sets."""
        source = self.source if self.comparison.split == "validation" else open_source(self.model.cfg, "train")
        return self.wanted_of(source)

    def wanted_of(self, source: Source) -> list[Drawing]:
        return prompts.drawings(source, self.model.cfg, self.count)

    @functools.cached_property
    def generated(self) -> list[np.ndarray]:
        """What is drawn for `wanted`."""
        return self.draw(self.wanted)

    @property
    def reconstructs(self) -> bool:
        """Whether this is about a tokenizer (mmdiff/tokenizers/model.py), not a model of documents."""
        return self.model.cfg.model.network in config.TOKENIZERS

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned when it was first asked for under this name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def warn(self, line: str) -> None:
        """Say on stderr, and in the protocol, why a number may mislead."""
        known = self.notes.setdefault("warnings", [])
        if line in known:
            return
        known.append(line)
        print(f"warning: {line}", file=sys.stderr)

    @functools.cached_property
    def validation(self) -> dict[str, float]:
        """What training reports as validation, on the same rows."""
        model = self.model
        tokenizer = None if self.reconstructs else model.tokenizer
        batches = Batches(self.source, model.vocabulary, model.cfg, learn=False, tokenizer=tokenizer)
        rows = model.cfg.training.validation_rows or VALIDATION_ROWS
        return validate(model.network, model.cfg, model.params, batches, rows)

    def draw(self, wanted: Sequence[Drawing]) -> list[np.ndarray]:
        """What the model draws after the prompts, or a tokenizer gives back of the real images: uint8 [h, w, 3] each."""
        if self.reconstructs:
            return list(self.model.reconstruct([drawing.image.pixels for drawing in wanted]))
        return prompts.draw(self.model, wanted, **self.drawing | {"seed": self.seed})

    def describe(self, asked: Sequence[Document]) -> list[str]:
        return prompts.describe(self.model, asked, seed=self.seed)


def mean(name: str, scores: Sequence[float] | Sequence[bool]) -> dict[str, float]:
    """Mean of some scores, and its standard error as `<name>_stderr`."""
    values = np.asarray(scores, np.float64)
    if not len(values):
        raise DataError(f"{name}: the held-out data has no document to measure it on.")
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: float(values.mean()), f"{name}_stderr": float(error)}
