"""The autoencoder of Stable Diffusion: images to small latent images and back.

    (mean, log variance) = before(exit(silu(norm(middle(down(entry image))))))
    image                = exit(silu(norm(up(middle(entry(after latents))))))

The U-Net works on scaling_factor * latents, whose variance is about one. Both ways attend in the middle alone, with one head.

Letters: b images, H rows and W columns of pixels, h and w of latents (H / 2^(levels - 1)), z channels of latents. Sizes stand
in config.json of `AutoencoderKL` (diffusers). Source: Rombach et al., arXiv 2112.10752.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.pretrained.load import layer, load_module, norm
from mmdiff.pretrained.sd_layers import (
    Attention,
    Block,
    Down,
    Level,
    Middle,
    Up,
    attention_rules,
    conv,
    frame_rules,
    group_norm,
    level_rules,
    pointwise,
    read_supported,
    weights_path,
)

EPSILON = 1e-6
SCALING = 0.18215  # of files that do not tell
LOG_VARIANCES = -30.0, 20.0

SIZES: dict[str, type | UnionType] = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"), int),
    **dict.fromkeys(("block_out_channels", "down_block_types", "up_block_types"), list),
}
ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "act_fn": ("silu", "swish"),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std"), (None,)),
}

RULES = [
    *(rule for half in ("encoder", "decoder") for rule in frame_rules(rf"{half}\.", f"{half}/")),
    *level_rules(r"encoder\.down_blocks", "encoder/levels"),
    *level_rules(r"decoder\.up_blocks", "decoder/levels"),
    *norm(r"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm", "{}/middle/attention/norm"),
    *attention_rules(r"(encoder|decoder)\.mid_block\.attentions\.0", "{}/middle/attention/attention"),
    *layer("quant_conv", "before", pointwise),
    *layer("post_quant_conv", "after", pointwise),
]


class ImageAttention(nnx.Module):
    """The positions of an image [b, h, w, width] attend to each other."""

    def __init__(self, width: int, groups: int, rngs: nnx.Rngs):
        self.norm = group_norm(width, groups, EPSILON, rngs)
        self.attention = Attention(width, width, 1, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x).reshape(len(x), -1, x.shape[-1])
        return x + self.attention(y, y).reshape(x.shape)


class Encoder(nnx.Module):
    """Float [b, H, W, 3] to [b, h, w, 2z]."""

    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        widths, layers, groups = cfg["block_out_channels"], cfg["layers_per_block"], cfg["norm_num_groups"]
        block = functools.partial(Block, time=None, groups=groups, epsilon=EPSILON, rngs=rngs)
        self.entry = conv(cfg["in_channels"], widths[0], rngs)
        # padded below and on the right alone: the U-Net's is padded all around
        self.levels = _levels(widths, layers, block, lambda width: Down(width, ((0, 1), (0, 1)), rngs))
        self.middle = Middle([block(widths[-1], widths[-1]) for _ in range(2)], ImageAttention(widths[-1], groups, rngs))
        self.norm = group_norm(widths[-1], groups, EPSILON, rngs)
        self.exit = conv(widths[-1], 2 * cfg["latent_channels"], rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = _through(self.levels, self.entry(images))
        return self.exit(jax.nn.silu(self.norm(self.middle(x))))


class Decoder(nnx.Module):
    """Float [b, h, w, z] to [b, H, W, 3]."""

    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        widths, layers, groups = cfg["block_out_channels"][::-1], cfg["layers_per_block"] + 1, cfg["norm_num_groups"]
        block = functools.partial(Block, time=None, groups=groups, epsilon=EPSILON, rngs=rngs)
        self.entry = conv(cfg["latent_channels"], widths[0], rngs)
        self.middle = Middle([block(widths[0], widths[0]) for _ in range(2)], ImageAttention(widths[0], groups, rngs))
        self.levels = _levels(widths, layers, block, lambda width: Up(width, rngs))
        self.norm = group_norm(widths[-1], groups, EPSILON, rngs)
        self.exit = conv(widths[-1], cfg["out_channels"], rngs)

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = _through(self.levels, self.middle(self.entry(latents)))
        return self.exit(jax.nn.silu(self.norm(x)))


def _levels(widths: list[int], layers: int, block: Callable[[int, int], Block], resample: Callable[[int], Any]) -> nnx.List:
    """A level for each width, all but the last with a change of resolution."""
    levels, entry = [], widths[0]
    for number, width in enumerate(widths):
        blocks = [block(entry, width), *(block(width, width) for _ in range(layers - 1))]
        levels.append(Level(blocks, [], resample(width) if number < len(widths) - 1 else None))
        entry = width
    return nnx.List(levels)


def _through(levels: nnx.List, x: jax.Array) -> jax.Array:
    for level in levels:
        for number in range(len(level.blocks)):
            x = level.step(number, x)
        x = x if level.resample is None else level.resample(x)
    return x


class VAE(nnx.Module):
    """`encode` and `decode`; scaling_factor is for the caller to apply: to latents on their way to the U-Net and back."""

    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        channels = cfg["latent_channels"]
        self.scaling_factor = float(cfg.get("scaling_factor", SCALING))
        self.encoder, self.decoder = Encoder(cfg, rngs), Decoder(cfg, rngs)
        self.before = nnx.Linear(2 * channels, 2 * channels, rngs=rngs)
        self.after = nnx.Linear(channels, channels, rngs=rngs)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float [b, H, W, 3] in [-1, 1] to mean and log variance of the latents, each [b, h, w, z], unscaled."""
        mean, spread = jnp.split(self.before(self.encoder(images)), 2, axis=-1)
        return mean, jnp.clip(spread, *LOG_VARIANCES)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Float [b, h, w, z], unscaled, to images [b, H, W, 3] that lie about [-1, 1] and are not cut off there."""
        return self.decoder(self.after(latents))


def load_vae(folder: str | Path, **options) -> VAE:
    """From a folder with config.json and safetensors.

    Args:
      options: dtype and place, of `load_module`.
    Raises:
      DataError: as of `load_module`; config.json asks for what is not supported.
    """
    cfg = read_supported(folder, SIZES, ONLY)
    return load_module(lambda: VAE(cfg, nnx.Rngs(0)), weights_path(folder), RULES, **options)
