"""The network: a pre-norm residual stack over one sequence of text tokens and raw patches.

    x = token embedding (text) | patch projection + time embedding (patches)
    x <- block(x), depth times
    text logits = RMSNorm(x) W_vocabulary          patch prediction: mmdiff/models/patches.py

Layers are stacked: every parameter of `blocks` has a leading layer axis, and a training pass scans over it. Short stacks
are unrolled on CPU, where a scan costs a quarter of the step; sampling always works on single layers (`separate`).

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
from mmdiff.nn.attention import Growing, KeyValue
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

    def embed(self, tokens, is_patch, z, u, place) -> jax.Array:
        """tokens, is_patch, u [b, t], z [b, t, p], place [b, t, 2] to the stack's input [b, t, d], in the compute type."""
        text = self.text_embedding[...][tokens] * (self.cfg.width**0.5 if self.cfg.tie_embeddings else 1.0)
        return jnp.where(is_patch[..., None], self.image.embed(z, u, place), text).astype(Network(self.cfg, 0).compute_type)

    def stack(
        self,
        x: jax.Array,
        position: jax.Array,
        mask: IntervalMask,
        context: tuple[KeyValue | Growing, ...] | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, tuple[KeyValue, ...] | None]:
        """Run the layers.

        Args:
          x: [b, t, d]; position: [b, t, 2]; mask: [b, t] over s cached keys followed by t own keys.
          context: per layer, the keys and values [b, h, s, .] that stand before x.
          keep: also return the keys and values of x, per layer [b, h, t, .] (see attention.join).
        """
        width = self.cfg.key_width if self.cfg.block == "gau" else self.cfg.head_width
        angles = rotation(position, width, self.cfg.rope_base)

        def layer(x, block, before=None):
            return block(x, angles, mask, before)

        if self.cfg.remat == "full":
            layer = jax.checkpoint(layer)
        stacked = not isinstance(jax.tree.leaves(self.blocks, is_leaf=_is_layers)[0], tuple)
        if stacked and context is None and not keep and not Network(self.cfg, 0).unrolled:
            return jax.lax.scan(lambda x, block: (layer(x, block)[0], None), x, self.blocks)
        kept = []
        for index, block in enumerate(unstack(self.blocks, self.cfg.depth)):
            x, own = layer(x, block, context[index] if context is not None else None)
            kept.append(own)
        return x, tuple(kept) if keep else None

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., d] to float32 [..., v]."""
        hidden = self.norm(hidden).astype(jnp.float32)
        return hidden @ self.text_embedding[...].T if self.cfg.tie_embeddings else self.text_out(hidden)

    def __call__(self, tokens, is_patch, z, u, place, position, mask: IntervalMask) -> tuple[jax.Array, jax.Array]:
        """A whole row without cache: text logits float32 [b, t, v] and patch predictions float32 [b, t, p]."""
        hidden, _ = self.stack(self.embed(tokens, is_patch, z, u, place), position, mask)
        return self.text_logits(hidden), self.image.predict(hidden)


def _is_layers(leaf: Any) -> bool:
    return type(leaf) is tuple


def unstack(blocks: Any, depth: int) -> list[Any]:
    """Stacked layers (leaves [depth, ...], or tuples of `depth` arrays) as a list of single ones."""
    leaves, structure = jax.tree.flatten(blocks, is_leaf=_is_layers)
    # split, not indexing: its gradient is one concatenation instead of `depth` padded sums
    parts = [leaf if _is_layers(leaf) else [part[0] for part in jax.lax.split(leaf, (1,) * depth)] for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[index] for part in parts]) for index in range(depth)]


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

    @property
    def unrolled(self) -> bool:
        """Whether training works layer by layer instead of scanning over the stack."""
        return jax.default_backend() == "cpu" and self.cfg.depth <= UNROLL_LIMIT

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(Transfusion(self.cfg, self.vocabulary_size, nnx.Rngs(params=key))))

    def separate(self, params: dict[str, Any]) -> dict[str, Any]:
        """The same parameters with a tuple of per-layer arrays for each stacked one; `restack` undoes it.

        Sampling takes them so: a program that reads few positions would spend half its time cutting up stacked arrays.
        """
        split = lambda leaf: leaf if _is_layers(leaf) else tuple(leaf[i] for i in range(self.cfg.depth))
        layers = jax.tree.map(split, params["blocks"], is_leaf=_is_layers)
        return params | {"blocks": layers}

    def restack(self, params: dict[str, Any]) -> dict[str, Any]:
        """Tuples of per-layer arrays as stacked ones; also for anything of the parameters' structure, as gradients."""
        stack = lambda leaf: jnp.stack(leaf) if _is_layers(leaf) else leaf
        return params | {"blocks": jax.tree.map(stack, params["blocks"], is_leaf=_is_layers)}

    def bind(self, params: dict[str, Any]) -> Transfusion:
        """The module with these parameters."""
        abstract = nnx.eval_shape(lambda: Transfusion(self.cfg, self.vocabulary_size, nnx.Rngs(params=0)))
        return nnx.merge(nnx.graphdef(abstract), params)
