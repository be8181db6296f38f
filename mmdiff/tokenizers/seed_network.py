"""SEED as a tokenizer: a fixed number of codes for an image, in an order; they predict its embedding, and that its pixels.

    mmdiff train ... --tokenizer.stage 1      PairNetwork: the Q-Former, on documents of one image and one text
    mmdiff train ... --training.init STAGE1   SeedNetwork: the codes; tower and Q-Former stay as they are, to the bit

The losses of both stages are those of seed.py, plus that of the pixels, which are drawn from the predicted embedding alone
(pixel_decoder.py): nothing about pixels enters the codes. SEED draws with a frozen unCLIP; its codebook is trained by a loss,
ours is what tokenizer.quantizer says. In stage 1 a row holds a document or more with its text (layout.markers=True,
layout.images="read"), in stage 2 images alone.

Source: Ge et al., SEED, arXiv 2307.08041, and their code. Letters: n images, k codes, t words, p values of a patch, b rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.data.batches import Batches
from mmdiff.layout import Rows
from mmdiff.nn.qformer import QFormer
from mmdiff.parallel.mesh import place_rows
from mmdiff.pretrained.tower import Tower
from mmdiff.tokenizers.lavit import feature_loss
from mmdiff.tokenizers.network import UNTRAINED, Objective, Seen
from mmdiff.tokenizers.pixel_decoder import PixelDecoder, noise_for
from mmdiff.tokenizers.quantizers.base import Learning, Quantizer
from mmdiff.tokenizers.seed import EMBEDDED, QUANTIZER, REBUILT, Between, Words, pair_losses
from mmdiff.tokenizers.semantic import DRAWING, Loss, SemanticNetwork, objective_of_images, weighted

BOS, EOS = 1, 2  # as of every vocabulary


def make_former(settings: config.Tokenizer, rngs: nnx.Rngs) -> QFormer:
    tower = settings.tower
    return QFormer(tower.width, tower.width, settings.depth, tower.heads, settings.latents, rngs)


class Parts(nnx.Module):
    """Of stage 2."""

    def __init__(self, network: "SeedNetwork", rngs: nnx.Rngs):
        settings, tower = network.tokenizer, network.tokenizer.tower
        self.tower, self.former = Tower(tower, rngs), make_former(settings, rngs)
        self.between = Between(
            tower.width, network.quantizer.width, settings.latents, settings.depth, tower.heads, tower.embedding, rngs
        )
        self.pixels = PixelDecoder(
            network.cfg, network.diffusion, network.sampling, network.grid, (1, tower.embedding), rngs, network.place
        )


@dataclasses.dataclass(frozen=True)
class BoundSeed:
    module: Parts
    quantizer: Quantizer
    params: Any
    codebook: Any

    def asked(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the Q-Former says of images, [n, k, d], and their embeddings [n, e] with numbers of size 1; not learnt."""
        features, embedding = self.module.tower(images)
        count = len(self.module.former.queries)
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((count, count), bool)), (len(images), count, count))
        queries, _ = self.module.former(features, causal)
        return jax.lax.stop_gradient((queries, embedding * embedding.shape[-1] ** 0.5))

    def seen(self, images: jax.Array, key: jax.Array) -> Seen:
        """As of `network.Bound`."""
        queries, embedding = self.asked(images)
        between = self.module.between
        quantised = self.quantizer(self.params, self.codebook, between.narrow(queries))
        h = between.wide(quantised.codes)
        predicted = between.embedding(h)
        alike = lambda a, b: 1 - feature_loss(a, b)
        more = {
            "query_cosine": alike(queries, between.queries(h)),
            "embedding_cosine": alike(embedding[:, None], predicted[:, None]),
        }
        lengths = jnp.full(len(images), queries.shape[1])
        return Seen(self._pixels(predicted), quantised.ids, lengths, more)

    def drawn(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """As of `network.Bound`."""
        h = self.module.between.wide(self.quantizer.decode(self.params, self.codebook, ids))
        return self._pixels(self.module.between.embedding(h))

    def _pixels(self, embedding: jax.Array) -> jax.Array:
        return self.module.pixels.draw(embedding[:, None], jax.random.key(DRAWING))


@dataclasses.dataclass(frozen=True)
class SeedNetwork(SemanticNetwork):
    """Stage 2."""

    frozen: ClassVar[tuple[str, ...]] = ("tower", "former")

    def inherited(self, params: dict[str, Any]) -> dict[str, Any]:
        """Of stage 1 the tower and the image side of the Q-Former; of a run of stage 2 all."""
        return {name: params[name] for name in self.frozen} if "words" in params else params

    def _module(self, key=0) -> Parts:
        return Parts(self, nnx.Rngs(params=key))

    def _bound(self, module: Any, params: Any, codebook: Any) -> BoundSeed:
        return BoundSeed(module, self.quantizer, params, codebook)

    def objective(self, cfg: config.Config) -> Objective:
        """That of `losses`."""
        return objective_of_images(self, self.losses, cfg)

    def looked(self, params: Any, rows: Rows) -> Any:
        """As of SemanticNetwork."""
        return self.bind(params).asked(self.images(rows)[0])

    def losses(self, params: Any, images: jax.Array, weight: jax.Array, key: jax.Array, restart: jax.Array | bool) -> Loss:
        """Equation (1) of seed.py, and the pixels."""
        model = self.bind(params)
        between, (restarts, noise) = model.module.between, jax.random.split(key)
        queries, embedding = model.asked(images)
        z = between.narrow(queries)
        learning = Learning(restarts, jnp.broadcast_to(weight[:, None], z.shape[:2]), restart)
        quantised = model.quantizer(model.params, model.codebook, z, learning)
        h = between.wide(quantised.codes)
        predicted = between.embedding(h)
        rebuilt = weighted(feature_loss(queries, between.queries(h)), weight)
        embedded = weighted(jnp.square(embedding - predicted).mean(-1), weight)
        condition = jax.lax.stop_gradient(predicted)[:, None]
        pixels = weighted(model.module.pixels.losses(images, condition, *noise_for(images, weight, noise)), weight)
        loss = QUANTIZER * quantised.loss + REBUILT * rebuilt + EMBEDDED * embedded + pixels
        metrics = {"image_loss": pixels, "query_loss": rebuilt, "embedding_loss": embedded, "quantizer_loss": quantised.loss}
        return loss, (metrics, quantised.state)


class PairParts(nnx.Module):
    """Of stage 1."""

    def __init__(self, network: "PairNetwork", rngs: nnx.Rngs):
        settings, tower = network.tokenizer, network.tokenizer.tower
        self.tower, self.former = Tower(tower, rngs), make_former(settings, rngs)
        self.words = Words(network.words, network.longest, tower.width, settings.depth, tower.embedding, rngs)


@dataclasses.dataclass(frozen=True)
class PairNetwork(SemanticNetwork):
    """Stage 1."""

    words: int = 0
    """Size of the vocabulary."""
    first_word: int = 0
    """The smallest id of a piece of text."""
    row_length: int = 0

    @property
    def per_row(self) -> int:
        """Documents of a row that are looked at: more do not fit."""
        return max(1, self.row_length // (self.grid[0] * self.grid[1] + 6))

    @property
    def longest(self) -> int:
        """Words of a text with its beginning and end: more do not fit beside an image."""
        return max(2, self.row_length - self.grid[0] * self.grid[1] - 4)

    def init(self, key: jax.Array) -> dict[str, Any]:
        return {name: part for name, part in super().init(key).items() if name != "quantizer"} | {UNTRAINED: {}}

    def _module(self, key=0) -> PairParts:
        return PairParts(self, nnx.Rngs(params=key))

    def _bound(self, module: Any, params: Any, codebook: Any) -> PairParts:
        return module

    def pairs(self, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Images float32 [n, h, w, 3], tokens int32 [n, t], which of them are there [n, t], and which pairs are whole [n]."""
        tokens, is_patch = jnp.asarray(rows.tokens), jnp.asarray(rows.is_patch)
        here = jnp.arange(tokens.shape[1])
        document = jnp.cumsum((tokens == BOS) & ~is_patch, axis=1)
        word = ~is_patch & ((tokens >= self.first_word) | (tokens == BOS) | (tokens == EOS))

        def taken(which: jax.Array, number: int, count: int) -> tuple[jax.Array, jax.Array]:
            """The first `count` positions [b, count] of a document where `which` holds, and whether there are as many."""
            order = jnp.sort(jnp.where(which & (document == number), here, len(here)), axis=1)[:, :count]
            return jnp.minimum(order, len(here) - 1), order < len(here)

        count, found = self.grid[0] * self.grid[1], []
        for number in range(1, self.per_row + 1):
            at, whole = taken(is_patch, number, count)
            patches = jnp.take_along_axis(jnp.asarray(rows.patches), at[..., None], axis=1)
            at, real = taken(word, number, self.longest)
            text = jnp.where(real, jnp.take_along_axis(tokens, at, axis=1), 0)
            found.append((patches, text, real, whole.all(1) & (real.sum(1) > 2)))  # more than a beginning and an end
        patches, text, real, both = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        side = {"rows": self.grid[0], "cols": self.grid[1], "p": self.cfg.patch, "q": self.cfg.patch}
        images = einops.rearrange(patches.astype(jnp.float32), "n (rows cols) (p q c) -> n (rows p) (cols q) c", **side)
        return images / 127.5 - 1, text, real, both.astype(jnp.float32)

    def looked(self, params: Any, rows: Rows) -> Any:
        """As of SemanticNetwork."""
        return self.bind(params).tower(self.pairs(rows)[0])

    def of_pairs(self, params: Any, rows: Rows, key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        """The three losses, the share of images that find their text, and how many pairs there are."""
        images, text, real, weight = self.pairs(rows)
        module = self.bind(params)
        features, _ = module.tower(images)
        found, right = pair_losses(module.former, module.words, features, text, real, weight, key)
        return found, right, weight.sum()

    def objective(self, cfg: config.Config) -> Objective:
        """The sum of the three losses."""

        def loss_of(params: Any, rows: Rows, key: jax.Array, step: jax.Array):
            found, right, _ = self.of_pairs(params, rows, key)
            return sum(found.values(), jnp.zeros(())), (found | {"retrieval": right}, {})

        return loss_of

    def validate(
        self, cfg: config.Config, params: Any, batches: Batches, rows: int, between: Callable[[], None]
    ) -> dict[str, float]:
        """The losses, and `retrieval`: the share of images that find their text among those of their batch."""
        size, found = cfg.training.batch_size, []
        for index in range(max(1, min(rows, batches.rows_per_epoch()) // size)):
            between()
            batch = batches.batch(index)
            batch = batch if self.mesh is None else place_rows(batch, self.mesh)
            found.append(jax.tree.map(float, _measured(self, params, batch, jax.random.key(index))))
        count = np.asarray([pairs for *_, pairs in found])
        mean = lambda values: float((np.asarray(values) * count).sum() / max(count.sum(), 1))
        result = {f"validation_{name}": mean([losses[name] for losses, *_ in found]) for name in found[0][0]}
        return result | {"retrieval": mean([right for _, right, _ in found])}


@functools.partial(jax.jit, static_argnames="network")
def _measured(network: PairNetwork, params: Any, rows: Rows, key: jax.Array):
    return network.of_pairs(params, rows, key)
