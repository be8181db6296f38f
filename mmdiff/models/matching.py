"""Networks of about the same number of parameters: what a comparison of architectures should hold equal.

    width = argmin |log(parameters(width) / target)|        over whole numbers of steps, all else as it is

A step is a head for networks with heads (dit, uvit, transformer blocks), else 8. Depth, patch and channels stay: they are
choices of the architecture, and belong to whoever compares.
"""

import dataclasses
import functools
import math

import jax

from mmdiff import config
from mmdiff.models.network import Network

STEP = 8


def parameter_count(cfg: config.Config, vocabulary_size: int = 0) -> int:
    """Parameters of the network of an experiment; nothing is computed."""
    params = jax.eval_shape(Network.of(cfg, vocabulary_size).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def matched(cfg: config.Config, target: int, *, tolerance: float = 0.1, vocabulary_size: int = 0) -> config.Config:
    """`cfg` at the width whose number of parameters is nearest to `target`.

    Args:
      tolerance: the largest acceptable deviation from `target`, as a fraction of it.
      vocabulary_size: only matters with text.
    Raises:
      ConfigError: no width comes that near.
    """
    model = cfg.model
    headed = model.network in ("dit", "uvit") or (model.network == "transfusion" and model.block == "attention")
    step = model.head_width if headed else STEP
    at = lambda steps: dataclasses.replace(cfg, model=dataclasses.replace(model, width=steps * step))
    count = functools.cache(lambda steps: parameter_count(at(steps), vocabulary_size))
    low = _narrowest(at)
    high = low
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:  # count(low) < target <= count(high), unless the narrowest is too wide already
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    best = min((low, high), key=lambda steps: abs(math.log(count(steps) / target)))
    found = count(best)
    if abs(found / target - 1) > tolerance:
        remedy = "lower model.head_width" if headed else "change model.depth"
        raise config.ConfigError(
            f"no model.width of a multiple of {step} gives {target} parameters: model.width={best * step} has {found}. "
            f"{remedy[0].upper()}{remedy[1:]} or raise the tolerance, {tolerance}."
        )
    return at(best)


def _narrowest(at) -> int:
    """The smallest number of steps that the configuration allows."""
    steps = 1
    while True:  # ends at the latest where the given width lies
        try:
            at(steps)
            return steps
        except config.ConfigError:
            steps += 1
