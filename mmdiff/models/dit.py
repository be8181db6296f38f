"""DiT on pixels: a vision transformer whose every block is steered by the time (adaLN-Zero).

    x  = patches W + place                            place: fixed sines and cosines of row and column
    c  = silu(time(u))
    x <- x + g_1 attention((1 + s_1) norm(x) + b_1)
    x <- x + g_2 mlp((1 + s_2) norm(x) + b_2)         (b_1, s_1, g_1, b_2, s_2, g_2) = c W_6d of this block, zero at the start
    prediction = ((1 + s) norm(x) + b) W_out          (b, s) = c W_2d; W_out and W_2d zero at the start

Norms have no parameters of their own. Differences from the paper: pixels in place of latents, no classes, time features
smooth in u, and the prediction is x, eps or v, without a learned variance.
Letters: n images, t patches, p patch values, d width. Source: Peebles and Xie, arXiv 2212.09748.
"""

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.layout import patch_cells
from mmdiff.models.image_layers import MLP, Attention, Time, dense, remembering, standard
from mmdiff.models.patches import sincos
from mmdiff.models.transfusion import compute_type, unrolled, unstack
from mmdiff.nn.layers import Linear, parts
from mmdiff.parallel.sharding import Placement


class Block(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement):
        width = cfg.width
        self.attention = Attention(cfg, width, cfg.head_width, rngs, place)
        self.mlp = MLP(width, rngs, place)
        self.modulation = Linear(width, (6, width), rngs, axes=(None, None, None), gain=0.0, bias=True, place=place)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """x [n, t, d] under c [n, d] to [n, t, d]."""
        shift_attention, scale_attention, gate_attention, shift, scale, gate = parts(self.modulation(c[:, None]))
        x = x + gate_attention * self.attention(modulated(x, scale_attention, shift_attention))
        return x + gate * self.mlp(modulated(x, scale, shift))


class DiT(nnx.Module):
    def __init__(self, cfg: config.Model, size: tuple[int, int], rngs: nnx.Rngs, place: Placement):
        self.cfg, self.place, self.grid = cfg, place, (size[0] // cfg.patch, size[1] // cfg.patch)
        values = 3 * cfg.patch**2
        self.patch_in = dense(values, cfg.width, rngs, place)
        self.time_in = Time(cfg.width, cfg.width, rngs, place)
        keys = jax.random.split(rngs.params(), cfg.depth)
        self.blocks = jax.vmap(lambda key: Block(cfg, nnx.Rngs(params=key), place))(keys)
        self.modulation = Linear(cfg.width, (2, cfg.width), rngs, axes=(None, None, None), gain=0.0, bias=True, place=place)
        self.patch_out = dense(cfg.width, values, rngs, place, gain=0.0)

    def __call__(self, z: jax.Array, u: jax.Array) -> jax.Array:
        """Images z [n, h, w, 3] at times u [n] to their prediction, float32 [n, h, w, 3]."""
        cfg, dtype = self.cfg, compute_type(self.cfg, self.place)
        split = dict(zip(("rows", "cols"), self.grid, strict=True), height=cfg.patch, width=cfg.patch)
        whole, cut = "n (rows height) (cols width) channels", "n (rows cols) (height width channels)"
        patches = einops.rearrange(z, f"{whole} -> {cut}", **split)
        place = sincos(jnp.asarray(patch_cells(*self.grid)[:, :2]), cfg.width)
        x = (self.patch_in(patches.astype(jnp.float32)) + place).astype(dtype)
        c = jax.nn.silu(self.time_in(u)).astype(dtype)
        x = self._blocks(x, c).astype(jnp.float32)
        shift, scale = parts(self.modulation(c.astype(jnp.float32)[:, None]))
        out = self.patch_out(modulated(x, scale, shift))
        return einops.rearrange(out, f"{cut} -> {whole}", **split, channels=3)

    def _blocks(self, x: jax.Array, c: jax.Array) -> jax.Array:
        loop = unrolled(self.cfg, self.place)
        layer = remembering(self.cfg, lambda x, c, block: block(x, c), scanned=not loop)
        if not loop:
            return jax.lax.scan(lambda x, block: (layer(x, c, block), None), x, self.blocks)[0]
        for block in unstack(self.blocks, self.cfg.depth):
            x = layer(x, c, block)
        return x


def modulated(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """The norm of x [n, t, d] over d, times 1 + scale, plus shift (both [n, 1, d])."""
    return standard(x, (-1,)).astype(x.dtype) * (1 + scale) + shift
