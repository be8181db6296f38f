"""The convolutional autoencoder, of the VQ-GAN kind.

    encode   conv; at each resolution `depth` blocks, then a convolution of stride 2; middle; conv(silu(norm(x)))
    decode   conv; middle; at each resolution `depth` + 1 blocks, then doubled pixels and a convolution; silu(norm(x))
    pixels   conv
    block    x <- x W_1x1 + conv_0(silu(norm(conv(silu(norm(x))))))             middle   block, attention, block

Layers are those of the U-Net (mmdiff/models/unet.py) without its time and its skips. Channels at resolution i:
channels[i] * width; model.patch = 2^(number of resolutions - 1) pixels make one code.
Letters: n images, h and w pixels, l codes in raster order, c numbers of a code.
Source: Esser et al., VQ-GAN, arXiv 2012.09841.
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.models.image_layers import Conv, GroupNorm, remembering
from mmdiff.models.transfusion import compute_type
from mmdiff.models.unet import Attend, Residual
from mmdiff.parallel.sharding import Placement
from mmdiff.tokenizers.v2l.read import ReadWords


class Middle(nnx.Module):
    def __init__(self, cfg: config.Model, channels: int, rngs: nnx.Rngs, place: Placement, read: ReadWords | None = None):
        self.first = Residual(channels, channels, 0, rngs, place)
        self.attend = Attend(cfg, channels, rngs, place)
        if read is not None:
            self.read = read
        self.last = Residual(channels, channels, 0, rngs, place)

    def __call__(self, x: jax.Array, words: jax.Array | None = None) -> jax.Array:
        x = self.attend(self.first(x))
        return self.last(x if words is None else self.read(x, words))


class Encoder(nnx.Module):
    def __init__(self, cfg: config.Model, code_width: int, rngs: nnx.Rngs, place: Placement):
        self.cfg, self.place = cfg, place
        channels = [factor * cfg.width for factor in cfg.channels]
        self.conv_in, now = Conv(3, channels[0], rngs, place), channels[0]
        self.blocks: nnx.Dict[Residual] = nnx.Dict()
        self.strides: nnx.Dict[Conv] = nnx.Dict()
        for level, outputs in enumerate(channels):
            for number in range(cfg.depth):
                self.blocks[f"{level}_{number}"] = Residual(now, outputs, 0, rngs, place)
                now = outputs
            if level + 1 < len(channels):
                self.strides[f"{level}"] = Conv(now, now, rngs, place, stride=2)
        self.middle = Middle(cfg, now, rngs, place)
        self.norm_out, self.conv_out = GroupNorm(now), Conv(now, code_width, rngs, place)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[n, h, w, 3] to float32 [n, l, c]."""
        run = remembering(self.cfg, lambda block, x: block(x))
        x = self.conv_in(images.astype(compute_type(self.cfg, self.place)))
        for level in range(len(self.cfg.channels)):
            for number in range(self.cfg.depth):
                x = run(self.blocks[f"{level}_{number}"], x)
            if level + 1 < len(self.cfg.channels):
                x = self.strides[f"{level}"](x)
        x = run(self.middle, x)
        codes = self.conv_out(jax.nn.silu(self.norm_out(x.astype(jnp.float32))))
        return einops.rearrange(codes, "n rows cols c -> n (rows cols) c")


class Decoder(nnx.Module):
    def __init__(
        self,
        cfg: config.Model,
        grid: tuple[int, int],
        code_width: int,
        rngs: nnx.Rngs,
        place: Placement,
        *,
        words: int = 0,
        residual: bool = False,
    ):
        """words: how many codes stand before those of the places, to be read in the middle (v2l/read.py)."""
        self.cfg, self.place, self.grid, self.words = cfg, place, grid, words
        channels = [factor * cfg.width for factor in cfg.channels]
        self.conv_in, now = Conv(code_width, channels[-1], rngs, place), channels[-1]
        read = ReadWords(cfg, now, code_width, residual, rngs, place) if words else None
        self.middle = Middle(cfg, now, rngs, place, read)
        self.blocks: nnx.Dict[Residual] = nnx.Dict()
        self.doublings: nnx.Dict[Conv] = nnx.Dict()
        for level, outputs in reversed(list(enumerate(channels))):
            for number in range(cfg.depth + 1):
                self.blocks[f"{level}_{number}"] = Residual(now, outputs, 0, rngs, place)
                now = outputs
            if level:
                self.doublings[f"{level}"] = Conv(now, now, rngs, place)
        self.norm_out, self.out = GroupNorm(now), Conv(now, 3, rngs, place)

    def features(self, codes: jax.Array) -> jax.Array:
        """[n, words + l, c] to what the last layer reads: float32 [n, h, w, d]."""
        run = remembering(self.cfg, lambda block, *x: block(*x))
        rows, cols = self.grid
        words = (codes[:, : self.words],) if self.words else ()
        x = einops.rearrange(codes[:, self.words :], "n (rows cols) c -> n rows cols c", rows=rows, cols=cols)
        x = run(self.middle, self.conv_in(x.astype(compute_type(self.cfg, self.place))), *words)
        for level in reversed(range(len(self.cfg.channels))):
            for number in range(self.cfg.depth + 1):
                x = run(self.blocks[f"{level}_{number}"], x)
            if level:
                x = self.doublings[f"{level}"](jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return jax.nn.silu(self.norm_out(x.astype(jnp.float32)))

    def pixels(self, features: jax.Array, out: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """The last layer, or `out` in its place: float32 [n, h, w, 3]."""
        return (out or self.out)(features)
