"""The transformer layers that CLIP's towers and BLIP-2's vision tower are made of.

    x += out(attention(norm x));  x += down(act(up(norm x)))

Letters: b images or texts, t positions, h heads, c width of a head.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.pretrained.load import Rule, layer, norm, part, supported, transposed

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
USUAL: dict[str, dict[str, Any]] = {  # by model_type: what transformers takes for what a config.json leaves out, and it does
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "clip_text_model": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "blip_2_vision_model": {
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
}


def tower_config(told: dict[str, Any], where: str | Path, kind: str) -> dict[str, Any]:
    """What the config.json of a tower means, which `where` names; `kind`: its model_type, of `USUAL`.

    Raises:
      DataError: it says that it is another, or an unknown activation.
    """
    sizes = {name: type(value) for name, value in USUAL[kind].items()}
    return supported(USUAL[kind] | told, where, sizes, {"model_type": (kind,), "hidden_act": tuple(ACTIVATIONS)})


def vision_part(told: dict[str, Any], where: str | Path, whole: str, kind: str) -> dict[str, Any]:
    """The same of the vision tower in a network of model_type `whole`, or of one alone.

    Raises:
      DataError: as of `tower_config`, or of another network.
    """
    if "vision_config" not in told:
        return tower_config(told, where, kind)
    supported(told, where, {"vision_config": dict}, {"model_type": (whole,)})
    return tower_config(told["vision_config"], f"{where}: vision_config", kind)


class EncoderLayer(nnx.Module):
    def __init__(self, cfg: Mapping[str, Any], rngs: nnx.Rngs):
        """`cfg`: of the tower, as of `tower_config`."""
        width, hidden, epsilon = cfg["hidden_size"], cfg["intermediate_size"], cfg["layer_norm_eps"]
        self.heads, self.activation = cfg["num_attention_heads"], cfg["hidden_act"]
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.norm_attention = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.norm_mlp = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.up, self.down = linear(width, hidden), linear(hidden, width)

    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        y = self.norm_attention(x)
        split = lambda a: a.reshape(*a.shape[:2], self.heads, -1)
        read = jax.nn.dot_product_attention(split(self.q(y)), split(self.k(y)), split(self.v(y)), is_causal=causal)
        x = x + self.out(read.reshape(x.shape))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm_mlp(x))))


class Encoder(nnx.Module):
    """Float [b, t, d] to the same."""

    def __init__(self, cfg: Mapping[str, Any], rngs: nnx.Rngs):
        self.layers = nnx.List([EncoderLayer(cfg, rngs) for _ in range(cfg["num_hidden_layers"])])

    def __call__(self, x: jax.Array, causal: bool = False) -> jax.Array:
        for each in self.layers:
            x = each(x, causal)
        return x


def encoder_rules(theirs: str, ours: str, *, fused: bool) -> list[Rule]:
    """Of a tower with the names of the transformers package; `fused`: query, key and value in one matrix (BLIP-2)."""
    at, to = rf"{theirs}\.layers\.(\d+)", f"{ours}/layers/{{}}"
    rules = [
        *norm(rf"{at}\.layer_norm1", f"{to}/norm_attention"),
        *norm(rf"{at}\.layer_norm2", f"{to}/norm_mlp"),
        *layer(rf"{at}\.mlp\.fc1", f"{to}/up"),
        *layer(rf"{at}\.mlp\.fc2", f"{to}/down"),
        *layer(rf"{at}\.self_attn\.{'projection' if fused else 'out_proj'}", f"{to}/out"),
    ]
    for number, letter in enumerate("qkv"):
        if fused:
            rules.append(Rule(rf"{at}\.self_attn\.qkv\.weight", f"{to}/{letter}/kernel", part(number, 3, transposed)))
            rules.append(Rule(rf"{at}\.self_attn\.qkv\.bias", f"{to}/{letter}/bias", part(number, 3)))
        else:
            rules += layer(rf"{at}\.self_attn\.{letter}_proj", f"{to}/{letter}")
    return rules


class VisionTower(nnx.Module):
    """Patches and a class token through layers; see `__call__`."""

    def __init__(self, cfg: Mapping[str, Any], rngs: nnx.Rngs, *, patch_bias: bool, first_norm: bool):
        """`cfg`: as of `vision_part`."""
        side, patch, width = (cfg[name] for name in ("image_size", "patch_size", "hidden_size"))
        normed = functools.partial(nnx.LayerNorm, width, epsilon=cfg["layer_norm_eps"], rngs=rngs)
        self.side = side
        self.patches = nnx.Conv(3, width, (patch, patch), strides=patch, padding="VALID", use_bias=patch_bias, rngs=rngs)
        self.first = nnx.Param(jnp.zeros(width))
        self.place = nnx.Param(jnp.zeros(((side // patch) ** 2 + 1, width)))
        self.norm_first = normed() if first_norm else None
        self.encoder = Encoder(cfg, rngs)
        self.norm = normed()

    def __call__(self, images: jax.Array, layers: int | None = None) -> jax.Array:
        """Features before the last norm.

        Args:
          images: float [b, side, side, 3], as the network was trained on them (`normalised`).
          layers: only so many; negative: all but so many.
        Returns:
          [b, 1 + patches, d], the class token first.
        """
        x = self.patches(images).reshape(len(images), -1, self.first.shape[-1])
        x = jnp.concatenate([jnp.broadcast_to(self.first[...], (len(x), 1, x.shape[-1])), x], axis=1) + self.place[...]
        x = self.norm_first(x) if self.norm_first is not None else x
        for each in list(self.encoder.layers)[:layers]:
            x = each(x, causal=False)
        return x


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(images: jax.Array, side: int) -> jax.Array:
    """uint8 [b, h, w, 3] to float [b, side, side, 3] as CLIP takes them, resized by cubic interpolation."""
    x = jax.image.resize(images.astype(jnp.float32) / 255, (len(images), side, side, 3), "cubic")
    return (jnp.clip(x, 0, 1) - jnp.array(MEAN)) / jnp.array(STD)
