"""The parameters of a front end that come from a user's folders: the tower's, and those of a Q-Former trained by itself."""

from typing import Any

from flax import nnx

from mmdiff import config
from mmdiff.adapters.tower import TOWER, tower_parameters
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
    if front.init:
        found, sizes = read_config(front.init), {"tokens": front.tokens, "width": front.width or width}
        sizes |= {"depth": front.depth, "heads": front.heads, "skipped": front.skipped, "features": front.tower.width}
        for name, wanted in sizes.items():
            field = "tower.width" if name == "features" else name
            config.require(
                found.get(name) == wanted,
                f"front_end.{field}={wanted}, and the Q-Former in {front.init} was trained with {found.get(name)}: set it to "
                "that.",
            )
        shape = front.width or width, front.tower.width, front.depth, front.heads, front.tokens
        former = load_module(lambda: QFormer(*shape, nnx.Rngs(0)), front.init, OWN, ignored=TEXT)
        given["image"] = {"adapter": {"former": on_host(former)}}
    return given
