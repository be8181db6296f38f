"""The conditional U-Net of Stable Diffusion 1.5: the noise in a latent image, given the time and a text.

    u  = out(silu(in([cos(tau f), sin(tau f)])));  f_i = 10000^(-i / (half - shift)), i = 0 .. half - 1
    down    each block's x is kept, and each halved x
    middle
    up      each block takes [x, the last one kept]
    noise = exit(silu(norm x))

Within the levels that attend, a transformer follows each block:

    y = in(norm x);  y += self(norm y);  y += cross(norm y, context);  y += down(a gelu(g)), [a, g] = up(norm y);  x += out(y)

Letters: b images, h rows, w columns, c width, z channels of latents, t tokens of the context, d their width, tau the time.
Sizes stand in config.json of `UNet2DConditionModel` (diffusers), whose attention_head_dim is the number of heads. The U-Net
of Stable Diffusion 2 differs in sizes alone and loads too. Source: Rombach et al., arXiv 2112.10752.
"""

import functools
import math
from pathlib import Path
from types import UnionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff.pretrained.load import Rule, layer, load_module, norm
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

MAX_PERIOD = 10_000
NORM_IN, NORM_WITHIN = 1e-6, 1e-5  # epsilon of a transformer's group norm and of its layer norms

SIZES: dict[str, type | UnionType] = {
    **dict.fromkeys(("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups"), int),
    **dict.fromkeys(("block_out_channels", "down_block_types", "up_block_types"), list),
    "attention_head_dim": int | list,
}
ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "act_fn": ("silu", "swish"),
    "downsample_padding": (1,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),
    "attention_type": ("default",),
} | dict.fromkeys(
    (
        *("center_input_sample", "only_cross_attention", "dual_cross_attention", "resnet_skip_time_act"),
        *("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type"),
        *("time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "cross_attention_norm"),
        *("num_attention_heads", "mid_block_only_cross_attention"),
    ),
    (None, False),
)


def _transformer_rules(theirs: str, ours: str) -> list[Rule]:
    within = rf"{theirs}\.transformer_blocks\.0"
    return [
        *norm(rf"{theirs}\.norm", f"{ours}/norm_in"),
        *layer(rf"{theirs}\.proj_in", f"{ours}/enter", pointwise),
        *norm(rf"{within}\.norm1", f"{ours}/norm_own"),
        *attention_rules(rf"{within}\.attn1", f"{ours}/own"),
        *norm(rf"{within}\.norm2", f"{ours}/norm_cross"),
        *attention_rules(rf"{within}\.attn2", f"{ours}/cross"),
        *norm(rf"{within}\.norm3", f"{ours}/norm_mlp"),
        *layer(rf"{within}\.ff\.net\.0\.proj", f"{ours}/up"),
        *layer(rf"{within}\.ff\.net\.2", f"{ours}/down"),
        *layer(rf"{theirs}\.proj_out", f"{ours}/leave", pointwise),
    ]


RULES = [
    *frame_rules(),
    *layer(r"time_embedding\.linear_1", "time_in"),
    *layer(r"time_embedding\.linear_2", "time_out"),
    *level_rules("down_blocks", "down"),
    *_transformer_rules(r"down_blocks\.(\d+)\.attentions\.(\d+)", "down/{}/attentions/{}"),
    *_transformer_rules(r"mid_block\.attentions\.0", "middle/attention"),
    *level_rules("up_blocks", "up"),
    *_transformer_rules(r"up_blocks\.(\d+)\.attentions\.(\d+)", "up/{}/attentions/{}"),
]


class Transformer(nnx.Module):
    """The positions of an image [b, h, w, width] attend to each other and to a context [b, t, d]."""

    def __init__(self, width: int, heads: int, *, context: int, groups: int, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, rngs=rngs)
        layer_norm = functools.partial(nnx.LayerNorm, width, epsilon=NORM_WITHIN, use_fast_variance=False, rngs=rngs)
        self.norm_in = group_norm(width, groups, NORM_IN, rngs)
        self.enter, self.leave = linear(width, width), linear(width, width)
        self.norm_own, self.norm_cross, self.norm_mlp = (layer_norm() for _ in range(3))
        self.own = Attention(width, width, heads, bias=False, rngs=rngs)
        self.cross = Attention(width, context, heads, bias=False, rngs=rngs)
        self.up, self.down = linear(width, 8 * width), linear(4 * width, width)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = self.enter(self.norm_in(x)).reshape(len(x), -1, x.shape[-1])
        own = self.norm_own(y)
        y = y + self.own(own, own)
        y = y + self.cross(self.norm_cross(y), context, mask)
        a, gate = jnp.split(self.up(self.norm_mlp(y)), 2, axis=-1)
        y = y + self.down(a * jax.nn.gelu(gate, approximate=False))
        return x + self.leave(y).reshape(x.shape)


class UNet(nnx.Module):
    """See `__call__`."""

    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        widths, layers, groups = cfg["block_out_channels"], cfg["layers_per_block"], cfg["norm_num_groups"]
        told = cfg["attention_head_dim"]
        heads = told if isinstance(told, list) else [told] * len(widths)
        time, epsilon = cfg.get("time_embedding_dim") or 4 * widths[0], cfg.get("norm_eps", 1e-5)
        block = functools.partial(Block, time=time, groups=groups, epsilon=epsilon, rngs=rngs)
        attend = functools.partial(Transformer, context=cfg["cross_attention_dim"], groups=groups, rngs=rngs)

        self.flip, self.shift = cfg.get("flip_sin_to_cos", True), cfg.get("freq_shift", 0)
        self.time_in, self.time_out = nnx.Linear(widths[0], time, rngs=rngs), nnx.Linear(time, time, rngs=rngs)
        self.entry = conv(cfg["in_channels"], widths[0], rngs)
        down, up, width, kept = [], [], widths[0], [widths[0]]
        for number, kind in enumerate(cfg["down_block_types"]):
            entries, width = [width] + [widths[number]] * (layers - 1), widths[number]
            attentions = [attend(width, heads[number]) for _ in entries if kind.startswith("Cross")]
            halved = number < len(widths) - 1
            kept += [width] * (layers + halved)
            resample = Down(width, ((1, 1), (1, 1)), rngs) if halved else None
            down.append(Level([block(entry, width) for entry in entries], attentions, resample))
        self.middle = Middle([block(width, width) for _ in range(2)], attend(width, heads[-1]))
        for number, kind in zip(reversed(range(len(widths))), cfg["up_block_types"], strict=True):
            entries = [before + kept.pop() for before in [width] + [widths[number]] * layers]
            width = widths[number]
            attentions = [attend(width, heads[number]) for _ in entries if kind.startswith("Cross")]
            up.append(Level([block(entry, width) for entry in entries], attentions, Up(width, rngs) if number else None))
        self.down, self.up = nnx.List(down), nnx.List(up)
        self.norm = group_norm(width, groups, epsilon, rngs)
        self.exit = conv(width, cfg["out_channels"], rngs)

    def __call__(self, latents: jax.Array, times: jax.Array, context: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """What the network was trained to predict: in Stable Diffusion 1.5 the noise.

        Args:
          latents: float [b, h, w, z], scaled (`VAE.scaling_factor`) and noised.
          times: [b], steps of the noise's schedule, 0 to 999.
          context: float [b, t, d], states of the text.
          mask: bool [b, t], which of them may be read; None: all.
        Returns:
          [b, h, w, z].
        """
        angles = sinusoids(times, self.time_in.in_features, self.flip, self.shift).astype(latents.dtype)
        u = self.time_out(jax.nn.silu(self.time_in(angles)))
        x = self.entry(latents)
        kept = [x]
        for level in self.down:
            for number in range(len(level.blocks)):
                x = level.step(number, x, u, context, mask)
                kept.append(x)
            if level.resample is not None:
                x = level.resample(x)
                kept.append(x)
        x = self.middle(x, u, context, mask)
        for level in self.up:
            for number in range(len(level.blocks)):
                x = level.step(number, jnp.concatenate([x, kept.pop()], axis=-1), u, context, mask)
            if level.resample is not None:
                x = level.resample(x, kept[-1].shape[1:3])  # an odd side was rounded up on the way down
        return self.exit(jax.nn.silu(self.norm(x)))


def sinusoids(times: jax.Array, width: int, flip: bool = True, shift: float = 0) -> jax.Array:
    """Float32 [b, width], width even: cosines then sines (flip), or sines then cosines."""
    half = width // 2
    # by NumPy: times multiply an error up to a thousandfold, and accelerators' exponentials are coarse
    frequencies = np.exp(-math.log(MAX_PERIOD) * np.arange(half, dtype=np.float32) / (half - shift))
    angles = times.astype(jnp.float32)[:, None] * frequencies
    both = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(both if flip else both[::-1], axis=-1)


def load_unet(folder: str | Path, **options) -> UNet:
    """From a folder with config.json and safetensors.

    Args:
      options: dtype and place, of `load_module`.
    Raises:
      DataError: as of `load_module`; config.json asks for what is not supported.
    """
    cfg = read_supported(folder, SIZES, ONLY)
    return load_module(lambda: UNet(cfg, nnx.Rngs(0)), weights_path(folder), RULES, **options)
