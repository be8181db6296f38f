"""What adapters are made of: attention of one set of vectors on another, and the two-layer network behind it.

Letters: n images, q queries, s keys, w width of the queries, f of the keys.
"""

import jax
from flax import nnx

from mmdiff.nn.layers import Linear, parts
from mmdiff.parallel.sharding import Placement


def linear(inputs: int, outputs: int | tuple[int, ...], rngs: nnx.Rngs, place: Placement, *, bias: bool = True) -> Linear:
    """Whole on every device: adapters are split by rows only."""
    axes = (None,) * (2 if isinstance(outputs, int) else 1 + len(outputs))
    return Linear(inputs, outputs, rngs, axes=axes, bias=bias, place=place)


class Norm(nnx.Module):
    """Layer norm in float32, in the type of its input."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, width: int, context: int, heads: int, rngs: nnx.Rngs, place: Placement, *, bias: bool = True):
        self.heads = heads
        self.q = linear(width, width, rngs, place, bias=bias)
        self.kv = linear(context, (2, width), rngs, place, bias=bias)
        self.out = linear(width, width, rngs, place, bias=bias)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [n, q, w] reads context [n, s, f] where mask, bool [n or 1, 1, q, s], allows: [n, q, w]."""
        split = lambda a: a.reshape(*a.shape[:2], self.heads, -1)
        k, v = (split(part) for part in parts(self.kv(context)))
        read = jax.nn.dot_product_attention(split(self.q(x)), k, v, mask=mask)
        return self.out(read.reshape(x.shape))


class MLP(nnx.Module):
    """gelu(x W_1) W_2, inner width 4 w."""

    def __init__(self, width: int, rngs: nnx.Rngs, place: Placement, *, bias: bool = True):
        self.up = linear(width, 4 * width, rngs, place, bias=bias)
        self.down = linear(4 * width, width, rngs, place, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))
