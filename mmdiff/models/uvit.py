"""U-ViT: a plain vision transformer with the time as one more token and long skips.

    x = [time(u), patches W] + place                  place: learned, one row for each position
    x <- x + attention(norm(x));  x <- x + mlp(norm(x))                     depth blocks
    x <- [x, early] W_skip                            before each block of the second half; early: what left the block of
                                                      the first half that mirrors it (an odd depth has a block between them)
    prediction = conv3x3(norm(x) W_out)               the time's position left out, over the whole image

Differences from the paper: time features smooth in u, tanh GELU, and a start at zero: W_out is zero and the convolution the
identity, so that the output starts at zero and learns at once. q, k, v have no biases, all else has.
Letters: n images, t positions (the time, then patches), p patch values, d width. Source: Bao et al., arXiv 2209.12152.
"""

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.models.image_layers import MLP, Attention, Conv, LayerNorm, Time, dense, remembering
from mmdiff.models.transfusion import compute_type, unrolled, unstack
from mmdiff.nn.layers import gather, parameter
from mmdiff.parallel.sharding import Placement


class Block(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement):
        gain = (2 * cfg.depth) ** -0.5
        self.norm_attention = LayerNorm(cfg.width)
        self.attention = Attention(cfg, cfg.width, cfg.head_width, rngs, place, bias=False, gain=gain)
        self.norm_mlp = LayerNorm(cfg.width)
        self.mlp = MLP(cfg.width, rngs, place, gain=gain)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, t, d] to [n, t, d]."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Stack(nnx.Module):
    """`depth` blocks and the `depth // 2` linear layers that join the second half to the first, each kind stacked."""

    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement):
        self.cfg, self.place, self.half = cfg, place, cfg.depth // 2
        keys = jax.random.split(rngs.params(), cfg.depth)
        self.layers = jax.vmap(lambda key: Block(cfg, nnx.Rngs(params=key), place))(keys)
        if self.half:
            keys = jax.random.split(rngs.params(), self.half)
            self.skips = jax.vmap(lambda key: dense(2 * cfg.width, cfg.width, nnx.Rngs(params=key), place))(keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, t, d] to [n, t, d]."""
        cfg, half, second = self.cfg, self.half, self.cfg.depth - self.half
        loop = unrolled(cfg, self.place)
        plain = remembering(cfg, lambda x, block: block(x), scanned=not loop)
        joined = remembering(
            cfg, lambda x, block, skip, early: block(skip(jnp.concatenate([x, early], axis=-1))), scanned=not loop
        )
        if not loop:
            part = lambda start, stop: jax.tree.map(lambda a: a[start:stop], self.layers)
            keep = lambda x, block: (plain(x, block),) * 2
            x, early = jax.lax.scan(keep, x, part(0, half))
            x, _ = jax.lax.scan(keep, x, part(half, second))
            if not half:
                return x
            mirrored = part(second, cfg.depth), self.skips, early[::-1]
            return jax.lax.scan(lambda x, it: (joined(x, *it), None), x, mirrored)[0]
        layers, left = unstack(self.layers, cfg.depth), []
        for block in layers[:second]:
            x = plain(x, block)
            left.append(x)
        skips = unstack(self.skips, half) if half else []
        for block, skip, early in zip(layers[second:], skips, left[:half][::-1], strict=True):
            x = joined(x, block, skip, early)
        return x


class UViT(nnx.Module):
    def __init__(self, cfg: config.Model, size: tuple[int, int], rngs: nnx.Rngs, place: Placement):
        self.cfg, self.place, self.grid = cfg, place, (size[0] // cfg.patch, size[1] // cfg.patch)
        values = 3 * cfg.patch**2
        self.patch_in = dense(values, cfg.width, rngs, place)
        self.time_in = Time(4 * cfg.width, cfg.width, rngs, place)
        places = jax.random.normal(rngs.params(), (1 + self.grid[0] * self.grid[1], cfg.width)) * 0.02
        self.place_embedding = parameter(places, (None, None))
        self.blocks = Stack(cfg, rngs, place)
        self.norm = LayerNorm(cfg.width)
        self.patch_out = dense(cfg.width, values, rngs, place, gain=0.0)
        self.conv_out = Conv(3, 3, rngs, place)
        identity = jnp.zeros((3, 3, 3, 3), jnp.float32).at[1, 1].set(jnp.eye(3))
        self.conv_out.kernel[...] = identity

    def __call__(self, z: jax.Array, u: jax.Array) -> jax.Array:
        """Images z [n, h, w, 3] at times u [n] to their prediction, float32 [n, h, w, 3]."""
        cfg, dtype = self.cfg, compute_type(self.cfg, self.place)
        split = dict(zip(("rows", "cols"), self.grid, strict=True), height=cfg.patch, width=cfg.patch)
        whole, cut = "n (rows height) (cols width) channels", "n (rows cols) (height width channels)"
        patches = einops.rearrange(z, f"{whole} -> {cut}", **split)
        x = jnp.concatenate([self.time_in(u)[:, None], self.patch_in(patches.astype(jnp.float32))], axis=1)
        x = self.blocks((x + gather(self.place_embedding, jnp.float32, self.place)).astype(dtype))
        out = self.patch_out(self.norm(x[:, 1:].astype(jnp.float32)))
        return self.conv_out(einops.rearrange(out, f"{cut} -> {whole}", **split, channels=3))
