"""The vision tower of a front end: its module, and its weights from a user's folder.

It is a part of the network's parameters under the name `TOWER`, so that checkpoints hold it; frozen (front_end.frozen) it
has no gradient, no optimiser's state and no update.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.pretrained.blip2 import load_blip2_vision
from mmdiff.pretrained.clip import load_clip
from mmdiff.pretrained.encoder import VisionTower
from mmdiff.pretrained.load import read_config

TOWER = "tower"
NAMES = {  # in a vision_config of the transformers package
    "side": "image_size",
    "patch": "patch_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "activation": "hidden_act",
    "epsilon": "layer_norm_eps",
}
USUAL: dict[str, dict[str, Any]] = {  # where a config.json leaves it out
    "clip": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "blip2": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
}


def make_tower(front: config.FrontEnd, rngs: nnx.Rngs) -> VisionTower:
    """One with random weights."""
    tower, clip = front.tower, front.names == "clip"
    sizes = {theirs: getattr(tower, ours) for ours, theirs in NAMES.items()}
    return VisionTower(sizes, tower.activation, tower.epsilon, rngs, patch_bias=not clip, first_norm=clip)


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


def on_host(module: nnx.Module) -> dict[str, Any]:
    """Its parameters: a nested dict of NumPy arrays."""
    return jax.tree.map(np.asarray, named(nnx.to_pure_dict(nnx.state(module, nnx.Param))))


def named(tree: Any) -> Any:
    """Nested dicts with strings for the numbers of lists, as checkpoints keep them."""
    return {str(key): named(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def numbered(tree: Any) -> Any:
    """The inverse, of the keys."""
    if isinstance(tree, dict):
        return {int(key) if key.isdigit() else key: numbered(value) for key, value in tree.items()}
    return tree
