"""The raw-patch image path: what stands at an image's positions, how it is read out, and with which loss.

An image path answers four questions: what an image's positions hold (here raw patches), how they read each other (one
bidirectional block, mmdiff/layout.py), which head and loss they get (denoise), and how an image is drawn (the solver in
mmdiff/sampling/image.py). The other paths are in mmdiff/image_paths/; what they put into the network is here (`Codes`).

    embed:  e = z W_patch + features(u) W_time + features(place) W_place       float32; clean patches have u = 0
            + (features(h) - features(0)) W_step                               few-step networks; zero at the start
    head:   RMSNorm + linear, zero at the start unless model.zero_head=False   + conv(conv(features of the image))

`place` says where in its image a patch stands. RoPE alone says only how far apart patches are, and a network then spends
many steps on finding out which of them is the top left one (JiT, arXiv 2511.13720, adds fixed positions too). With
overlap, z is a patch with a margin of its neighbours' pixels, and the head's windows are faded into one another.

With width >= 3 patch^2 the first map is injective: the input is lossless (`invert`).
Letters: b rows, t positions, p patch values, d width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.diffusion.schedule import DDPM, DDPM_LEVELS
from mmdiff.models.neighbours import overlap_add, with_margin
from mmdiff.nn.layers import Linear, RMSNorm, gather, parameter
from mmdiff.parallel.sharding import NOWHERE, Placement

TIME_FREQUENCIES = 16
LARGEST_FREQUENCY = 4.0  # radians per unit u: smooth in time, which few-step training depends on
PLACE_FREQUENCIES = 8
LEARNED_GRID = 16  # side of the table of learned places; images of other sizes read between its entries
CONV_CHANNELS = 16
COMPONENTS = 10  # of the mixture that predicts a pixel (mmdiff/image_paths/next_pixel.py)
MIXTURE_VALUES = 10 * COMPONENTS


def time_features(u: jax.Array) -> jax.Array:
    """Smooth features of the noise time: u [...] to float32 [..., 1 + 2 * TIME_FREQUENCIES]."""
    frequencies = LARGEST_FREQUENCY * np.arange(1, TIME_FREQUENCIES + 1, dtype=np.float32) / TIME_FREQUENCIES
    angles = u[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([u[..., None], jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimeIn(nnx.Module):
    """The noise time u [...] as float32 [..., d]: linear in smooth features, or a row of the table of the DDPM schedule."""

    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE):
        self.table, self.place = cfg.time_embedding == "table", place
        if self.table:
            rows = jax.random.normal(rngs.params(), (len(DDPM_LEVELS), cfg.width)) * 0.02
            self.time_table = parameter(rows, (None, "width"))
        else:
            self.linear = Linear(1 + 2 * TIME_FREQUENCIES, cfg.width, rngs, axes=(None, "width"), place=place)

    def __call__(self, u: jax.Array) -> jax.Array:
        if self.table:
            return gather(self.time_table, jnp.float32, self.place)[jnp.rint(DDPM().index_of(u)).astype(jnp.int32)]
        return self.linear(time_features(u))


class PlaceIn(nnx.Module):
    """Where in its image a patch stands, `cell` [..., 4], as float32 [..., d]."""

    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE):
        self.kind, self.width, self.place = cfg.places, cfg.width, place
        if cfg.places == "smooth":
            self.linear = Linear(4 * PLACE_FREQUENCIES, cfg.width, rngs, axes=(None, "width"), place=place)
        elif cfg.places == "learned":
            table = jax.random.normal(rngs.params(), (LEARNED_GRID, LEARNED_GRID, cfg.width)) * 0.02
            self.table = parameter(table, (None, None, "width"))

    def __call__(self, cell: jax.Array) -> jax.Array:
        if self.kind == "sincos":
            return sincos(cell[..., :2], self.width)
        place = (cell[..., :2] + 0.5) / jnp.maximum(cell[..., 2:], 1)  # in the unit square
        if self.kind == "smooth":
            frequencies = np.pi * np.arange(1, PLACE_FREQUENCIES + 1, dtype=np.float32)
            angles = (place[..., None] * frequencies).reshape(*place.shape[:-1], -1)
            return self.linear(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        return between(gather(self.table, jnp.float32, self.place), place * LEARNED_GRID - 0.5)


def sincos(place: jax.Array, width: int) -> jax.Array:
    """Fixed features of whole-number places [..., 2]: float32 [..., width], a quarter each of sines and cosines of row and
    column. Source: the sequence features of arXiv 1706.03762, side by side for two axes, as in arXiv 2111.06377 (MAE).
    """
    count = -(-width // 4)
    frequencies = 10000.0 ** (-np.arange(count, dtype=np.float32) / count)
    angles = place[..., None].astype(jnp.float32) * frequencies  # [..., 2, count]
    both = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(*place.shape[:-1], -1)[..., :width]


def between(table: jax.Array, at: jax.Array) -> jax.Array:
    """Entries of `table` [g, g, d] at fractional indices `at` [..., 2], bilinear, held constant beyond its ends."""
    last = table.shape[0] - 1
    at = jnp.clip(at, 0, last)
    low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, max(last - 1, 0))
    high = jnp.minimum(low + 1, last)
    (r, c), (row, col), (below, right) = (jnp.moveaxis(a, -1, 0) for a in (at - low, low, high))
    r, c = r[..., None], c[..., None]
    upper = (1 - c) * table[row, col] + c * table[row, right]
    lower = (1 - c) * table[below, col] + c * table[below, right]
    return (1 - r) * upper + r * lower


class ConvHead(nnx.Module):
    """Two 3x3 convolutions over whole images of features; the second is zero at the start.

    They see across the edges of patches, which a linear head cannot (the seams of large patches).
    """

    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE):
        self.side = cfg.patch
        self.features = Linear(cfg.width, cfg.patch**2 * CONV_CHANNELS, rngs, axes=("width", None), place=place)
        first = jax.random.normal(rngs.params(), (3, 3, CONV_CHANNELS, CONV_CHANNELS)) * (9 * CONV_CHANNELS) ** -0.5
        self.first = parameter(first, (None,) * 4)
        self.second = parameter(jnp.zeros((3, 3, CONV_CHANNELS, 3), jnp.float32), (None,) * 4)

    def __call__(self, hidden: jax.Array, cell: jax.Array) -> jax.Array:
        """[b, t, d] to float32 [b, t, p]."""
        pixels = self.features(hidden).reshape(*hidden.shape[:2], self.side, self.side, CONV_CHANNELS)
        pixels = self._convolve(jax.nn.silu(pixels), self.first[...], cell)
        pixels = self._convolve(jax.nn.silu(pixels), self.second[...], cell)
        return pixels.reshape(*hidden.shape[:2], -1)

    def _convolve(self, pixels: jax.Array, kernel: jax.Array, cell: jax.Array) -> jax.Array:
        windows = with_margin(pixels, cell, 1)
        flat = windows.reshape(-1, *windows.shape[2:])
        out = jax.lax.conv_general_dilated(flat, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return out.reshape(*pixels.shape[:-1], kernel.shape[-1])


class Codes(nnx.Module):
    """The part of an image's positions that is no token, where codes stand for patches: where each of them lies."""

    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE, *, regressed: bool = False):
        """`regressed`: the numbers of codes are predicted, too."""
        self.width, self.values, self.placed = cfg.width, 3 * cfg.patch**2, cfg.places != "none"
        if regressed:
            self.norm = RMSNorm(cfg.width)
            self.numbers_out = Linear(cfg.width, self.values, rngs, axes=("width", None), place=place)
        if self.placed:
            self.place_in = PlaceIn(cfg, rngs, place)

    def embed(self, z: jax.Array, u: jax.Array, cell: jax.Array, step: jax.Array | None = None) -> jax.Array:
        """Cells [b, t, 4] to float32 [b, t, d]; the rest, as of RawPatches, makes no difference."""
        return self.place_in(cell) if self.placed else jnp.zeros((*cell.shape[:-1], self.width))

    def predict(self, hidden: jax.Array, cell: jax.Array) -> jax.Array:
        """Final hidden states [b, t, d] to the numbers of the codes behind them, float32 [b, t, p]; the cells make no
        difference."""
        return self.numbers_out(self.norm(hidden).astype(jnp.float32))


