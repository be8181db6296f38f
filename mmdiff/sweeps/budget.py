"""How long each run of an arm trains, and what of its configuration follows from that.

    5m-per-arm           training steps only: neither compilation nor validation and samples count (also s, h)
    2000steps-per-arm
    1e15flops-per-arm    floating-point operations as mmdiff/training/flops.py counts them

Every seed of an arm gets the whole budget.
"""

import dataclasses
import math
import re

from mmdiff import config
from mmdiff.config import ConfigError

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
VALIDATIONS = 15  # of a run: enough for a curve
LOGS = 100
SAVE_SECONDS = 60.0  # a killed run loses this much at most,
SAVES = 5  # or this part of itself, if that is less
WARMUP = 10  # one part in ten of a run at most
SET_HERE = ("steps", "seed", "log_every", "validate_every", "checkpoint_every")
"""Fields of `training` that a sweep sets itself."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one run may spend: `amount` seconds, steps or flops."""

    kind: str
    amount: float
    text: str

    @property
    def words(self) -> str:
        """For people: `5 minutes`, `2,000 steps`, `1e+15 FLOPs`."""
        if self.kind == "seconds":
            name, size = next((n, s) for n, s in (("hour", 3600), ("minute", 60), ("second", 1)) if self.amount >= s or s == 1)
            return f"{self.amount / size:.4g} {name}{'s' * (self.amount != size)}"
        if self.kind == "steps":
            return f"{self.amount:,.0f} step{'s' * (self.amount != 1)}"
        return f"{self.amount:.4g} FLOPs"

    def steps(self, step_seconds: float, flops_per_step: float) -> int:
        """Steps that it pays for, at least 1."""
        unit = {"seconds": step_seconds, "steps": 1.0, "flops": flops_per_step}[self.kind]
        return max(1, math.floor(self.amount / unit * (1 + 1e-12)))


def parse(text: str) -> Budget:
    """`5m-per-arm` and the like.

    Raises:
      ConfigError: says what a budget looks like.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)(s|m|h|steps|flops)-per-arm", text.strip().lower())
    amount = float(found[1]) if found else 0.0
    if found is None or not 0 < amount < math.inf:
        raise ConfigError(
            f"--budget {text!r} is no budget; write 5m-per-arm (or s, h), 2000steps-per-arm or 1e15flops-per-arm."
        )
    unit = found[2]
    if unit == "steps" and (amount != int(amount)):
        raise ConfigError(f"--budget {text!r}: a number of steps is whole.")
    return Budget("seconds" if unit in SECONDS else unit, amount * SECONDS.get(unit, 1.0), text.strip())


def fitted(cfg: config.Config, steps: int, step_seconds: float, seed: int = 0) -> config.Config:
    """The configuration of a run of that many steps: its learning rate, reports, saves and samples follow their number.

    The schedule ends with the run. Its warm-up is shortened to a tenth of the run; `optimizer.points` are stretched from
    the arm's own `training.steps`. Samples are drawn once, at the end, unless the arm wants none.
    """
    optimizer, training = cfg.optimizer, cfg.training
    points = {max(0, round(at * steps / training.steps)): factor for at, factor in optimizer.points}
    optimizer = dataclasses.replace(
        optimizer, warmup=min(optimizer.warmup, max(1, steps // WARMUP)), points=tuple(sorted(points.items()))
    )
    training = dataclasses.replace(
        training,
        steps=steps,
        seed=seed,
        log_every=max(1, steps // LOGS),
        validate_every=max(1, steps // VALIDATIONS),
        validation_rows=training.validation_rows or config.Training().validation_rows,
        checkpoint_every=max(1, min(math.ceil(SAVE_SECONDS / step_seconds), math.ceil(steps / SAVES))),
        sample_every=steps if training.sample_every else 0,
    )
    return dataclasses.replace(cfg, optimizer=optimizer, training=training)
