"""The raw-patch image path: what stands at an image's positions, how it is read out, and with which loss.

An image path answers four questions: what an image's positions hold (here raw patches), how they read each other (one
bidirectional block, mmdiff/layout.py), which head and loss they get (denoise), and how an image is drawn (the solver in
mmdiff/sampling/image.py). Other paths add files beside this one.

    embed:  e = z W_patch + features(u) W_time + features(place) W_place       float32; clean patches have u = 0
    head:   RMSNorm + linear, zero at the start

`place` says where in its image a patch stands. RoPE alone says only how far apart patches are, and a network then spends
many steps on finding out which of them is the top left one (JiT, arXiv 2511.13720, adds fixed positions too).

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
from mmdiff.nn.layers import Linear, RMSNorm, gather, parameter
from mmdiff.parallel.sharding import NOWHERE, Placement

TIME_FREQUENCIES = 16
LARGEST_FREQUENCY = 4.0  # radians per unit u: smooth in time, which few-step training depends on


PLACE_FREQUENCIES = 8


def place_features(place: jax.Array) -> jax.Array:
    """Smooth features of a place [..., 2] in the unit square: float32 [..., 4 * PLACE_FREQUENCIES]."""
    frequencies = np.pi * np.arange(1, PLACE_FREQUENCIES + 1, dtype=np.float32)
    angles = (place[..., None] * frequencies).reshape(*place.shape[:-1], -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def time_features(u: jax.Array) -> jax.Array:
    """Smooth features of the noise time: u [...] to float32 [..., 1 + 2 * TIME_FREQUENCIES]."""
    frequencies = LARGEST_FREQUENCY * np.arange(1, TIME_FREQUENCIES + 1, dtype=np.float32) / TIME_FREQUENCIES
    angles = u[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([u[..., None], jnp.sin(angles), jnp.cos(angles)], axis=-1)


class RawPatches(nnx.Module):
    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE):
        self.values = 3 * cfg.patch**2
        self.table = cfg.time_embedding == "table"
        self.place = place
        into = functools.partial(Linear, outputs=cfg.width, rngs=rngs, axes=(None, "width"), place=place)
        self.patch_in = into(self.values)
        if self.table:
            rows = jax.random.normal(rngs.params(), (len(DDPM_LEVELS), cfg.width)) * 0.02
            self.time_table = parameter(rows, (None, "width"))
        else:
            self.time_in = into(1 + 2 * TIME_FREQUENCIES)
        if cfg.patch_places:
            self.place_in = into(4 * PLACE_FREQUENCIES)
        self.places = cfg.patch_places
        self.norm = RMSNorm(cfg.width)
        self.patch_out = Linear(cfg.width, self.values, rngs, axes=("width", None), gain=0.0, place=place)

    def embed(self, z: jax.Array, u: jax.Array, place: jax.Array) -> jax.Array:
        """Patches z [b, t, p] (clean, or noised at time u [b, t]) at places [b, t, 2] to float32 [b, t, d]."""
        kernel = gather(self.patch_in.kernel, jnp.float32, self.place)
        exact = jnp.matmul(z.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        if self.places:
            exact = exact + self.place_in(place_features(place))
        if self.table:
            return exact + gather(self.time_table, jnp.float32, self.place)[jnp.rint(DDPM().index_of(u)).astype(jnp.int32)]
        return exact + self.time_in(time_features(u))

    def predict(self, hidden: jax.Array) -> jax.Array:
        """Final hidden states [b, t, d] to the prediction (x, eps or v), float32 [b, t, p]."""
        return self.patch_out(self.norm(hidden).astype(jnp.float32))

    def invert(self, embedded: jax.Array, place: jax.Array) -> jax.Array:
        """Recover clean patches from `embed(z, 0, place)`: the numerical proof that the input is lossless."""
        zero = self.embed(jnp.zeros((*place.shape[:-1], self.values)), jnp.zeros(place.shape[:-1]), place)
        return (embedded - zero) @ jnp.linalg.pinv(self.patch_in.kernel[...])
