"""The vision tower of a front end: its module, and its weights from a user's folder.

It is a part of the network's parameters under the name `TOWER`, so that checkpoints hold it; frozen (front_end.frozen) it
has no gradient, no optimiser's state and no update.
"""

from typing import Any

from flax import nnx

from mmdiff import config
from mmdiff.adapters.merger import SelectingTower
from mmdiff.pretrained.blip2 import load_blip2_vision
from mmdiff.pretrained.clip import load_clip
from mmdiff.pretrained.encoder import VisionTower
from mmdiff.pretrained.load import read_config
from mmdiff.pretrained.tower import NAMES, USUAL, on_host, vision_config

TOWER = "tower"


def make_tower(front: config.FrontEnd, rngs: nnx.Rngs) -> VisionTower:
    """One with random weights."""
    tower, clip = front.tower, front.names == "clip"
    if front.kind == "merger":
        return SelectingTower(tower, rngs)
    return VisionTower(vision_config(tower), tower.activation, tower.epsilon, rngs, patch_bias=not clip, first_norm=clip)


def tower_parameters(front: config.FrontEnd) -> dict[str, Any]:
    """The tower's weights from front_end.encoder: a nested dict of float32 arrays.

    Raises:
      ConfigError: the folder's sizes are not those of front_end.tower. DataError: as of `load_module`.
    """
    found = read_config(front.encoder)
    found = USUAL[front.names] | found.get("vision_config", found)
    for ours, theirs in NAMES.items():
        value, wanted = found.get(theirs), getattr(front.tower, ours)
        config.require(
            value == wanted,
            f"front_end.tower.{ours}={wanted!r}, and {front.encoder}/config.json says {theirs}={value!r}: set it to that.",
        )
    made = load_clip(front.encoder).vision if front.names == "clip" else load_blip2_vision(front.encoder)
    return on_host(made)
