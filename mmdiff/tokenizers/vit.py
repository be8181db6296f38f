"""The transformer autoencoder: one code for each patch, or a few for the image as a whole.

    encode   [patches W + place, latent queries]  --blocks-->  code = norm(x) W at the latents, or at the patches
    decode   [codes W + place of the code, patch queries + place]  --blocks-->  norm(x) at the patches
    pixels   x W_out, patches put together
    block    x <- x + attention(norm(x));  x <- x + mlp(norm(x))                                     everything reads everything

With tokenizer.latents = 0 there are no queries: codes stand where their patches do, on the way in and out.
Letters: n images, h and w pixels, l codes, c numbers of a code, t patches, d width.
Sources: Yu et al., ViT-VQGAN, arXiv 2110.04627; one-dimensional latents: Yu et al., TiTok, arXiv 2406.07550.
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.layout import patch_cells
from mmdiff.models.image_layers import LayerNorm, dense, remembering
from mmdiff.models.patches import sincos
from mmdiff.models.transfusion import compute_type, unrolled, unstack
from mmdiff.models.uvit import Block
from mmdiff.nn.layers import gather, parameter
from mmdiff.parallel.sharding import Placement
from mmdiff.tokenizers.v2l.read import ReadWords


class Blocks(nnx.Module):
    """`depth` blocks (by default the configuration's), stacked."""

    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement, depth: int = 0):
        self.cfg, self.place, self.depth = cfg, place, depth or cfg.depth
        keys = jax.random.split(rngs.params(), self.depth)
        self.layers = jax.vmap(lambda key: Block(cfg, nnx.Rngs(params=key), place))(keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, positions, d] to the same."""
        loop = unrolled(self.cfg, self.place)
        layer = remembering(self.cfg, lambda x, block: block(x), scanned=not loop)
        if not loop:
            return jax.lax.scan(lambda x, block: (layer(x, block), None), x, self.layers)[0]
        for block in unstack(self.layers, self.depth):
            x = layer(x, block)
        return x


class Queries(nnx.Module):
    """Learned vectors that are the same for every image: [n, count, d]."""

    def __init__(self, count: int, width: int, rngs: nnx.Rngs, place: Placement):
        self.place = place
        self.embedding = parameter(jax.random.normal(rngs.params(), (count, width)) * 0.02, (None, None))

    def __call__(self, images: int, dtype) -> jax.Array:
        table = gather(self.embedding, dtype, self.place)
        return jnp.broadcast_to(table, (images, *table.shape))


class Encoder(nnx.Module):
    def __init__(
        self, cfg: config.Model, grid: tuple[int, int], latents: int, code_width: int, rngs: nnx.Rngs, place: Placement
    ):
        self.cfg, self.place, self.grid, self.latents = cfg, place, grid, latents
        self.patch_in = dense(3 * cfg.patch**2, cfg.width, rngs, place)
        if latents:
            self.queries = Queries(latents, cfg.width, rngs, place)
        self.blocks = Blocks(cfg, rngs, place)
        self.norm = LayerNorm(cfg.width)
        self.code_out = dense(cfg.width, code_width, rngs, place)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[n, h, w, 3] to float32 [n, l, c]."""
        dtype = compute_type(self.cfg, self.place)
        side = {"rows": self.grid[0], "cols": self.grid[1]}
        patches = einops.rearrange(images, "n (rows p) (cols q) c -> n (rows cols) (p q c)", **side)
        x = (self.patch_in(patches.astype(jnp.float32)) + places(self.grid, self.cfg.width)).astype(dtype)
        if self.latents:
            x = jnp.concatenate([x, self.queries(len(x), dtype)], axis=1)
        x = self.blocks(x)[:, -self.latents :] if self.latents else self.blocks(x)
        return self.code_out(self.norm(x.astype(jnp.float32)))


class Decoder(nnx.Module):
    def __init__(
        self,
        cfg: config.Model,
        grid: tuple[int, int],
        latents: int,
        code_width: int,
        rngs: nnx.Rngs,
        place: Placement,
        *,
        words: int = 0,
        residual: bool = False,
    ):
        """words: how many codes stand before those of the places, to be read between two halves of the blocks (v2l/read.py)."""
        self.cfg, self.place, self.grid, self.latents, self.words = cfg, place, grid, latents, words
        self.code_in = dense(code_width, cfg.width, rngs, place)
        if latents:
            self.code_places = Queries(latents, cfg.width, rngs, place)
            self.queries = Queries(1, cfg.width, rngs, place)
        self.blocks = Blocks(cfg, rngs, place, cfg.depth - cfg.depth // 2 if words else cfg.depth)
        if words:
            self.read = ReadWords(cfg, cfg.width, code_width, residual, rngs, place)
            self.later = Blocks(cfg, rngs, place, cfg.depth // 2)
        self.norm = LayerNorm(cfg.width)
        self.out = dense(cfg.width, 3 * cfg.patch**2, rngs, place)

    def features(self, codes: jax.Array) -> jax.Array:
        """[n, words + l, c] to what the last layer reads: float32 [n, t, d]."""
        dtype = compute_type(self.cfg, self.place)
        words, codes = codes[:, : self.words], codes[:, self.words :]
        x, where = self.code_in(codes.astype(jnp.float32)).astype(dtype), places(self.grid, self.cfg.width).astype(dtype)
        if self.words:
            return self.norm(self.later(self.read(self.blocks(x + where), words)).astype(jnp.float32))
        if not self.latents:
            return self.norm(self.blocks(x + where).astype(jnp.float32))
        asked = self.queries(len(x), dtype) + where
        x = self.blocks(jnp.concatenate([x + self.code_places(len(x), dtype), asked], axis=1))
        return self.norm(x[:, self.latents :].astype(jnp.float32))

    def pixels(self, features: jax.Array, out: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """The last layer, or `out` in its place: float32 [n, h, w, 3]."""
        side = {"rows": self.grid[0], "cols": self.grid[1], "p": self.cfg.patch, "q": self.cfg.patch}
        return einops.rearrange((out or self.out)(features), "n (rows cols) (p q c) -> n (rows p) (cols q) c", **side)


def places(grid: tuple[int, int], width: int) -> jax.Array:
    """Fixed features of the places of patches, float32 [t, d]."""
    return sincos(jnp.asarray(patch_cells(*grid)[:, :2]), width)
