"""What stands at the positions of an image behind a front end: vectors that an adapter makes of a vision tower's features.

    [IMG] <rows> <cols> v_1 .. v_K [/IMG]           v = adapter(tower(image)), K vectors of the model's width
    row   .... slices of the image's pixels ....    (mmdiff/adapters/slices.py)

In the network each image's slices are gathered into pixels again, a static number of images per row; the tower and the
adapter read whole images, and the vectors go where the slices stood. Like raw patches with layout.images="read" they read
what comes before them; where they stand in the image is for the tower to say.

Letters: b rows, t positions, i images of a row, k vectors of an image, s values of a slice, n = b i, d width.
"""

from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.adapters.base import adapter
from mmdiff.adapters.layers import linear
from mmdiff.nn.layers import RMSNorm, gather, parameter
from mmdiff.parallel.sharding import NOWHERE, Placement
from mmdiff.pretrained.encoder import VisionTower, normalised

WHOLE, CUT = "n (rows p) (cols q) c", "n (rows cols p q c)"
AROUND = 4  # positions of an image that carry no pixels: [IMG], its two sizes, [/IMG]


class Found(NamedTuple):
    """The images of rows."""

    slices: jax.Array  # [b, i, k, s]
    at: jax.Array  # int32 [b, i, k], the positions where they stand; t where there is no such image


