"""The vision tower of BLIP-2, EVA-CLIP ViT-g/14 without its last layer: what LaVIT, SEED and Emu look at images with.

Names are those of `Blip2VisionModel` and of the `vision_model` in `Blip2Model` of the transformers package (for example
Salesforce/blip2-opt-2.7b: width 1408, 39 layers); the other parts of such a file are left alone. Sources: EVA-CLIP, arXiv
2303.15389; BLIP-2, arXiv 2301.12597.
"""

from pathlib import Path
from typing import Any

from flax import nnx

from mmdiff.pretrained.encoder import VisionTower, encoder_rules, vision_part
from mmdiff.pretrained.load import Rule, convolution, layer, load_module, norm, read_config

PREFIX = r"(?:vision_model\.)?"
RULES = [
    Rule(rf"{PREFIX}embeddings\.class_embedding", "first", lambda a: a[0, 0]),
    *layer(rf"{PREFIX}embeddings\.patch_embedding", "patches", convolution),
    Rule(rf"{PREFIX}embeddings\.position_embedding", "place", lambda a: a[0]),
    *encoder_rules(rf"{PREFIX}encoder", "encoder", fused=True),
    *norm(rf"{PREFIX}post_layernorm", "norm"),
]
IGNORED = [r"(?:language_model|language_projection|qformer|query_tokens|text_projection|vision_projection|embeddings_mean).*"]


def read_blip2_vision(folder: str | Path) -> dict[str, Any]:
    """Sizes of the vision tower in a folder, of BLIP-2 or of its tower alone. Raises DataError for another network."""
    return vision_part(read_config(folder), Path(folder) / "config.json", "blip-2", "blip_2_vision_model")


def load_blip2_vision(folder: str | Path, **options) -> VisionTower:
    """From a folder with config.json and safetensors, of BLIP-2 or of its vision tower alone.

    LaVIT reads the features of `VisionTower.__call__`, SEED and BLIP-2 itself apply `norm` to them.

    Args:
      options: dtype and place, of `load_module`.
    Raises:
      DataError: as of `load_module` and `read_blip2_vision`.
    """
    cfg = read_blip2_vision(folder)
    make = lambda: VisionTower(cfg, nnx.Rngs(0), patch_bias=True, first_norm=False)
    return load_module(make, folder, RULES, ignored=IGNORED, **options)
