"""Small layers: linear, RMSNorm, SwiGLU. Parameters are float32; the compute type is the type of the input."""

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
    """y = x W, no bias. W is [inputs, outputs], scaled so that unit variance stays unit variance (times `gain`)."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, *, gain: float = 1.0):
        kernel = jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32) * (gain * inputs**-0.5)
        self.kernel = nnx.Param(kernel)

    def __call__(self, x: jax.Array) -> jax.Array:
        # flat: with more than one leading axis XLA's CPU backend transposes a copy for the kernel's gradient
        flat = x.reshape(-1, x.shape[-1]) @ self.kernel[...].astype(x.dtype)
        return flat.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, the mean square in float32. Source: Zhang and Sennrich, arXiv 1910.07467."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + 1e-6).astype(x.dtype) * self.scale[...].astype(x.dtype)


@jax.checkpoint
def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x); the backward pass recomputes it from x, which is cheaper than to store and reload more arrays."""
    return jax.nn.silu(x)


@jax.checkpoint
def swiglu(x: jax.Array) -> jax.Array:
    """silu(first half) * second half of the last axis. Source: Shazeer, GLU variants, arXiv 2002.05202."""
    gate, up = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * up
