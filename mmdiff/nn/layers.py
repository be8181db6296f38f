"""Small layers: linear, RMSNorm, SwiGLU. Parameters are float32; the compute type is the type of the input.

Every parameter is made by `parameter`, which writes down how its axes are called; mmdiff/parallel/sharding.py says what
that means for a mesh. A layer gathers its parameters, and adds up their gradients over devices, in the compute type: half
the traffic of float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmdiff.parallel.sharding import NOWHERE, Axes, Placement

GATHERED = "gathered"  # name of gathered parameters for remat policies: never worth keeping


def parameter(value: jax.Array, axes: Axes) -> nnx.Param:
    return nnx.Param(value, axes=axes)


def gather(parameter: nnx.Param, dtype, place: Placement) -> jax.Array:
    """A parameter in the compute type, whole along its stored axis."""
    value = parameter[...].astype(dtype)
    if not place.split:
        return value
    axes = parameter.get_metadata()["axes"]
    # the first constraint is for the way back: right after the sum over devices each keeps its part of the gradient
    return checkpoint_name(place.gathered(place(value, *axes), axes), GATHERED)


class Linear(nnx.Module):
    """y = x W (+ bias). W is [inputs, *outputs], scaled so that unit variance stays unit variance (times `gain`)."""

    def __init__(
        self,
        inputs: int,
        outputs: int | tuple[int, ...],
        rngs: nnx.Rngs,
        *,
        axes: Axes,
        gain: float = 1.0,
        bias: bool = False,
        place: Placement = NOWHERE,
    ):
        outputs = (outputs,) if isinstance(outputs, int) else outputs
        kernel = jax.random.normal(rngs.params(), (inputs, *outputs), jnp.float32) * (gain * inputs**-0.5)
        self.kernel = parameter(kernel, axes)
        if bias:
            self.bias = parameter(jnp.zeros(outputs, jnp.float32), axes[1:])
        self.has_bias, self.place = bias, place

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] to [..., *outputs]."""
        kernel = gather(self.kernel, x.dtype, self.place)
        # flat: with more than one leading axis XLA's CPU backend transposes a copy for the kernel's gradient
        flat = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())))
        y = flat.reshape(*x.shape[:-1], *kernel.shape[1:])
        return y + gather(self.bias, x.dtype, self.place) if self.has_bias else y


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, the mean square in float32. Source: Zhang and Sennrich, arXiv 1910.07467."""

    def __init__(self, width: int):
        self.scale = parameter(jnp.ones(width, jnp.float32), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + 1e-6).astype(x.dtype) * self.scale[...].astype(x.dtype)


@jax.checkpoint
def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x); the backward pass recomputes it from x, which is cheaper than to store and reload more arrays."""
    return jax.nn.silu(x)


@jax.checkpoint
def swiglu(x: jax.Array) -> jax.Array:
    """silu(x[..., 0, :]) * x[..., 1, :]. Source: Shazeer, GLU variants, arXiv 2002.05202."""
    gate, up = parts(x)
    return jax.nn.silu(gate) * up


def parts(x: jax.Array) -> list[jax.Array]:
    """The n arrays [..., c] of [..., n, c]; split, not indexing: its gradient is one concatenation."""
    return [part.squeeze(-2) for part in jnp.split(x, x.shape[-2], axis=-2)]
