"""From a few vectors to pixels, by denoising: what draws the images of tokenizers whose codes hold no pixels.

    c = norm(condition)
    x = [time(u), c W_c, patches of z W + own W_o] + place      own: of c what stands at the patch's place, or all of it
    x_hat = conv3x3(norm(blocks(x)) W_out)                       the positions of the patches alone
    loss  = the diffusion loss of x_hat, as the project's own images have it (mmdiff/diffusion/loss.py)
    draw  = a solver's steps from noise to x_hat (mmdiff/diffusion/solvers.py), one scan around one copy of the network

The blocks are those of a U-ViT (mmdiff/models/uvit.py), whose attention lets every patch read every vector. By that alone it
is learnt late which vector is about which patch, and where a patch stands. So vectors that belong to places also go to the
patches there, others all to every patch, and places begin as waves of row and column.

Whoever owns the vectors trains this beside them from stop_gradient(vectors). LaVIT trains its decoder afterwards, with the
tokenizer frozen; as nothing flows back, it learns the same task here, only that the vectors still move in the beginning.
Theirs is a large pretrained U-Net with guidance; ours starts from nothing and is not guided.

Drawing starts from noise that is given: with the same one for every image, pixels are a function of the vectors.

Letters: n images, h and w pixels, m vectors of c numbers, p values of a patch, t patches.
Source: Jin et al., LaVIT, arXiv 2309.04669 (pixels by denoising, given decoded features).
"""

import math

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.diffusion import grids, prediction
from mmdiff.diffusion.loss import image_error
from mmdiff.diffusion.schedule import make_schedule, time_of
from mmdiff.diffusion.solvers import integrate, make_table
from mmdiff.diffusion.times import sample_times, stratified
from mmdiff.layout import patch_cells
from mmdiff.models.image_layers import Conv, LayerNorm, Time, dense
from mmdiff.models.patches import sincos
from mmdiff.models.transfusion import compute_type
from mmdiff.models.uvit import Stack
from mmdiff.nn.layers import gather, parameter
from mmdiff.parallel.sharding import Placement


