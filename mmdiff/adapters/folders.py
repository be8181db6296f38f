"""The parameters of a front end that come from a user's folders: the tower's, and of what was trained before."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.adapters.tower import TOWER, tower_parameters
from mmdiff.config_files import run_config
from mmdiff.nn.qformer import QFormer
from mmdiff.pretrained.load import Rule, load_module, read_config
from mmdiff.pretrained.tower import on_host

OWN = [Rule(r"former/(.*)", "{}")]
TEXT = [r"(?!former/).*"]  # what the Q-Former learnt from texts with


def front_end_parameters(front: config.FrontEnd, width: int) -> dict[str, Any]:
    """A part of a network's parameters, none without a front end. `width`: of the model.

    Raises:
      ConfigError, DataError: a folder does not hold what the configuration says.
    """
    if front.kind == "none":
        return {}
    given: dict[str, Any] = {TOWER: tower_parameters(front)}
    if not front.init:
        return given
    return _of_merger(front, given) if front.kind == "merger" else given | _of_qformer(front, width)


def _of_qformer(front: config.FrontEnd, width: int) -> dict[str, Any]:
    found, sizes = read_config(front.init), {"tokens": front.tokens, "width": front.width or width}
    sizes |= {"depth": front.depth, "heads": front.heads, "skipped": front.skipped, "features": front.tower.width}
    for name, wanted in sizes.items():
        field = "tower.width" if name == "features" else name
        config.require(
            found.get(name) == wanted,
            f"front_end.{field}={wanted}, and the Q-Former in {front.init} was trained with {found.get(name)}: set it to that.",
        )
    shape = front.width or width, front.tower.width, front.depth, front.heads, front.tokens
    former = load_module(lambda: QFormer(*shape, nnx.Rngs(0)), front.init, OWN, ignored=TEXT)
    return {"image": {"adapter": {"former": on_host(former)}}}


def _of_merger(front: config.FrontEnd, given: dict[str, Any]) -> dict[str, Any]:
    """With the merger and the selector of a tokenizer, which must have been trained on this tower."""
    from mmdiff.training.checkpoint import restore_params

    trained = run_config(front.init)
    config.require(
        trained.model.network == "lavit" and trained.tokenizer.causal and trained.tokenizer.keep < 1,
        f"front_end.init={front.init!r} is no LaVIT tokenizer that selects (model.network='lavit', tokenizer.keep below 1 and "
        "tokenizer.causal=True): name the run of one.",
    )
    config.require(
        trained.tokenizer.depth == front.depth,
        f"front_end.depth={front.depth}, and the merger in {front.init} has {trained.tokenizer.depth} layers: set it to that.",
    )
    params = jax.tree.map(np.asarray, restore_params(Path(front.init) / "checkpoints")[0])
    seen, own = jax.tree.leaves(params["tower"]["vision"]), jax.tree.leaves(given[TOWER])
    config.require(
        len(seen) == len(own) and all(np.array_equal(a, b) for a, b in zip(seen, own, strict=True)),
        f"front_end.encoder={front.encoder!r} is not the encoder that {front.init} was trained on: name that.",
    )
    tower = given[TOWER] | {"selector": params["selector"]}
    return {TOWER: tower, "image": {"adapter": {"merger": params["merger"]}}}
