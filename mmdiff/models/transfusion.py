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
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from mmdiff import config
from mmdiff.layout import IntervalMask
from mmdiff.models.patches import RawPatches
from mmdiff.nn.attention import Growing, KeyValue
from mmdiff.nn.attention_tiled import SAVED
from mmdiff.nn.gau import GatedAttentionUnit
from mmdiff.nn.layers import GATHERED, Linear, RMSNorm, gather, parameter
from mmdiff.nn.rope import rotation
from mmdiff.nn.transformer_block import TransformerBlock
from mmdiff.parallel.sharding import NOWHERE, Axes, Placement

UNROLL_LIMIT = 24  # layers; above it compile time matters more than a faster step
LOGITS_LIMIT = 2**24  # logits of one row that a device holds at a time; longer rows are worked through in pieces
VOCABULARY_MULTIPLE = 8  # the head is widened to it, so that it divides over the devices
NEVER = -1e30


def _all_but_gathered(primitive, *_, **params) -> bool:
    """Keep everything but parameters made whole: kept for all layers, they would undo that they are stored in parts."""
    return primitive.name != "sharding_constraint" and params.get("name") != GATHERED


KEPT = {  # what the backward pass finds instead of recomputing it, by model.remat
    "none": _all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transfusion(nnx.Module):
    def __init__(self, cfg: config.Model, vocabulary_size: int, rngs: nnx.Rngs, place: Placement = NOWHERE):
        self.cfg, self.vocabulary_size, self.place = cfg, vocabulary_size, place
        words = -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        block = GatedAttentionUnit if cfg.block == "gau" else TransformerBlock
        layer_keys = jax.random.split(rngs.params(), cfg.depth)
        table = jax.random.normal(rngs.params(), (words, cfg.width)) * 0.02
        self.text_embedding = parameter(table, ("vocabulary", "width"))
        self.image = RawPatches(cfg, rngs, place)
        self.blocks = jax.vmap(lambda key: block(cfg, nnx.Rngs(params=key), place))(layer_keys)
        self.norm = RMSNorm(cfg.width)
        if not cfg.tie_embeddings:
            self.text_out = Linear(cfg.width, words, rngs, axes=("width", "vocabulary"), gain=0.0, place=place)

    def embed(self, tokens, is_patch, z, u, place) -> jax.Array:
        """tokens, is_patch, u [b, t], z [b, t, p], place [b, t, 2] to the stack's input [b, t, d], in the compute type."""
        dtype = compute_type(self.cfg, self.place)
        text = gather(self.text_embedding, dtype, self.place)[tokens] * (
            self.cfg.width**0.5 if self.cfg.tie_embeddings else 1.0
        )
        x = jnp.where(is_patch[..., None], self.image.embed(z, u, place).astype(dtype), text)
        return self.place(x, "rows", None, None)

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
            x, kept = block(x, angles, mask, before)
            return self.place(x, "rows", None, None), kept

        stacked = not isinstance(jax.tree.leaves(self.blocks, is_leaf=_is_layers)[0], tuple)
        scanned = stacked and context is None and not keep and not unrolled(self.cfg, self.place)
        if self.cfg.remat != "none" or self.place.split:
            layer = jax.checkpoint(layer, policy=KEPT[self.cfg.remat], prevent_cse=not scanned)
        if scanned:
            return jax.lax.scan(lambda x, block: (layer(x, block)[0], None), x, self.blocks)
        kept = []
        for index, block in enumerate(unstack(self.blocks, self.cfg.depth)):
            x, own = layer(x, block, context[index] if context is not None else None)
            kept.append(own)
        return x, tuple(kept) if keep else None

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., d] to float32 [..., v]."""
        return _logits(self.norm(hidden), self._head())[..., : self.vocabulary_size]

    def _head(self) -> jax.Array:
        """The kernel of the language head, in the compute type: [d, v rounded up]."""
        dtype = compute_type(self.cfg, self.place)
        if self.cfg.tie_embeddings:
            return gather(self.text_embedding, dtype, self.place).T
        return gather(self.text_out.kernel, dtype, self.place)

    def text_nats(self, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """-log probability of `targets` int [b, t] under the hidden states [b, t, d] at the same places, float32 [b, t].

        No device ever holds all logits: the vocabulary is split over `tensor`, and long rows are worked through in
        pieces whose logits the backward pass makes again.
        """
        place, kernel = self.place, self._head()
        by_row = place.spec(targets.shape, ("rows", None))
        columns = place.spec(kernel.shape, (None, "vocabulary"))
        nats = functools.partial(_nats, vocabulary_size=self.vocabulary_size, split=columns[1] if place.split else None)
        if place.split:  # left to XLA, the kernel's gradient would be added up over devices once per piece
            specs = (PartitionSpec(*by_row, None), columns, by_row)
            nats = jax.shard_map(nats, mesh=place.mesh, in_specs=specs, out_specs=by_row, check_vma=False)
        return nats(self.norm(hidden), kernel, targets)

    def hidden(self, tokens, is_patch, z, u, place, position, mask: IntervalMask) -> jax.Array:
        """A whole row without cache: final hidden states [b, t, d]."""
        return self.stack(self.embed(tokens, is_patch, z, u, place), position, mask)[0]

    def __call__(self, *row) -> tuple[jax.Array, jax.Array]:
        """Text logits float32 [b, t, v] and patch predictions float32 [b, t, p]; arguments as of `hidden`."""
        hidden = self.hidden(*row)
        return self.text_logits(hidden), self.image.predict(hidden)


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _nats(hidden, kernel, targets, *, vocabulary_size: int, split: str | None) -> jax.Array:
    """float32 [b, t]; `kernel` [d, v'] is this device's part of the vocabulary if it is split over the mesh axis `split`."""
    first = jax.lax.axis_index(split) * kernel.shape[1] if split else 0
    ids = first + jnp.arange(kernel.shape[1])
    everywhere = lambda reduce, x: reduce(x, split) if split else x

    @jax.checkpoint
    def piece(args):
        hidden, targets = args
        logits = jnp.where(ids < vocabulary_size, _logits(hidden, kernel), NEVER)
        best = everywhere(jax.lax.pmax, jax.lax.stop_gradient(logits.max(axis=-1)))
        total = everywhere(jax.lax.psum, jnp.exp(logits - best[..., None]).sum(axis=-1))
        # a sum, not a look-up: it stays on the device that holds the word
        own = everywhere(jax.lax.psum, jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1))
        return jnp.log(total) + best - own

    length = hidden.shape[1]
    pieces = next(n for n in range(1, length + 1) if length % n == 0 and length // n * kernel.shape[1] <= LOGITS_LIMIT)
    if pieces == 1:
        return piece((hidden, targets))
    cut = lambda a: a.reshape(len(a), pieces, -1, *a.shape[2:]).swapaxes(0, 1)
    return jax.lax.map(piece, (cut(hidden), cut(targets))).swapaxes(0, 1).reshape(targets.shape)


def compute_type(cfg: config.Model, place: Placement):
    """bfloat16 on accelerators and float32 on CPU, unless the configuration says otherwise."""
    if cfg.compute == "auto":
        return jnp.dtype("float32") if platform(place) == "cpu" else jnp.dtype("bfloat16")
    return jnp.dtype(cfg.compute)


def platform(place: Placement) -> str:
    """Of the mesh, which may be one this machine does not have; else of this machine."""
    return place.mesh.devices.flat[0].platform if place.mesh is not None else jax.default_backend()


def unrolled(cfg: config.Model, place: Placement) -> bool:
    """Whether training works layer by layer instead of scanning over the stack."""
    return platform(place) == "cpu" and cfg.depth <= UNROLL_LIMIT


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
    """The architecture without its parameters; hashable, so jit can close over it. `mesh`: see mmdiff/parallel/sharding.py."""

    cfg: config.Model
    vocabulary_size: int
    mesh: Mesh | None = None

    @property
    def place(self) -> Placement:
        return Placement(self.mesh)

    @property
    def head(self) -> tuple[int, int, int]:
        """Heads, key width and value width of a cache entry."""
        cfg = self.cfg
        if cfg.block == "gau":
            return 1, cfg.key_width, cfg.expansion * cfg.width
        return cfg.width // cfg.head_width, cfg.head_width, cfg.head_width

    @property
    def cache_axes(self) -> tuple[Axes, Axes]:
        """Names of the axes of cached keys and values [b, h, s, .]."""
        if self.cfg.block == "gau":
            return ("rows", None, None, None), ("rows", None, None, "expansion")
        return ("rows", "heads", None, None), ("rows", "heads", None, None)

    @property
    def compute_type(self):
        return compute_type(self.cfg, self.place)

    @property
    def unrolled(self) -> bool:
        return unrolled(self.cfg, self.place)

    def _module(self, key=0) -> Transfusion:
        return Transfusion(self.cfg, self.vocabulary_size, nnx.Rngs(params=key), self.place)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(self._module(key)))

    @functools.lru_cache  # noqa: B019  networks are few
    def axes(self) -> dict[str, Any]:
        """The names of every parameter's axes: a tuple where `init` has an array."""
        variables = nnx.state(nnx.eval_shape(self._module))
        named = lambda path, v: (*[None] * (v.ndim - len(v.get_metadata()["axes"])), *v.get_metadata()["axes"])
        return nnx.to_pure_dict(nnx.map_state(named, variables))

    def stored(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters, or anything of their structure, told to XLA to lie as stored parameters do; call it inside jit."""

        def constrain(leaf, axes):
            return tuple(self.place(a, *axes[1:]) for a in leaf) if _is_layers(leaf) else self.place(leaf, *axes)

        return jax.tree.map(constrain, params, self.axes(), is_leaf=_is_layers)

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
        return nnx.merge(nnx.graphdef(nnx.eval_shape(self._module)), params)
