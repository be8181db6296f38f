"""The frozen encoder of a semantic tokenizer: the vision half of a CLIP folder, which travels in the tokenizer's parameters.

    features    what the last layer leaves on the residual stream, before the last norm, without the class token
    embedding   the vector of the whole image, of unit length, as CLIP compares it with texts

Source of the features: LaVIT's code (Jin et al., arXiv 2309.04669).
Letters: n images, h and w pixels, t patches of the encoder, d its width, e width of its embedding.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.config_files import run_config
from mmdiff.pretrained.clip import load_clip, unit
from mmdiff.pretrained.encoder import VisionTower, normalised
from mmdiff.pretrained.load import read_config


class Tower(nnx.Module):
    def __init__(self, sizes: config.Tower, rngs: nnx.Rngs):
        vision = {
            "image_size": sizes.side,
            "patch_size": sizes.patch,
            "hidden_size": sizes.width,
            "intermediate_size": sizes.hidden,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": sizes.heads,
            "hidden_act": sizes.activation,
            "layer_norm_eps": sizes.epsilon,
        }
        self.side = sizes.side
        self.vision = VisionTower(vision, sizes.activation, sizes.epsilon, rngs, patch_bias=False, first_norm=True)
        self.out = nnx.Linear(sizes.width, sizes.embedding, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float [n, h, w, 3] in [-1, 1] to features float32 [n, t, d] and embeddings [n, e], through which nothing is
        learnt."""
        x = self.vision(normalised((images + 1) * 127.5, self.side))
        embedding = unit(self.out(self.vision.norm(x[:, 0])))
        return jax.lax.stop_gradient((x[:, 1:].astype(jnp.float32), embedding.astype(jnp.float32)))


def read_sizes(folder: str) -> config.Tower:
    """Sizes of the vision half in a CLIP folder.

    Raises:
      DataError: no config.json there. ConfigError: it describes no CLIP.
    """
    told = read_config(folder)
    vision, out = told.get("vision_config"), told.get("projection_dim")
    names = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if not isinstance(vision, dict) or out is None or any(name not in vision for name in names):
        raise config.ConfigError(
            f"tokenizer.encoder={folder!r}: its config.json does not describe a CLIP (vision_config with {', '.join(names)}, "
            "and projection_dim)."
        )
    activation, epsilon = vision.get("hidden_act", "quick_gelu"), vision.get("layer_norm_eps", 1e-5)
    return config.Tower(
        **dict(zip(SIZES, (vision[name] for name in names), strict=True)), embedding=out, activation=activation, epsilon=epsilon
    )


SIZES = ("side", "patch", "width", "hidden", "depth", "heads")


def resolved(cfg: config.Config, workdir: Path) -> config.Config:
    """`cfg` with the sizes of its frozen encoder: those that the run in `workdir` began with, or those of the folder.

    Raises:
      DataError, ConfigError: as of `read_sizes`.
    """
    settings = cfg.tokenizer
    if not settings.encoder or settings.tower.side:
        return cfg
    if (workdir / "config.json").is_file() and (old := run_config(workdir).tokenizer).encoder == settings.encoder:
        tower = old.tower
    else:
        tower = read_sizes(settings.encoder)
    return dataclasses.replace(cfg, tokenizer=dataclasses.replace(settings, tower=tower))


def read_tower(settings: config.Tokenizer) -> dict[str, Any]:
    """The parameters of `Tower`, arrays of the host.

    Raises:
      DataError: the folder holds no such encoder. ConfigError: one of other sizes.
    """
    found = read_sizes(settings.encoder)
    config.require(
        found == settings.tower,
        f"tokenizer.encoder={settings.encoder!r} has sizes {found}, not tokenizer.tower={settings.tower}; leave that out.",
    )
    clip = load_clip(settings.encoder)
    parts = {"vision": clip.vision, "out": clip.vision_out}
    return jax.tree.map(np.asarray, {name: nnx.to_pure_dict(nnx.state(part)) for name, part in parts.items()})