class FrontEnd(nnx.Module):
    def __init__(
        self,
        cfg: config.Model,
        front: config.FrontEnd,
        size: tuple[int, int],
        rngs: nnx.Rngs,
        place: Placement = NOWHERE,
        *,
        draws: bool = False,
    ):
        """`size`: height and width of every image. `draws`: vectors are also predicted, and pixels made of them
        (mmdiff/image_paths/next_embedding.py)."""
        self.cfg, self.front, self.size, self.place = cfg, front, size, place
        self.values = front.values(*size, cfg.patch)
        self.adapter = adapter(front).of(front, cfg.width, rngs, place)
        if front.gated:
            self.sign = parameter(jax.random.normal(rngs.params(), (cfg.width,)) * 0.02, (None,))
        if draws:
            self.norm, self.regress = RMSNorm(cfg.width), linear(cfg.width, cfg.width, rngs, place, bias=False)
            self.decoder = pixel_decoder(cfg, front, size, rngs, place)

    def standing(self, vectors: jax.Array) -> jax.Array:
        """What stands in the row for vectors [b, t, d]: themselves, or behind gates the sign."""
        if not self.front.gated:
            return vectors
        return jnp.broadcast_to(gather(self.sign, vectors.dtype, self.place), vectors.shape)

    def embed(self, z: jax.Array, cell: jax.Array, tower: VisionTower) -> jax.Array:
        """Slices z [b, t, s] of pixels in [-1, 1], in cells [b, t, 4], to vectors [b, t, d], zero outside of images."""
        found = find(z, cell, self.front.grid)
        rows, images, count = found.at.shape
        if not images:  # too short, as where texts are written token by token
            return jnp.zeros((*z.shape[:2], self.cfg.width))
        vectors = self.vectors(self.pixels(found.slices.reshape(rows * images, count, -1)), tower)
        row = jnp.arange(rows)[:, None, None]
        vectors = vectors.reshape(rows, images, count, -1)
        return jnp.zeros((*z.shape[:2], vectors.shape[-1]), vectors.dtype).at[row, found.at].set(vectors, mode="drop")

    def pixels(self, slices: jax.Array) -> jax.Array:
        """[n, k, s] to [n, h, w, 3]."""
        flat = slices.reshape(len(slices), -1)[:, : 3 * self.size[0] * self.size[1]]
        return einops.rearrange(flat, f"{CUT} -> {WHOLE}", **self._sides())

    def vectors(self, pixels: jax.Array, tower: VisionTower) -> jax.Array:
        """Images [n, h, w, 3] in [-1, 1] to [n, k, d]."""
        features = self.place(look(tower, pixels, self.front), "rows", None, None)
        return self._scaled(self.adapter.see(features, tower))

    def predict(self, hidden: jax.Array, cell: jax.Array | None) -> jax.Array:
        """Final hidden states [b, t, d] to the vectors that should stand behind them, float32 [b, t, d]; the cells make no
        difference."""
        return self._scaled(self.regress(self.norm(hidden).astype(jnp.float32)))

    def slices(self, pixels: jax.Array) -> jax.Array:
        """The inverse of `pixels`, of any type."""
        count = self.front.grid[0] * self.front.grid[1]
        flat = einops.rearrange(pixels, f"{WHOLE} -> {CUT}", **self._sides())
        return jnp.pad(flat, ((0, 0), (0, count * self.values - flat.shape[1]))).reshape(len(flat), count, self.values)

    def _sides(self) -> dict[str, int]:
        patch = self.cfg.patch
        return {"rows": self.size[0] // patch, "cols": self.size[1] // patch, "p": patch, "q": patch, "c": 3}

    def _scaled(self, vectors: jax.Array) -> jax.Array:
        """With root mean square 1, where only their directions are learnt."""
        if self.front.regression == "l2":
            return vectors
        square = jnp.mean(jnp.square(vectors.astype(jnp.float32)), axis=-1, keepdims=True)
        return vectors * jax.lax.rsqrt(square + 1e-6).astype(vectors.dtype)


def begins(cell: jax.Array) -> jax.Array:
    """Where an image begins: bool [b, t] of cells [b, t, 4]."""
    return (cell[..., 2] > 0) & (cell[..., 0] == 0) & (cell[..., 1] == 0)


def find(z: jax.Array, cell: jax.Array, grid: tuple[int, int]) -> Found:
    """The images of rows z [b, t, s] with cells [b, t, 4]; every one of `grid` positions, side by side."""
    (rows, cols), length = grid, z.shape[1]
    count = rows * cols
    # the first of a chunk may have its sizes before it
    images = (length + AROUND - 1) // (count + AROUND)
    starts = jnp.sort(jnp.where(begins(cell), jnp.arange(length), length), axis=1)[:, :images]
    at = jnp.where(starts[..., None] < length, starts[..., None] + jnp.arange(count), length)
    flat = at.reshape(len(z), -1, 1)
    slices = jnp.where(flat < length, jnp.take_along_axis(z, jnp.minimum(flat, length - 1), axis=1), 0.0)
    return Found(slices.reshape(len(z), images, count, z.shape[-1]), at)


def look(tower: VisionTower, pixels: jax.Array, front: config.FrontEnd) -> jax.Array:
    """What the tower sees in images [n, h, w, 3] from [-1, 1]: its features [n, 1 + patches, f], in its parameters' type."""
    side = front.tower.side
    images = normalised((pixels.astype(jnp.float32) + 1.0) * 127.5, side)
    return tower(images.astype(tower.first[...].dtype), -front.skipped or None)


def pixel_decoder(cfg: config.Model, front: config.FrontEnd, size: tuple[int, int], rngs: nnx.Rngs, place: Placement) -> Any:
    """What denoises pixels given an image's vectors: width, depth and patches of the model."""
    from mmdiff.tokenizers.pixel_decoder import PixelDecoder  # which is made of layers that know the transformer

    shape = config.Model(
        network="uvit",
        width=cfg.width,
        depth=cfg.depth,
        patch=cfg.patch,
        head_width=cfg.head_width,
        attention=cfg.attention,
        compute=cfg.compute,
        remat=cfg.remat,
        lossless=False,
    )
    grid, condition = (size[0] // cfg.patch, size[1] // cfg.patch), (front.tokens, cfg.width)
    return PixelDecoder(shape, config.Diffusion(), config.Sampling(), grid, condition, rngs, place)
