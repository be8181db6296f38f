"""What a sweep is: a question, the configurations (arms) that answer it, how many seeds, and what is measured at the end.

A sweep is a Python file with `def sweep() -> Sweep`. How long an arm trains is not in it: that is the budget, given on
the command line, which takes the place of `training.steps` (mmdiff/sweeps/budget.py).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mmdiff import config, config_files
from mmdiff.config import ConfigError, require

DRAWING = ("steps", "guidance", "solver", "grid")
OPTIONS = ("count", "seed", *DRAWING, "phrases")
"""Of `mmdiff evaluate`."""
FROM_VALIDATION = ("x_error", "text_bits_per_byte")
"""Metrics that are the last validation's own numbers, so that nothing is measured twice."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """One question asked of a few configurations."""

    question: str
    """One sentence."""
    arms: Mapping[str, config.Config]
    """By name, in the order of the report; the first is the baseline."""
    seeds: int = 1
    """Runs of each arm: training.seed = 0, 1, ..."""
    baseline_seeds: int = 3
    """Runs of the baseline; how far they lie apart is what differences are judged by."""
    metrics: tuple[str, ...] = ("x_error",)
    """What `mmdiff evaluate` measures at the end of each run."""
    options: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)
    """Of `mmdiff evaluate`, as {"count": 500, "guidance": 2.0}."""

    def __post_init__(self):
        require(
            isinstance(self.question, str) and bool(self.question.strip()) and "\n" not in self.question.strip(),
            f"question={self.question!r} must be one line that says what the sweep is to find out.",
        )
        require(isinstance(self.arms, Mapping) and bool(self.arms), "arms is empty; give a dict of name: Config.")
        seen: dict[str, str] = {}
        for name, cfg in self.arms.items():
            require(
                isinstance(name, str) and NAME.fullmatch(name) is not None,
                f"arms: {name!r} is no name for an arm: up to 64 letters, digits, '.', '_' and '-', a letter or digit first.",
            )
            twin = seen.setdefault(name.lower(), name)
            require(twin == name, f"arms: {twin!r} and {name!r} would share a folder where case is ignored; rename one.")
            require(isinstance(cfg, config.Config), f"arms: {name!r} is {type(cfg).__name__}, not mmdiff.config.Config.")
        for field in ("seeds", "baseline_seeds"):
            value = getattr(self, field)
            require(isinstance(value, int) and value >= 1, f"{field}={value!r} must be at least 1.")
        metrics_are_names = isinstance(self.metrics, tuple | list) and all(isinstance(m, str) for m in self.metrics)
        require(metrics_are_names and bool(self.metrics), f"metrics={self.metrics!r} must be a tuple of names, one or more.")
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(self.metrics)))
        for name in self.options:
            hint = config.suggest(name, list(OPTIONS)) or f"; choose from {', '.join(OPTIONS)}."
            require(name in OPTIONS, f"options: unknown option {name!r} of mmdiff evaluate{hint}")
        for name, least in (("count", 1), ("seed", 0)):
            value = self.options.get(name, least)
            require(isinstance(value, int) and value >= least, f"options.{name}={value!r} must be at least {least}.")
        config_files.from_dict(config.Sampling, {n: v for n, v in self.options.items() if n in DRAWING}, "options.")

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def seeds_of(self, arm: str) -> range:
        return range(self.baseline_seeds if arm == self.baseline else self.seeds)

    def changed(self, change: Callable[[config.Config], config.Config]) -> "Sweep":
        """The same change made to every arm; a complaint names the arm."""
        arms = {}
        for name, cfg in self.arms.items():
            try:
                arms[name] = change(cfg)
            except ConfigError as error:
                raise ConfigError(f"arm {name!r}: {error}") from error
        return dataclasses.replace(self, arms=arms)

    def chosen(self, names: Iterable[str] | None) -> list[str]:
        """The arms named, in the sweep's order; all of them for None."""
        wanted = list(self.arms) if names is None else list(names)
        for name in wanted:
            hint = config.suggest(name, list(self.arms)) or f"; choose from {', '.join(self.arms)}."
            require(name in self.arms, f"unknown arm {name!r}{hint}")
        require(bool(wanted), f"--arms names no arm; choose from {', '.join(self.arms)}.")
        return [name for name in self.arms if name in wanted]


def load_sweep(path: str | Path) -> Sweep:
    """The Sweep that `sweep()` of a file returns, its metrics checked.

    Raises:
      ConfigError: no such file or function, or a sweep that cannot work.
    """
    path = Path(path)
    made = config_files.run_function(path, "sweep", Sweep)
    from mmdiff.evaluation.evaluate import check_names
    from mmdiff.evaluation.phrases import parse_groups

    try:
        check_names(made.metrics)
        if "phrase_accuracy" in made.metrics or "phrases" in made.options:
            parse_groups(str(made.options.get("phrases", "")))
    except ConfigError as error:
        raise ConfigError(f"{path}: metrics: {error}") from error
    return made
