"""The network: a pre-norm residual stack over one sequence of text tokens and raw patches.

    x = token embedding (text) | patch projection + time embedding (patches)
    x <- block(x), depth times
    text logits = RMSNorm(x) W_vocabulary          patch prediction: mmdiff/models/patches.py

Layers are stacked: every parameter of `blocks` has a leading layer axis, and a forward pass scans over it. Short stacks
are unrolled on CPU, where a scan costs a quarter of the step.

Everywhere else the model is a pair (graphdef, params) with `params` a plain nested dict; `Network` holds the first.
Letters: b rows, t positions, s cached positions, l layers, d width, v vocabulary, p patch values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.layout import IntervalMask
from mmdiff.models.patches import RawPatches
from mmdiff.nn.attention import KeyValue
from mmdiff.nn.gau import GatedAttentionUnit
from mmdiff.nn.layers import Linear, RMSNorm
from mmdiff.nn.rope import rotation
from mmdiff.nn.transformer_block import TransformerBlock

UNROLL_LIMIT = 24  # layers; above it compile time matters more than a faster step


class Transfusion(nnx.Module):
    def __init__(self, cfg: config.Model, vocabulary_size: int, rngs: nnx.Rngs):
        self.cfg = cfg
        block = GatedAttentionUnit if cfg.block == "gau" else TransformerBlock
        layer_keys = jax.random.split(rngs.params(), cfg.depth)
        self.text_embedding = nnx.Param(jax.random.normal(rngs.params(), (vocabulary_size, cfg.width)) * 0.02)
        self.image = RawPatches(cfg, rngs)
        self.blocks = jax.vmap(lambda key: block(cfg, nnx.Rngs(params=key)))(layer_keys)
        self.norm = RMSNorm(cfg.width)
        if not cfg.tie_embeddings:
            self.text_out = Linear(cfg.width, vocabulary_size, rngs, gain=0.0)

    def embed(self, tokens: jax.Array, is_patch: jax.Array, z: jax.Array, u: jax.Array) -> jax.Array:
        """tokens, is_patch, u [b, t] and z [b, t, p] to the stack's input [b, t, d], in the compute type."""
        text = self.text_embedding[...][tokens] * (self.cfg.width**0.5 if self.cfg.tie_embeddings else 1.0)
        return jnp.where(is_patch[..., None], self.image.embed(z, u), text).astype(Network(self.cfg, 0).compute_type)

    def stack(
        self, x: jax.Array, position: jax.Array, mask: IntervalMask, cache: KeyValue | None = None, keep: bool = False
    ) -> tuple[jax.Array, KeyValue | None]:
        """Run the layers.

        Args:
          x: [b, t, d]; position: [b, t, 2]; mask: [b, t] over s cached keys followed by t own keys.
          cache: keys and values [l, b, s, h, .] that stand before x.
          keep: also return the keys and values of x, [l, b, t, h, .].
        """
        width = self.cfg.key_width if self.cfg.block == "gau" else self.cfg.head_width
        angles = rotation(position, width, self.cfg.rope_base)

        def layer(x, inputs):
            block, cached = inputs
            x, own = block(x, angles, mask, cached)
            return x, own if keep else None

        if self.cfg.remat == "full":
            layer = jax.checkpoint(layer)
        if jax.default_backend() == "cpu" and self.cfg.depth <= UNROLL_LIMIT:
            return _unrolled(layer, x, (self.blocks, cache), self.cfg.depth)
        return jax.lax.scan(layer, x, (self.blocks, cache))

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., d] to float32 [..., v]."""
        hidden = self.norm(hidden).astype(jnp.float32)
        return hidden @ self.text_embedding[...].T if self.cfg.tie_embeddings else self.text_out(hidden)

    def __call__(self, tokens, is_patch, z, u, position, mask: IntervalMask) -> tuple[jax.Array, jax.Array]:
        """A whole row without cache: text logits float32 [b, t, v] and patch predictions float32 [b, t, p]."""
        hidden, _ = self.stack(self.embed(tokens, is_patch, z, u), position, mask)
        return self.text_logits(hidden), self.image.predict(hidden)


def _unrolled(layer, x, inputs: Any, depth: int):
    """`jax.lax.scan(layer, x, inputs)` written out layer by layer."""
    # split, not indexing: its gradient is one concatenation instead of `depth` padded sums
    leaves, structure = jax.tree.flatten(inputs)
    slices = [[part[0] for part in jax.lax.split(leaf, (1,) * depth)] for leaf in leaves]
    kept = []
    for index in range(depth):
        x, own = layer(x, jax.tree.unflatten(structure, [parts[index] for parts in slices]))
        kept.append(own)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *kept)


@dataclasses.dataclass(frozen=True)
class Network:
    """The architecture without its parameters; hashable, so jit can close over it."""

    cfg: config.Model
    vocabulary_size: int

    @property
    def head(self) -> tuple[int, int, int]:
        """Heads, key width and value width of a cache entry."""
        cfg = self.cfg
        if cfg.block == "gau":
            return 1, cfg.key_width, cfg.expansion * cfg.width
        return cfg.width // cfg.head_width, cfg.head_width, cfg.head_width

    @property
    def compute_type(self):
        """bfloat16 on accelerators and float32 on CPU, unless the configuration says otherwise."""
        if self.cfg.compute == "auto":
            return jnp.dtype("float32") if jax.default_backend() == "cpu" else jnp.dtype("bfloat16")
        return jnp.dtype(self.cfg.compute)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(Transfusion(self.cfg, self.vocabulary_size, nnx.Rngs(params=key))))

    def bind(self, params: dict[str, Any]) -> Transfusion:
        """The module with these parameters."""
        abstract = nnx.eval_shape(lambda: Transfusion(self.cfg, self.vocabulary_size, nnx.Rngs(params=0)))
        return nnx.merge(nnx.graphdef(abstract), params)