class RawPatches(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE, outputs: int | None = None):
        """`outputs`: values that `predict` gives for each position, 0: none; None: those of a patch."""
        self.side, self.overlap, self.place = cfg.patch, cfg.overlap, place
        self.values = 3 * cfg.patch**2
        window = 3 * (cfg.patch + 2 * cfg.overlap) ** 2
        into = functools.partial(Linear, outputs=cfg.width, rngs=rngs, axes=(None, "width"), place=place)
        self.narrow = cfg.bottleneck > 0
        if self.narrow:
            self.patch_narrow = Linear(window, cfg.bottleneck, rngs, axes=(None, None), place=place)
        self.patch_in = into(cfg.bottleneck or window)
        self.timed, self.placed, self.conv = (
            cfg.time == "input",
            cfg.places != "none",
            cfg.patch_head == "conv" and outputs is None,
        )
        if cfg.time in ("input", "token"):
            self.time_in = TimeIn(cfg, rngs, place)
        if self.placed:
            self.place_in = PlaceIn(cfg, rngs, place)
        self.stepped = cfg.step_input
        if self.stepped:
            self.step_in = into(1 + 2 * TIME_FREQUENCIES, gain=0.0)
        if outputs != 0:
            self.norm = RMSNorm(cfg.width)
            self.patch_out = Linear(
                cfg.width, outputs or window, rngs, axes=("width", None), gain=1.0 - cfg.zero_head, place=place
            )
        if self.conv:
            self.conv_out = ConvHead(cfg, rngs, place)

    def embed(self, z: jax.Array, u: jax.Array, cell: jax.Array, step: jax.Array | None = None) -> jax.Array:
        """Patches z [b, t, p] (clean, or noised at time u [b, t]) in cells [b, t, 4] to float32 [b, t, d].

        `step`, the lengths h [b, t] of steps, is for networks with model.step_input; None is 0.
        """
        z = z.astype(jnp.float32)
        if self.overlap:
            z = with_margin(self._square(z), cell, self.overlap).reshape(*z.shape[:-1], -1)
        if self.narrow:
            z = self._exact(self.patch_narrow, z)
        embedded = self._exact(self.patch_in, z)
        if self.placed:
            embedded = embedded + self.place_in(cell)
        if self.stepped and step is not None:
            embedded = embedded + self.step_in(time_features(step) - time_features(jnp.zeros_like(step)))
        return embedded + self.time_in(u) if self.timed else embedded

    def predict(self, hidden: jax.Array, cell: jax.Array) -> jax.Array:
        """Final hidden states [b, t, d] to the prediction (x, eps or v), float32 [b, t, p]."""
        normed = self.norm(hidden).astype(jnp.float32)
        out = self.patch_out(normed)
        if self.overlap:
            out = overlap_add(self._square(out), cell, self.overlap).reshape(*out.shape[:-1], -1)
        return out + self.conv_out(normed, cell) if self.conv else out

    def invert(self, embedded: jax.Array, cell: jax.Array) -> jax.Array:
        """Recover clean patches from `embed(z, 0, cell)`, without overlap: the numerical proof that the input is lossless."""
        zero = self.embed(jnp.zeros((*cell.shape[:-1], self.values)), jnp.zeros(cell.shape[:-1]), cell)
        kernel = self.patch_in.kernel[...]
        if self.narrow:
            kernel = self.patch_narrow.kernel[...] @ kernel
        return (embedded - zero) @ jnp.linalg.pinv(kernel)

    def _exact(self, linear: Linear, z: jax.Array) -> jax.Array:
        kernel = gather(linear.kernel, jnp.float32, self.place)
        return jnp.matmul(z, kernel, precision=jax.lax.Precision.HIGHEST)

    def _square(self, values: jax.Array) -> jax.Array:
        """[b, t, 3 s^2] to [b, t, s, s, 3]."""
        side = round((values.shape[-1] / 3) ** 0.5)
        return values.reshape(*values.shape[:-1], side, side, 3)
