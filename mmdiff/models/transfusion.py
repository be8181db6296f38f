"""The network: a pre-norm residual stack over one sequence of text tokens and raw patches.

    x = token embedding (text) | patch projection + time embedding (patches)
    x <- block(x), depth times             long skips, if any, join the inputs of the first half to the second
    text logits = RMSNorm(x) W_vocabulary          patch prediction: mmdiff/models/patches.py

Layers are stacked: every parameter of `blocks` has a leading layer axis, and a training pass scans over it. Short stacks
are unrolled on CPU, where a scan costs a quarter of the step; sampling always works on single layers (`separate`).

Letters: b rows, t positions, s cached positions, l layers, d width, v vocabulary, p patch values.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mmdiff import config
from mmdiff.adapters.base import adapter
from mmdiff.adapters.front_end import FrontEnd
from mmdiff.adapters.gated import GatedCrossAttention
from mmdiff.layout import TIME, IntervalMask
from mmdiff.models.patches import MIXTURE_VALUES, TIME_FREQUENCIES, Codes, RawPatches, time_features
from mmdiff.nn import strided
from mmdiff.nn.around import TIME_WIDTH, Around
from mmdiff.nn.attention import Growing, KeyValue
from mmdiff.nn.attention_tiled import SAVED
from mmdiff.nn.gau import GatedAttentionUnit
from mmdiff.nn.layers import GATHERED, Linear, RMSNorm, gather, parameter
from mmdiff.nn.rope import rotation
from mmdiff.nn.strided import View
from mmdiff.nn.transformer_block import TransformerBlock
from mmdiff.parallel.sharding import NOWHERE, Placement

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


class Embedded(NamedTuple):
    """What enters the stack."""

    x: jax.Array  # [b, t, d]
    time: jax.Array | None = None  # [b, t, TIME_WIDTH], with model.time="adaln"
    cell: jax.Array | None = None  # int32 [b, t, 4], with model.sparse
    shown: tuple[jax.Array, jax.Array] | None = None  # vectors [b, t, d] and where they are, bool [b, t]; front_end.gated


class Skip(nnx.Module):
    """Joins x [b, t, d] in the second half of the layers with an input of the first half.

    concat   x <- [x, early] W          Source: U-ViT, arXiv 2209.12152. Starts as x.
    lerp     x <- early + a (x - early), a learned scalar      Source: HDiT, arXiv 2401.11605. Starts half way.
    """

    def __init__(self, cfg: config.Model, rngs: nnx.Rngs, place: Placement = NOWHERE):
        self.kind = cfg.skip
        if cfg.skip == "concat":
            self.linear = Linear(2 * cfg.width, cfg.width, rngs, axes=(None, "width"), place=place)
            own = jnp.eye(2 * cfg.width, cfg.width, dtype=jnp.float32)
            self.linear.kernel[...] = own + 0.02 * self.linear.kernel[...]
        else:
            self.mix = parameter(jnp.full((), 0.5, jnp.float32), ())

    def __call__(self, x: jax.Array, early: jax.Array) -> jax.Array:
        if self.kind == "concat":
            return self.linear(jnp.concatenate([x, early], axis=-1))
        return early + self.mix[...].astype(x.dtype) * (x - early)


class Transfusion(nnx.Module):
    def __init__(
        self,
        cfg: config.Model,
        vocabulary_size: int,
        rngs: nnx.Rngs,
        place: Placement = NOWHERE,
        images: str = "denoised",
        front: tuple[config.FrontEnd, tuple[int, int]] | None = None,
    ):
        """`front`: a front end, and the size of every image."""
        self.cfg, self.vocabulary_size, self.place = cfg, vocabulary_size, place
        words = -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        block = GatedAttentionUnit if cfg.block == "gau" else TransformerBlock
        layer_keys = jax.random.split(rngs.params(), cfg.depth)
        table = jax.random.normal(rngs.params(), (words, cfg.width)) * 0.02
        if vocabulary_size:
            self.text_embedding = parameter(table, ("vocabulary", "width"))
        self.image: Any
        self.codes = images in config.CODED
        self.fronted = front is not None
        if front is not None:
            self.tower = adapter(front[0]).tower(front[0], rngs)
            self.image = FrontEnd(cfg, *front, rngs, place, draws=images == "next_embedding")
        elif self.codes:
            self.image = Codes(cfg, rngs, place, regressed=images == "next_vector")
        else:
            outputs = {"read": 0, "next_pixel": MIXTURE_VALUES}.get(images)
            self.image = RawPatches(cfg, rngs, place, outputs)
        self.blocks = jax.vmap(lambda key: block(cfg, nnx.Rngs(params=key), place))(layer_keys)
        self.gates = gates(cfg, front[0]) if front is not None else 0
        if self.gates:
            gate_keys = jax.random.split(rngs.params(), self.gates)
            gated = lambda key: GatedCrossAttention(cfg, head(cfg), nnx.Rngs(params=key), place)
            self.gated = jax.vmap(gated)(gate_keys)
        if cfg.skip != "none":
            skip_keys = jax.random.split(rngs.params(), cfg.depth // 2)
            self.skips = jax.vmap(lambda key: Skip(cfg, nnx.Rngs(params=key), place))(skip_keys)
        if cfg.time == "adaln":
            self.time_in = Linear(1 + 2 * TIME_FREQUENCIES, TIME_WIDTH, rngs, axes=(None, None), place=place)
        if vocabulary_size:
            self.norm = RMSNorm(cfg.width)
        if vocabulary_size and not cfg.tie_embeddings:
            self.text_out = Linear(cfg.width, words, rngs, axes=("width", "vocabulary"), gain=0.0, place=place)

    def embed(self, tokens, is_patch, z, u, cell, step=None) -> Embedded:
        """tokens, is_patch, u, step [b, t], z [b, t, p], cell [b, t, 4] to the stack's input, in the compute type."""
        dtype, shown = compute_type(self.cfg, self.place), None
        if self.fronted:
            vectors = self.image.embed(z, cell, as_type(self.tower, dtype)).astype(dtype)
            x, shown = self.image.standing(vectors), (vectors, is_patch) if self.gates else None
        else:
            x = self.image.embed(z, u, cell, step).astype(dtype)
        if self.vocabulary_size:
            scale = self.cfg.width**0.5 if self.cfg.tie_embeddings else 1.0
            text = gather(self.text_embedding, dtype, self.place)[tokens] * scale
            # a code is a token, and is told its place besides
            x = text + jnp.where(is_patch[..., None], x, 0) if self.codes else jnp.where(is_patch[..., None], x, text)
        if self.cfg.time == "token":
            x = jnp.where((tokens == TIME)[..., None], self.image.time_in(u).astype(dtype), x)
        time = None
        if self.cfg.time == "adaln":
            time = jax.nn.silu(self.time_in(time_features(u))).astype(dtype)
        cell = jnp.asarray(cell) if self.cfg.sparse != "none" else None
        return Embedded(self.place(x, "rows", None, None), time, cell, shown)

    def stack(
        self,
        embedded: Embedded,
        position: jax.Array,
        mask: IntervalMask,
        context: tuple[KeyValue | Growing, ...] | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, tuple[KeyValue, ...] | None]:
        """Run the layers.

        Args:
          embedded: of t positions; position: [b, t, 2]; mask: [b, t] over s cached keys followed by t own keys.
          context: per layer, the keys and values [b, h, s, .] that stand before x.
          keep: also return the keys and values of x, per layer [b, h, t, .] (see attention.join).
        """
        cfg, x = self.cfg, embedded.x
        views = [View(mask)]
        if embedded.cell is not None:
            one_by_one = context is not None and isinstance(context[0], Growing)
            views = [*strided.views(mask, embedded.cell, whole=not one_by_one)]
        arounds = [self._around(embedded, position, view) for view in views]

        def layer(x, block, before=None, around=arounds[0]):
            order, back = around.view.order, around.view.back
            x, kept = block(x if order is None else strided.taken(x, order), around, before)
            return self.place(x if back is None else strided.taken(x, back), "rows", None, None), kept

        stacked = not isinstance(jax.tree.leaves(self.blocks, is_leaf=is_layers)[0], tuple)
        alike = cfg.sparse == "none" and not self.gates  # all layers: else they are unrolled
        scanned = stacked and context is None and not keep and alike and not unrolled(self.cfg, self.place)
        gate = lambda x, block, shown, before: block(x, *shown, mask, before)
        if self.cfg.remat != "none" or self.place.split:
            layer = jax.checkpoint(layer, policy=KEPT[self.cfg.remat], prevent_cse=not scanned)
            gate = jax.checkpoint(gate, policy=KEPT[self.cfg.remat])
        if scanned:
            return self._scan(layer, x), None
        kept: list[Any] = []
        inputs: list[jax.Array] = []
        skips = unstack(self.skips, cfg.depth // 2) if cfg.skip != "none" else []
        gated, read = unstack(self.gated, self.gates) if self.gates else [], []
        for index, block in enumerate(unstack(self.blocks, cfg.depth)):
            if embedded.shown is not None and index % self.image.front.gated == 0:
                number = index // self.image.front.gated
                x, own = gate(x, gated[number], embedded.shown, context[cfg.depth + number] if context is not None else None)
                read.append(own)
            if skips and index >= cfg.depth - len(skips):
                x = skips[index - (cfg.depth - len(skips))](x, inputs[cfg.depth - 1 - index])
            inputs.append(x)
            x, own = layer(x, block, context[index] if context is not None else None, arounds[index % len(arounds)])
            kept.append(own)
        return x, (*kept, *read) if keep else None

    def _around(self, embedded: Embedded, position: jax.Array, view: View) -> Around:
        """What a layer is told of positions [b, t, 2] in the order of its view."""
        cfg, time = self.cfg, embedded.time
        if view.order is not None:
            position = strided.taken(jnp.asarray(position), view.order)
            time = strided.taken(time, view.order) if time is not None else None
        width = cfg.key_width if cfg.block == "gau" else cfg.head_width
        angles = rotation(position, width, cfg.rope_base) if cfg.rope == "axial" else None
        return Around(position, angles, view.mask, time, view)

    def columns(self, cell: jax.Array, column: jax.Array) -> list[jax.Array]:
        """Where each layer's buffers (attention.Growing) take token number `column` of what is written, in cells [b, 4]."""
        if self.cfg.sparse == "none":
            return [column] * (self.cfg.depth + self.gates)
        down = jnp.where(cell[:, 2] > 0, strided.by_column(cell), column)
        return [column if layer % 2 else down for layer in range(self.cfg.depth)]

    def _scan(self, layer, x: jax.Array) -> jax.Array:
        """All layers on [b, t, d], one compiled body."""
        step = lambda x, block: (layer(x, block)[0], x)
        plain = lambda x, block: (layer(x, block)[0], None)
        if self.cfg.skip == "none":
            return jax.lax.scan(plain, x, self.blocks)[0]
        half, depth = self.cfg.depth // 2, self.cfg.depth
        part = lambda start, stop: jax.tree.map(lambda a: a[start:stop], self.blocks)
        joined = lambda x, it: (layer(it[1](x, it[2]), it[0])[0], None)
        x, inputs = jax.lax.scan(step, x, part(0, half))
        x, _ = jax.lax.scan(plain, x, part(half, depth - half))
        return jax.lax.scan(joined, x, (part(depth - half, depth), self.skips, inputs[::-1]))[0]

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

    def hidden(self, tokens, is_patch, z, u, cell, position, mask: IntervalMask, context=None, step=None) -> jax.Array:
        """Final hidden states [b, t, d] of positions behind `context`, the keys and values of each layer (as of `stack`).

        `step`: the lengths h [b, t] of steps, for networks with model.step_input.
        """
        return self.stack(self.embed(tokens, is_patch, z, u, cell, step), position, mask, context)[0]

    def predict(self, hidden: jax.Array, cell: jax.Array) -> jax.Array:
        """Final hidden states [b, t, d] of patches in cells [b, t, 4] to what they predict (x, eps or v), float32 [b, t, p];
        for next pixels to their distribution, float32 [b, t, MIXTURE_VALUES]."""
        return self.image.predict(hidden, cell)

    def __call__(self, tokens, is_patch, z, u, cell, position, mask: IntervalMask) -> tuple[jax.Array, jax.Array]:
        """Text logits float32 [b, t, v] and patch predictions float32 [b, t, p] of whole rows."""
        hidden = self.hidden(tokens, is_patch, z, u, cell, position, mask)
        return self.text_logits(hidden), self.predict(hidden, cell)


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


def head(cfg: config.Model) -> tuple[int, int, int]:
    """Heads, key width and value width of a layer."""
    if cfg.block == "gau":
        return 1, cfg.key_width, cfg.expansion * cfg.width
    return cfg.width // cfg.head_width, cfg.head_width, cfg.head_width


def gates(cfg: config.Model, front: config.FrontEnd) -> int:
    """How many gated layers there are between those of the model."""
    return -(-cfg.depth // front.gated) if front.gated else 0


def as_type(module: nnx.Module, dtype) -> Any:
    """A module of mmdiff/pretrained, which computes in the type of its parameters."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), state))


def platform(place: Placement) -> str:
    """Of the mesh, which may be one this machine does not have; else of this machine."""
    return place.mesh.devices.flat[0].platform if place.mesh is not None else jax.default_backend()


def unrolled(cfg: config.Model, place: Placement) -> bool:
    """Whether training works layer by layer instead of scanning over the stack."""
    return platform(place) == "cpu" and cfg.depth <= UNROLL_LIMIT


def is_layers(leaf: Any) -> bool:
    return type(leaf) is tuple


def unstack(blocks: Any, depth: int) -> list[Any]:
    """Stacked layers (leaves [depth, ...], or tuples of `depth` arrays) as a list of single ones."""
    leaves, structure = jax.tree.flatten(blocks, is_leaf=is_layers)
    # split, not indexing: its gradient is one concatenation instead of `depth` padded sums
    parts = [leaf if is_layers(leaf) else [part[0] for part in jax.lax.split(leaf, (1,) * depth)] for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[index] for part in parts]) for index in range(depth)]
