"""Rivals of the transformer on images alone: U-Net, U-ViT and DiT, under the same trainer, data, loss and sampler.

Each is a map (z [n, h, w, 3], u [n]) -> prediction [n, h, w, 3] of whole images at one noise time each. A row without
markers (layout.markers=False) is whole images one after another, so `Rival` only folds rows into images and back.
Letters: b rows, t positions, p patch values, n images.
"""

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.models.dit import DiT
from mmdiff.models.unet import UNet
from mmdiff.models.uvit import UViT
from mmdiff.parallel.sharding import Placement

NETWORKS = {"unet": UNet, "uvit": UViT, "dit": DiT}


class Rival(nnx.Module):
    """A network for whole images behind the interface of the transformer (mmdiff/models/network.py)."""

    def __init__(self, cfg: config.Model, grid: tuple[int, int] | None, rngs: nnx.Rngs, place: Placement):
        if grid is None:
            raise config.ConfigError(f"model.network={cfg.network!r} needs images of one size: set data.image_size.")
        self.cfg, self.place, self.count = cfg, place, grid[0] * grid[1]
        self.grid = dict(rows=grid[0], cols=grid[1], height=cfg.patch, width=cfg.patch, channels=3)
        self.network = NETWORKS[cfg.network](cfg, (grid[0] * cfg.patch, grid[1] * cfg.patch), rngs, place)

    def hidden(self, tokens, is_patch, z, u, cell, position, mask, context=None, step=None) -> jax.Array:
        """The prediction, float32 [b, t, p], for rows of images and then, perhaps, padding."""
        del tokens, is_patch, cell, position, mask, context, step
        length = z.shape[1]
        missing = -length % self.count
        z, u = jnp.pad(z, ((0, 0), (0, missing), (0, 0))), jnp.pad(u, ((0, 0), (0, missing)))
        order = "b (n rows cols) (height width channels)", "(b n) (rows height) (cols width) channels"
        images = self.place(einops.rearrange(z, " -> ".join(order), **self.grid), "rows", None, None, None)
        out = self.network(images, self.place(u[:, :: self.count].reshape(-1), "rows"))
        return einops.rearrange(out, " -> ".join(order[::-1]), b=len(z), **self.grid)[:, :length]

    def predict(self, hidden: jax.Array, cell: jax.Array) -> jax.Array:
        del cell
        return hidden
