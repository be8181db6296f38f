"""Rivals of the transformer on images alone: U-Net, U-ViT and DiT, under the same trainer, data, loss and sampler.

Each is a map (z [n, h, w, 3], u [n]) -> prediction [n, h, w, 3] of whole images at one noise time each. A row without
markers (layout.markers=False) is whole images one after another, so `Rival` only folds rows into images and back.
Letters: b rows, t positions, p patch values, n images.
"""

import einops
import jax
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
        self.cfg, self.place = cfg, place
        self.grid = dict(rows=grid[0], cols=grid[1], height=cfg.patch, width=cfg.patch, channels=3)
        self.network = NETWORKS[cfg.network](cfg, (grid[0] * cfg.patch, grid[1] * cfg.patch), rngs)

    def hidden(self, tokens, is_patch, z, u, cell, position, mask, context=None) -> jax.Array:
        """The prediction [b, t, p] for images that fill the rows."""
        del tokens, is_patch, cell, position, mask, context
        count = self.grid["rows"] * self.grid["cols"]
        order = "b (n rows cols) (height width channels)", "(b n) (rows height) (cols width) channels"
        images = einops.rearrange(z, " -> ".join(order), **self.grid)
        out = self.network(images, u[:, ::count].reshape(-1))
        return einops.rearrange(out, " -> ".join(order[::-1]), b=len(z), **self.grid)

    def predict(self, hidden: jax.Array, cell: jax.Array) -> jax.Array:
        del cell
        return hidden
