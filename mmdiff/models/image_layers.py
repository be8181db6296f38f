"""What the rivals (mmdiff/models/rivals.py) are built of.

    attention   softmax(q k^T / sqrt(c)) v  over all positions of one image                       arXiv 1706.03762
    mlp         W_2 gelu(W_1 x), inner width 4 d                                                  arXiv 1706.03762
    layer norm  (x - mean) / std over d; group norm: over the pixels and a group of channels      arXiv 1607.06450, 1803.08494
    time        W_2 silu(W_1 features(u)), features as the transformer's, smooth in u

Norms and softmax in float32, all else in the type of the input. Linear layers have biases, as published; matrices start
as ours do (mmdiff/nn/layers.py), not from each paper's own distribution.
Letters: n images, h and w pixels, t positions, d width, c width of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.layout import IntervalMask
from mmdiff.models.patches import TIME_FREQUENCIES, time_features
from mmdiff.models.transfusion import KEPT
from mmdiff.nn.attention import KeyValue, attention
from mmdiff.nn.layers import Linear, gather, parameter, parts
from mmdiff.parallel.sharding import Placement

EPSILON = 1e-6
GROUPS = 32  # of channels; fewer where a group would have less than CHANNELS_PER_GROUP
CHANNELS_PER_GROUP = 4


class Time(nnx.Module):
    """The noise time u [n] as float32 [n, outputs]."""

    def __init__(self, inner: int, outputs: int, rngs: nnx.Rngs, place: Placement):
        self.first = dense(1 + 2 * TIME_FREQUENCIES, inner, rngs, place)
        self.second = dense(inner, outputs, rngs, place)

    def __call__(self, u: jax.Array) -> jax.Array:
        return self.second(jax.nn.silu(self.first(time_features(u))))


class Attention(nnx.Module):
    """Multi-head attention among all positions of each image: [n, t, d] to [n, t, d]."""

    def __init__(
        self,
        cfg: config.Model,
        width: int,
        head_width: int,
        rngs: nnx.Rngs,
        place: Placement,
        *,
        bias: bool = True,
        gain: float = 1.0,
    ):
        """bias: of q, k and v. gain: of the projection behind."""
        self.impl, self.head_width, self.place = cfg.attention, head_width, place
        self.qkv = Linear(width, (3, width), rngs, axes=(None, None, None), bias=bias, place=place)
        self.out = dense(width, width, rngs, place, gain=gain)

    def __call__(self, x: jax.Array) -> jax.Array:
        count, length = x.shape[:2]
        heads_first = lambda part: part.reshape(count, length, -1, self.head_width).swapaxes(1, 2)
        q, k, v = (heads_first(part) for part in parts(self.qkv(x)))
        zero, all_ = (jnp.full((count, length), bound, jnp.int32) for bound in (0, length))
        everything = IntervalMask(zero, all_, zero, zero)
        mixed = attention(q, [KeyValue(k, v)], everything, scale=self.head_width**-0.5, impl=self.impl, place=self.place)
        return self.out(mixed.swapaxes(1, 2).reshape(x.shape))


class MLP(nnx.Module):
    """[..., d] to [..., d]. GELU in its tanh form."""

    def __init__(self, width: int, rngs: nnx.Rngs, place: Placement, gain: float = 1.0):
        self.up = dense(width, 4 * width, rngs, place)
        self.down = dense(4 * width, width, rngs, place, gain=gain)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Conv(nnx.Module):
    """A 3x3 convolution with bias, padded by zeros: [n, h, w, inputs] to [n, h / stride, w / stride, outputs]."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, place: Placement, *, stride: int = 1, gain: float = 1.0):
        self.stride, self.place = stride, place
        shape, key = (3, 3, inputs, outputs), rngs.params()
        # zeros are not drawn: random numbers take the compiler long
        kernel = jax.random.normal(key, shape) * (gain * (9 * inputs) ** -0.5) if gain else jnp.zeros(shape)
        self.kernel = parameter(kernel.astype(jnp.float32), (None,) * 4)
        self.bias = parameter(jnp.zeros(outputs, jnp.float32), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = gather(self.kernel, x.dtype, self.place)
        strides, around = (self.stride, self.stride), ((1, 1), (1, 1))
        y = jax.lax.conv_general_dilated(x, kernel, strides, around, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + gather(self.bias, x.dtype, self.place)


class LayerNorm(nnx.Module):
    """[..., d] to [..., d], with a learned scale and bias."""

    def __init__(self, width: int):
        self.scale = parameter(jnp.ones(width, jnp.float32), (None,))
        self.bias = parameter(jnp.zeros(width, jnp.float32), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (standard(x, (-1,)) * self.scale[...] + self.bias[...]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """[n, h, w, d] to [n, h, w, d], with a learned scale and bias."""

    def __init__(self, channels: int):
        self.groups = largest_divisor(channels, min(GROUPS, max(1, channels // CHANNELS_PER_GROUP)))
        self.scale = parameter(jnp.ones(channels, jnp.float32), (None,))
        self.bias = parameter(jnp.zeros(channels, jnp.float32), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        grouped = standard(x.reshape(*x.shape[:-1], self.groups, -1), (1, 2, 4)).reshape(x.shape)
        return (grouped * self.scale[...] + self.bias[...]).astype(x.dtype)


def standard(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`x` with mean 0 and standard deviation 1 over `axes`, float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + EPSILON)


def dense(inputs: int, outputs: int, rngs: nnx.Rngs, place: Placement, gain: float = 1.0) -> Linear:
    """A linear layer with bias; rivals are split by rows only, so no axis of it has a name."""
    return Linear(inputs, outputs, rngs, axes=(None, None), gain=gain, bias=True, place=place)


def largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(limit, number), 0, -1) if number % d == 0)


def remembering(cfg: config.Model, function, *, scanned: bool = False):
    """`function`, of which the backward pass recomputes what model.remat says."""
    if cfg.remat == "none":
        return function
    policy = _products if cfg.remat == "dots" else KEPT[cfg.remat]
    return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)


def _products(primitive, *arguments, **params) -> bool:
    """Keep the results of products with parameters, convolutions among them."""
    return primitive.name == "conv_general_dilated" or KEPT["dots"](primitive, *arguments, **params)
