"""The vision half of a network of images and texts, as tokenizers and front ends hold it: in their own parameters, frozen.

    features    the residual stream before the last layer, without the class token: in CLIP nothing reads what the last layer
                makes of patches, so it is not trained for them (LLaVA reads hidden state -2, BLIP-2 39 of 40 layers)
    embedding   the vector of the whole image, of unit length, as CLIP compares it with texts

Letters: n images, h and w pixels, t patches of the tower, d its width, e width of its embedding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.pretrained.clip import clip_config, unit, vision_tower
from mmdiff.pretrained.encoder import normalised

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


def vision_config(sizes: config.Tower) -> dict[str, Any]:
    """What a config.json calls these sizes."""
    return {theirs: getattr(sizes, ours) for ours, theirs in NAMES.items()}


def sizes_of(told: dict[str, Any], where: str | Path) -> config.Tower:
    """Sizes of the vision half of a CLIP with this config.json, which `where` names.

    Raises:
      DataError: as of `clip_config`.
    """
    cfg = clip_config(told, where)
    found = {ours: cfg["vision_config"][theirs] for ours, theirs in NAMES.items()}
    return config.Tower(**found, embedding=cfg["projection_dim"])


class Tower(nnx.Module):
    def __init__(self, sizes: config.Tower, rngs: nnx.Rngs):
        self.side = sizes.side
        self.vision = vision_tower(vision_config(sizes), rngs)
        self.out = nnx.Linear(sizes.width, sizes.embedding, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float [n, h, w, 3] in [-1, 1] to features float32 [n, t, d] and embeddings [n, e], through which nothing is
        learnt."""
        x = self.vision(normalised((images + 1) * 127.5, self.side), -1)
        last = self.vision.encoder.layers[-1](x, causal=False)
        embedding = unit(self.out(self.vision.norm(last[:, 0])))
        return jax.lax.stop_gradient((x[:, 1:].astype(jnp.float32), embedding.astype(jnp.float32)))


def on_host(module: nnx.Module) -> dict[str, Any]:
    """Its parameters: a nested dict of NumPy arrays."""
    return jax.tree.map(np.asarray, named(nnx.to_pure_dict(nnx.state(module, nnx.Param))))


def named(tree: Any) -> Any:
    """Nested dicts with strings for the numbers that lists of modules have, as checkpoints keep them."""
    return {str(key): named(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def numbered(tree: Any) -> Any:
    """The inverse, of the keys."""
    if isinstance(tree, Mapping):
        return {int(key) if str(key).isdigit() else key: numbered(value) for key, value in tree.items()}
    return tree