def noise_for(images: jax.Array, there: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers r [n] and noise [n, h, w, 3] of `PixelDecoder.losses`; `there` [n]: which images count."""
    one, two = jax.random.split(key)
    return stratified(there, one), jax.random.normal(two, images.shape)


class PixelDecoder(nnx.Module):
    def __init__(
        self,
        cfg: config.Model,
        diffusion: config.Diffusion,
        sampling: config.Sampling,
        grid: tuple[int, int],
        condition: tuple[int, int],
        rngs: nnx.Rngs,
        place: Placement,
        *,
        square: bool = False,
    ):
        """cfg: width, depth, patch and head_width of the network. sampling: solver, steps, grid, sigma_max and sigma_min of
        `draw`. grid: rows and columns of patches. condition: (m, c). square: the vectors belong to the places of a square that
        covers the image, in raster order."""
        self.cfg, self.diffusion, self.sampling, self.grid, self.place = cfg, diffusion, sampling, grid, place
        (count, width), values = condition, 3 * cfg.patch**2
        self.side = math.isqrt(count) if square else 0
        self.patch_in = dense(values, cfg.width, rngs, place)
        self.time_in = Time(4 * cfg.width, cfg.width, rngs, place)
        self.condition_norm, self.condition_in = LayerNorm(width), dense(width, cfg.width, rngs, place)
        self.own_in = dense(width if square else count * width, cfg.width, rngs, place)
        small = jax.random.normal(rngs.params(), (1 + count, cfg.width)) * 0.02
        places = jnp.concatenate([small, sincos(jnp.asarray(patch_cells(*grid)[:, :2]), cfg.width)])
        self.place_embedding = parameter(places, (None, None))
        self.blocks = Stack(cfg, rngs, place)
        self.norm = LayerNorm(cfg.width)
        self.patch_out = dense(cfg.width, values, rngs, place, gain=0.0)
        self.conv_out = Conv(3, 3, rngs, place)
        self.conv_out.kernel[...] = jnp.zeros((3, 3, 3, 3), jnp.float32).at[1, 1].set(jnp.eye(3))

    def __call__(self, z: jax.Array, u: jax.Array, condition: jax.Array) -> jax.Array:
        """Images z [n, h, w, 3] at times u [n], given vectors [n, m, c], to their prediction float32 [n, h, w, 3]."""
        cfg, dtype = self.cfg, compute_type(self.cfg, self.place)
        split = dict(zip(("rows", "cols"), self.grid, strict=True), height=cfg.patch, width=cfg.patch)
        whole, cut = "n (rows height) (cols width) channels", "n (rows cols) (height width channels)"
        patches = self.patch_in(einops.rearrange(z, f"{whole} -> {cut}", **split).astype(jnp.float32))
        condition = self.condition_norm(condition.astype(jnp.float32))
        told = self.time_in(u)[:, None], self.condition_in(condition)
        x = jnp.concatenate([*told, patches + self._own(condition)], axis=1)
        x = self.blocks((x + gather(self.place_embedding, jnp.float32, self.place)).astype(dtype))
        out = self.patch_out(self.norm(x[:, -patches.shape[1] :].astype(jnp.float32)))
        return self.conv_out(einops.rearrange(out, f"{cut} -> {whole}", **split, channels=3))

    def _own(self, condition: jax.Array) -> jax.Array:
        """Of vectors [n, m, c] what goes to each patch: [n, t or 1, d]."""
        if not self.side:
            return self.own_in(einops.rearrange(condition, "n m c -> n 1 (m c)"))
        square = einops.rearrange(self.own_in(condition), "n (rows cols) d -> n rows cols d", rows=self.side)
        fitting = jax.image.resize(square, (len(square), *self.grid, square.shape[-1]), "linear")
        return einops.rearrange(fitting, "n rows cols d -> n (rows cols) d")

    def losses(self, images: jax.Array, condition: jax.Array, r: jax.Array, eps: jax.Array) -> jax.Array:
        """The diffusion loss of each image [n], float32, at times that r [n] stands for, with noise eps [n, h, w, 3]."""
        u = sample_times(self.diffusion, r)
        alpha, sigma = (a[:, None, None, None] for a in make_schedule(self.diffusion)(u))
        output = self(alpha * images + sigma * eps, u, condition)
        flat = lambda a: a.reshape(len(images), -1)
        return image_error(flat(output), flat(images), flat(eps), flat(alpha), flat(sigma), self.diffusion)

    def draw(self, condition: jax.Array, key: jax.Array) -> jax.Array:
        """Images float32 [n, h, w, 3] of vectors [n, m, c], all from the same noise, that of `key`."""
        sampling, side = self.sampling, self.cfg.patch
        kind = grids.usual(sampling.solver) if sampling.grid == "auto" else sampling.grid
        count = grids.intervals(sampling.solver, sampling.steps)
        levels = grids.make_grid(kind, count, sampling.sigma_max, sampling.sigma_min, self.diffusion.shift)
        table = make_table(sampling.solver, levels)
        shape = (len(condition), self.grid[0] * side, self.grid[1] * side, 3)
        noise = lambda step: jnp.broadcast_to(jax.random.normal(jax.random.fold_in(key, step), shape[1:]), shape)

        def denoise(point: jax.Array, sigma: jax.Array) -> jax.Array:
            u = time_of(sigma)
            alpha, scale = make_schedule(self.diffusion)(u)
            z = alpha * point
            output = self(z, jnp.broadcast_to(u, len(z)), condition)
            return prediction.convert(output, z, alpha, scale, source=self.diffusion.prediction, target="x", clip=1e-4)

        return integrate(denoise, table.level[0] * noise(0), table, lambda step: noise(step + 1))
