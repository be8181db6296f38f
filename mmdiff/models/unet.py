"""U-Net for diffusion, of the DDPM and ADM kind.

    c = time(u)
    block    h = conv(silu(norm(x)));  h = (1 + s) norm(h) + b, (s, b) = silu(c) W;  x <- x W_1x1 + conv_0(silu(h))
    attend   x <- x + attention_0(norm(x))             where the longer side of the feature map is 16 or 8, and in the middle
    down     at each resolution `depth` blocks, then a convolution of stride 2
    middle   block, attend, block
    up       at each resolution `depth` + 1 blocks, each on [x, early], then doubled pixels and a convolution
    out      conv_0(silu(norm(x)))

early: what left the first convolution, each block and each stride on the way down, last first. Layers marked 0 are zero at
the start; x W_1x1 only where the numbers of channels differ. Channels at resolution i: channels[i] * width.
Differences from the papers: time features smooth in u, no dropout, heads of at most model.head_width channels.
Letters: n images, h and w pixels, d channels.
Sources: Ho et al., DDPM, arXiv 2006.11239; Dhariwal and Nichol, ADM, arXiv 2105.05233.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.models.image_layers import Attention, Conv, GroupNorm, Time, dense, largest_divisor, remembering
from mmdiff.models.transfusion import compute_type
from mmdiff.nn.layers import Linear, parts
from mmdiff.parallel.sharding import Placement

ATTENDED = (16, 8)  # longer sides of feature maps


class Residual(nnx.Module):
    def __init__(self, inputs: int, outputs: int, time: int, rngs: nnx.Rngs, place: Placement):
        """`time`: numbers that tell the noise time; 0: nothing is told."""
        self.norm_in, self.conv_in = GroupNorm(inputs), Conv(inputs, outputs, rngs, place)
        if time:
            self.modulation = Linear(time, (2, outputs), rngs, axes=(None, None, None), bias=True, place=place)
        self.norm_out, self.conv_out = GroupNorm(outputs), Conv(outputs, outputs, rngs, place, gain=0.0)
        if inputs != outputs:
            self.straight = dense(inputs, outputs, rngs, place)
        self.changes = inputs != outputs

    def __call__(self, x: jax.Array, c: jax.Array | None = None) -> jax.Array:
        """x [n, h, w, inputs] at c = silu(time) [n, time] to [n, h, w, outputs]."""
        h = self.norm_out(self.conv_in(jax.nn.silu(self.norm_in(x))))
        if c is not None:
            scale, shift = parts(self.modulation(c[:, None, None]))
            h = h * (1 + scale) + shift
        return (self.straight(x) if self.changes else x) + self.conv_out(jax.nn.silu(h))


class Attend(nnx.Module):
    def __init__(self, cfg: config.Model, channels: int, rngs: nnx.Rngs, place: Placement):
        self.norm = GroupNorm(channels)
        self.attention = Attention(cfg, channels, largest_divisor(channels, cfg.head_width), rngs, place, gain=0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, h, w, d] to [n, h, w, d]."""
        count, height, width, channels = x.shape
        mixed = self.attention(self.norm(x).reshape(count, height * width, channels))
        return x + mixed.reshape(x.shape)


class Block(nnx.Module):
    """A residual block, with attention behind it where the feature map has a side of ATTENDED."""

    def __init__(self, cfg: config.Model, inputs: int, outputs: int, side: int, rngs: nnx.Rngs, place: Placement):
        self.residual = Residual(inputs, outputs, 4 * cfg.width, rngs, place)
        self.attends = side in ATTENDED
        if self.attends:
            self.attend = Attend(cfg, outputs, rngs, place)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        x = self.residual(x, c)
        return self.attend(x) if self.attends else x


class UNet(nnx.Module):
    """Parameters of a block are called <longer side of its feature map>_<number>: down/16_0/attend/..."""

    def __init__(self, cfg: config.Model, size: tuple[int, int], rngs: nnx.Rngs, place: Placement):
        self.cfg, self.place = cfg, place
        channels = [factor * cfg.width for factor in cfg.channels]
        self.sides = [max(size) >> level for level in range(len(channels))]
        self.time_in = Time(4 * cfg.width, 4 * cfg.width, rngs, place)
        self.conv_in = Conv(3, channels[0], rngs, place)
        self.down: nnx.Dict[Block] = nnx.Dict()
        self.up: nnx.Dict[Block] = nnx.Dict()
        self.strides: nnx.Dict[Conv] = nnx.Dict()
        self.doublings: nnx.Dict[Conv] = nnx.Dict()
        left, now = [channels[0]], channels[0]  # channels of `early`, and of x
        levels = list(zip(self.sides, channels, strict=True))
        for side, outputs in levels:
            for number in range(cfg.depth):
                self.down[f"{side}_{number}"] = Block(cfg, now, outputs, side, rngs, place)
                now = outputs
                left.append(now)
            if side != self.sides[-1]:
                self.strides[f"{side}"] = Conv(now, now, rngs, place, stride=2)
                left.append(now)
        self.middle_in = Residual(now, now, 4 * cfg.width, rngs, place)
        self.middle = Attend(cfg, now, rngs, place)
        self.middle_out = Residual(now, now, 4 * cfg.width, rngs, place)
        for side, outputs in reversed(levels):
            for number in range(cfg.depth + 1):
                self.up[f"{side}_{number}"] = Block(cfg, now + left.pop(), outputs, side, rngs, place)
                now = outputs
            if side != self.sides[0]:
                self.doublings[f"{side}"] = Conv(now, now, rngs, place)
        self.norm_out, self.conv_out = GroupNorm(now), Conv(now, 3, rngs, place, gain=0.0)

    def __call__(self, z: jax.Array, u: jax.Array) -> jax.Array:
        """Images z [n, h, w, 3] at times u [n] to their prediction, float32 [n, h, w, 3]."""
        cfg, dtype = self.cfg, compute_type(self.cfg, self.place)
        run = remembering(cfg, lambda block, *arrays: block(*arrays))
        c = jax.nn.silu(self.time_in(u)).astype(dtype)
        x = self.conv_in(z.astype(dtype))
        early = [x]
        for side in self.sides:
            for number in range(cfg.depth):
                x = run(self.down[f"{side}_{number}"], x, c)
                early.append(x)
            if side != self.sides[-1]:
                x = self.strides[f"{side}"](x)
                early.append(x)
        x = run(self.middle_in, x, c)
        x = run(self.middle, x)
        x = run(self.middle_out, x, c)
        for side in reversed(self.sides):
            for number in range(cfg.depth + 1):
                x = run(self.up[f"{side}_{number}"], jnp.concatenate([x, early.pop()], axis=-1), c)
            if side != self.sides[0]:
                x = self.doublings[f"{side}"](jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return self.conv_out(jax.nn.silu(self.norm_out(x.astype(jnp.float32))))
