"""The parameters of a front end that come from a user's folders: the tower's, and of what was trained before."""

from typing import Any

from mmdiff import config
from mmdiff.adapters.base import TOWER, adapter
from mmdiff.pretrained.blip2 import load_blip2_vision, read_blip2_vision
from mmdiff.pretrained.clip import load_clip_vision, read_clip_vision
from mmdiff.pretrained.tower import NAMES, on_host

READ = {"clip": (read_clip_vision, load_clip_vision), "blip2": (read_blip2_vision, load_blip2_vision)}


def front_end_parameters(front: config.FrontEnd, width: int) -> dict[str, Any]:
    """A part of a network's parameters, none without a front end. `width`: of the model.

    Raises:
      ConfigError, DataError: a folder does not hold what the configuration says.
    """
    if front.kind == "none":
        return {}
    tower = tower_parameters(front)
    if not front.init:
        return {TOWER: tower}
    tower, own = adapter(front).trained(front, width, tower)
    return {TOWER: tower, "image": {"adapter": own}}


def tower_parameters(front: config.FrontEnd) -> dict[str, Any]:
    """The tower's weights from front_end.encoder: a nested dict of float32 arrays.

    Raises:
      ConfigError: the folder's sizes are not those of front_end.tower. DataError: as of `load_clip_vision`.
    """
    read, load = READ[front.names]
    found = read(front.encoder)
    for ours, theirs in NAMES.items():
        value, wanted = found[theirs], getattr(front.tower, ours)
        config.require(
            value == wanted,
            f"front_end.tower.{ours}={wanted!r}, and the tower in {front.encoder} has {theirs}={value!r}: set it to that.",
        )
    return on_host(load(front.encoder))
