"""What the U-Net and the autoencoder of Stable Diffusion are both made of.

    residual block  y = second(silu(norm(first(silu(norm x)) + time(silu u))));  shortcut(x) + y
    attention       out(softmax(q(x) k(s)^T / sqrt(c / heads)) v(s))

A level is some residual blocks at one resolution, perhaps with an attention after each, then perhaps a change of resolution.
x is [b, h, w, c] and u, the vector of the time, [b, e] or absent. Letters: b images, h rows, w columns, c width, t positions.

Names are those of the diffusers package. Source: Rombach et al., arXiv 2112.10752.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff.document import DataError
from mmdiff.pretrained.load import Rule, convolution, layer, norm, read_config, supported

WEIGHTS = "diffusion_pytorch_model.safetensors"


def conv(entry: int, width: int, rngs: nnx.Rngs, **how) -> nnx.Conv:
    return nnx.Conv(entry, width, (3, 3), rngs=rngs, **({"padding": 1} | how))


def group_norm(width: int, groups: int, epsilon: float, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(width, num_groups=groups, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
    """Float [b, h, w, entry] and the time's vector [b, time] to [b, h, w, width]."""

    def __init__(self, entry: int, width: int, *, time: int | None, groups: int, epsilon: float, rngs: nnx.Rngs):
        self.norm_first = group_norm(entry, groups, epsilon, rngs)
        self.first = conv(entry, width, rngs)
        self.time = nnx.Linear(time, width, rngs=rngs) if time else None
        self.norm_second = group_norm(width, groups, epsilon, rngs)
        self.second = conv(width, width, rngs)
        self.shortcut = nnx.Linear(entry, width, rngs=rngs) if entry != width else None

    def __call__(self, x: jax.Array, u: jax.Array | None = None) -> jax.Array:
        y = self.first(jax.nn.silu(self.norm_first(x)))
        if self.time is not None and u is not None:
            y = y + self.time(jax.nn.silu(u))[:, None, None]
        y = self.second(jax.nn.silu(self.norm_second(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Positions [b, t, width] read from [b, s, source]; mask, bool [b, s]: what may be read."""

    def __init__(self, width: int, source: int, heads: int, *, bias: bool, rngs: nnx.Rngs):
        self.heads = heads
        self.q = nnx.Linear(width, width, use_bias=bias, rngs=rngs)
        self.k, self.v = (nnx.Linear(source, width, use_bias=bias, rngs=rngs) for _ in range(2))
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        split = lambda a: a.reshape(*a.shape[:2], self.heads, -1)
        allowed = None if mask is None else mask.astype(bool)[:, None, None, :]
        read = jax.nn.dot_product_attention(split(self.q(x)), split(self.k(source)), split(self.v(source)), mask=allowed)
        return self.out(read.reshape(x.shape))


class Down(nnx.Module):
    """Half the rows and columns; `padding` for each side of both: ((1, 1), (1, 1)) or ((0, 1), (0, 1))."""

    def __init__(self, width: int, padding: Iterable[tuple[int, int]], rngs: nnx.Rngs):
        self.conv = conv(width, width, rngs, strides=2, padding=tuple(padding))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Up(nnx.Module):
    """Twice the rows and columns, less one where `size` is odd."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv = conv(width, width, rngs)

    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x if size is None else x[:, : size[0], : size[1]])


class Level(nnx.Module):
    """Blocks, as many attentions or none, and `resample` (Down, Up or None), which is for the caller to apply."""

    def __init__(self, blocks: Iterable[Block], attentions: Iterable[nnx.Module], resample: Callable[..., jax.Array] | None):
        self.blocks, self.attentions, self.resample = nnx.List(blocks), nnx.List(attentions), resample

    def step(self, number: int, x: jax.Array, u: jax.Array | None = None, *read) -> jax.Array:
        """One block, and its attention to what is to be `read`."""
        x = self.blocks[number](x, u)
        return self.attentions[number](x, *read) if self.attentions else x


class Middle(nnx.Module):
    """At the lowest resolution: a block, an attention and a block."""

    def __init__(self, blocks: Iterable[Block], attention: Callable[..., jax.Array]):
        self.blocks, self.attention = nnx.List(blocks), attention

    def __call__(self, x: jax.Array, u: jax.Array | None = None, *read) -> jax.Array:
        return self.blocks[1](self.attention(self.blocks[0](x, u), *read), u)


def pointwise(a: np.ndarray) -> np.ndarray:
    """A linear layer of PyTorch [out, in], or the same as a convolution [out, in, 1, 1], to ours [in, out]."""
    return a.reshape(a.shape[0], -1).T


def attention_rules(theirs: str, ours: str) -> list[Rule]:
    """With the names of today or with those that autoencoders had before."""
    pairs = [*((f"(?:to_{letter}|{old})", letter) for letter, old in zip("qkv", ("query", "key", "value"), strict=True))]
    pairs.append((r"(?:to_out\.0|proj_attn)", "out"))
    return [rule for their, our in pairs for rule in layer(rf"{theirs}\.{their}", f"{ours}/{our}", pointwise)]


def block_rules(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm(rf"{theirs}\.norm1", f"{ours}/norm_first"),
        *layer(rf"{theirs}\.conv1", f"{ours}/first", convolution),
        *layer(rf"{theirs}\.time_emb_proj", f"{ours}/time"),
        *norm(rf"{theirs}\.norm2", f"{ours}/norm_second"),
        *layer(rf"{theirs}\.conv2", f"{ours}/second", convolution),
        *layer(rf"{theirs}\.conv_shortcut", f"{ours}/shortcut", pointwise),
    ]


def level_rules(theirs: str, ours: str) -> list[Rule]:
    """Of the list of levels; what their attentions are, is for the caller to say."""
    return [
        *block_rules(rf"{theirs}\.(\d+)\.resnets\.(\d+)", f"{ours}/{{}}/blocks/{{}}"),
        *layer(rf"{theirs}\.(\d+)\.(?:down|up)samplers\.0\.conv", f"{ours}/{{}}/resample/conv", convolution),
    ]


def frame_rules(theirs: str = "", ours: str = "") -> list[Rule]:
    """Of the first and the last layers and of the blocks in the middle; both prefixes end with what parts names."""
    return [
        *layer(rf"{theirs}conv_in", f"{ours}entry", convolution),
        *block_rules(rf"{theirs}mid_block\.resnets\.([01])", f"{ours}middle/blocks/{{}}"),
        *norm(rf"{theirs}conv_norm_out", f"{ours}norm"),
        *layer(rf"{theirs}conv_out", f"{ours}exit", convolution),
    ]


def read_supported(
    folder: str | Path, sizes: Mapping[str, type | UnionType], only: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """config.json of a folder; `sizes` and `only` as of `supported`.

    Raises:
      DataError: it says anything else, or levels of different number.
    """
    path, levels = Path(folder) / "config.json", ("block_out_channels", "down_block_types", "up_block_types")
    cfg = supported(read_config(folder), path, sizes, only)
    if len({len(cfg[name]) for name in levels}) > 1:
        raise DataError(f"{path}: not supported: {', '.join(levels)} of different lengths.")
    return cfg


def weights_path(folder: str | Path) -> Path:
    """The file of the full weights: beside it there may be others with the same names, of less precision or older."""
    file = Path(folder) / WEIGHTS
    return file if file.is_file() else Path(folder)
