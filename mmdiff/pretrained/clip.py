"""CLIP: images and texts to vectors whose cosine says how well they match.

Names are those of `CLIPModel` of the transformers package (for example openai/clip-vit-large-patch14), sizes stand in its
config.json. Source: Radford et al., arXiv 2103.00020.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.pretrained.encoder import Encoder, VisionTower, encoder_rules, tower_config, vision_part
from mmdiff.pretrained.load import Rule, convolution, layer, load_folder, load_module, norm, read_config, supported, transposed

OLD_END = 2  # in files that call this the end of a text, it is the largest id instead

RULES = [
    Rule(r"logit_scale", "log_scale"),
    Rule(r"text_model\.embeddings\.token_embedding\.weight", "text/embedding"),
    Rule(r"text_model\.embeddings\.position_embedding\.weight", "text/place"),
    *encoder_rules(r"text_model\.encoder", "text/encoder", fused=False),
    *norm(r"text_model\.final_layer_norm", "text/norm"),
    Rule(r"text_projection\.weight", "text_out/kernel", transposed),
    Rule(r"vision_model\.embeddings\.class_embedding", "vision/first"),
    *layer(r"vision_model\.embeddings\.patch_embedding", "vision/patches", convolution),
    Rule(r"vision_model\.embeddings\.position_embedding\.weight", "vision/place"),
    *norm(r"vision_model\.pre_layrnorm", "vision/norm_first"),  # spelt so
    *encoder_rules(r"vision_model\.encoder", "vision/encoder", fused=False),
    *norm(r"vision_model\.post_layernorm", "vision/norm"),
    Rule(r"visual_projection\.weight", "vision_out/kernel", transposed),
]
IGNORED = [r".*\.position_ids"]
VISION_RULES = [rule._replace(ours=rule.ours.removeprefix("vision/")) for rule in RULES if rule.ours.startswith("vision/")]
OUR_VISION = Rule(r"vision/(.*)", "{}")  # of files that `save_module` wrote
NO_VISION = [r"(?:text_model|text_projection|visual_projection|logit_scale).*", r"(?:text/|text_out/|vision_out/|log_scale).*"]
KINDS = "clip", "clip_vision_model"  # model_type of both halves together, of the vision tower alone
PROJECTION = 512  # where config.json leaves out projection_dim


def clip_config(told: dict[str, Any], where: str | Path = "config.json") -> dict[str, Any]:
    """What the config.json of a CLIP means, which `where` names, with all that it leaves out.

    Raises:
      DataError: it is that of another network, or has an unknown activation.
    """
    sizes: dict[str, type] = {"text_config": dict, "vision_config": dict, "projection_dim": int}
    cfg = supported({"projection_dim": PROJECTION} | told, where, sizes, {"model_type": ("clip",)})
    text = tower_config(cfg["text_config"], f"{where}: text_config", "clip_text_model")
    return cfg | {"text_config": text, "vision_config": vision_part(told, where, *KINDS)}


def read_clip_vision(folder: str | Path) -> dict[str, Any]:
    """Sizes of the vision tower in a folder, of CLIP or of its tower alone. Raises DataError for another network."""
    return vision_part(read_config(folder), Path(folder) / "config.json", *KINDS)


class TextTower(nnx.Module):
    """Causal; the vector of a text is what stands at its end."""

    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        width = cfg["hidden_size"]
        self.end = cfg.get("eos_token_id", OLD_END)
        self.embedding = nnx.Param(jnp.zeros((cfg["vocab_size"], width)))
        self.place = nnx.Param(jnp.zeros((cfg["max_position_embeddings"], width)))
        self.encoder = Encoder(cfg, rngs)
        self.norm = nnx.LayerNorm(width, epsilon=cfg["layer_norm_eps"], rngs=rngs)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int [b, t], each with its end, to states [b, t, d] and the vectors of the texts [b, d]."""
        x = self.embedding[...][ids] + self.place[: ids.shape[1]]
        x = self.norm(self.encoder(x, causal=True))
        last = ids.argmax(-1) if self.end == OLD_END else (ids == self.end).argmax(-1)
        return x, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


class CLIP(nnx.Module):
    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        """Raises DataError: as of `clip_config`."""
        cfg = clip_config(cfg)
        text, vision, out = cfg["text_config"], cfg["vision_config"], cfg["projection_dim"]
        self.text = TextTower(text, rngs)
        self.vision = vision_tower(vision, rngs)
        self.text_out = nnx.Linear(text["hidden_size"], out, use_bias=False, rngs=rngs)
        self.vision_out = nnx.Linear(vision["hidden_size"], out, use_bias=False, rngs=rngs)
        self.log_scale = nnx.Param(jnp.zeros(()))

    def embed_images(self, images: jax.Array) -> jax.Array:
        """Float [b, side, side, 3] (`encoder.normalised`) to vectors of length 1, [b, e]."""
        return unit(self.vision_out(self.vision.norm(self.vision(images)[:, 0])))

    def embed_texts(self, ids: jax.Array) -> jax.Array:
        """int [b, t], each with its end, to vectors of length 1, [b, e]."""
        return unit(self.text_out(self.text(ids)[1]))


def vision_tower(cfg: dict[str, Any], rngs: nnx.Rngs) -> VisionTower:
    return VisionTower(cfg, rngs, patch_bias=False, first_norm=True)


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def load_clip(folder: str | Path, **options) -> CLIP:
    """From a folder with config.json and safetensors.

    Args:
      options: dtype and place, of `load_module`.
    Raises:
      DataError: as of `load_module` and `clip_config`.
    """
    return load_folder(CLIP, folder, RULES, clip_config, ignored=IGNORED, **options)


def load_clip_vision(folder: str | Path, **options) -> VisionTower:
    """The vision tower from a folder with config.json and safetensors, of CLIP or of its tower alone.

    Args:
      options: dtype and place, of `load_module`.
    Raises:
      DataError: as of `load_module` and `read_clip_vision`.
    """
    cfg = read_clip_vision(folder)
    make = lambda: vision_tower(cfg, nnx.Rngs(0))
    return load_module(make, folder, [*VISION_RULES, OUR_VISION], ignored=[*IGNORED, *NO_VISION], **options)
