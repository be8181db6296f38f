"""How a Q-Former learns by itself, from pairs of images and captions, before there is a language model: BLIP-2's first stage.

    contrast   s_ij = max_k unit(query_k(image i)) . unit([CLS](text j)) / temperature
               loss = mean of the cross entropies of softmax_j(s_ij) and softmax_i(s_ij) to the pairs that belong together,
               targets smoothed by 0.1; the temperature, 0.07 at first, is learned. Queries and texts do not see each other.
    match      two classes, the mean over queries of query W, queries and text reading each other; pairs: those that belong
               together, and for each image a text and for each text an image that do not, drawn by softmax(s)
    caption    -log p(next byte | bytes before, queries), the text reading queries and its past, the queries not reading it
    loss       = contrast + match + caption

Captions that say the same belong together (generated scenes repeat them). Images' features are those of a frozen tower. Texts
are bytes. (SEED's tokenizer trains the same network with queries in order, of which the last one is compared:
mmdiff/tokenizers/seed.py.)

Letters: n images, each with a text, s positions of the tower, f its width, k queries, t positions of a text, w width, v words.
Source: Li et al., BLIP-2, arXiv 2301.12597, section 3.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmdiff.nn.qformer import MLP, QFormer, Reading, reading
from mmdiff.pretrained.clip import unit

CLS, DEC, END, PAD, WORDS = 256, 257, 258, 259, 260
SMOOTHING, TEMPERATURE = 0.1, 0.07
NEVER = -1e9


class Parts(NamedTuple):
    """Terms of the loss, each a mean."""

    contrast: jax.Array
    match: jax.Array
    caption: jax.Array


def as_bytes(text: str, length: int) -> np.ndarray:
    """int32 [length]: [CLS], bytes, [END], padding; what does not fit is cut off."""
    found = np.full(length, PAD, np.int32)
    given = text.encode()[: length - 2]
    found[: len(given) + 2] = [CLS, *given, END]
    return found


class Pretraining(nnx.Module):
    """A Q-Former, and what it needs to learn from texts."""

    def __init__(self, inputs: int, tokens: int, width: int, depth: int, heads: int, length: int, rngs: nnx.Rngs):
        """`length`: of the texts."""
        self.former = QFormer(width, inputs, depth, heads, tokens, rngs)
        random = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape) * 0.02)
        self.words, self.place = random(WORDS, width), random(length, width)
        self.mlps = nnx.List([MLP(width, rngs) for _ in range(depth)])
        layer = lambda out: nnx.Linear(width, out, rngs=rngs)
        self.image_out, self.text_out, self.match_out, self.word_out = map(layer, (width, width, 2, WORDS))
        self.log_temperature = nnx.Param(jnp.log(jnp.asarray(TEMPERATURE)))

    def read(self, features: jax.Array, ids: jax.Array, kind: Reading) -> tuple[jax.Array, jax.Array]:
        """Final states of the queries [n, k, w] and of the texts [n, t, w]; `kind` as of `reading`."""
        mask = reading(self.former.queries.shape[0], ids != PAD, kind, causal=False)
        return self.former(features, mask, self.words[...][ids] + self.place[: ids.shape[1]], self.mlps)

    def vectors(self, features: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Unit vectors of images [n, k, w] and texts [n, w], which do not see each other."""
        queries, text = self.read(features, ids, "apart")
        return unit(self.image_out(queries)), unit(self.text_out(text[:, 0]))

    def similarity(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Vectors [n, k, w] and [m, w] to s [n, m]."""
        temperature = jnp.clip(jnp.exp(self.log_temperature[...]), 1e-3, 0.5)
        return jnp.einsum("nkw,mw->nmk", images, texts).max(-1) / temperature

    def match_logits(self, features: jax.Array, ids: jax.Array) -> jax.Array:
        """float [n, 2] of pairs: class 1 belongs together."""
        return self.match_out(self.read(features, ids, "together")[0]).mean(1)

    def caption_nats(self, features: jax.Array, ids: jax.Array) -> jax.Array:
        """-log p of each position's byte given those before it and the image, 0 at the first and at padding: [n, t]."""
        states = self.read(features, jnp.where(ids == CLS, DEC, ids), "caption")[1]
        nats = optax.softmax_cross_entropy_with_integer_labels(self.word_out(states[:, :-1]), ids[:, 1:])
        return jnp.pad(jnp.where(ids[:, 1:] != PAD, nats, 0.0), ((0, 0), (1, 0)))


def losses(model: Pretraining, features: jax.Array, ids: jax.Array, key: jax.Array) -> Parts:
    """Of features [n, s, f] and the captions int [n, t] that belong to them."""
    features, ids = jnp.asarray(features), jnp.asarray(ids)
    same = (ids[:, None] == ids).all(-1)
    s = model.similarity(*model.vectors(features, ids))
    target = same / same.sum(-1, keepdims=True)
    smooth = optax.smooth_labels(target, SMOOTHING)
    contrast = optax.softmax_cross_entropy(jnp.stack([s, s.T]), smooth).mean()
    image, text = hard_negatives(jax.lax.stop_gradient(s), same, key)
    pairs = jnp.concatenate([features, features, features[image]]), jnp.concatenate([ids, ids[text], ids])
    label = jnp.repeat(jnp.array([1, 0, 0]), len(ids))
    match = optax.softmax_cross_entropy_with_integer_labels(model.match_logits(*pairs), label).mean()
    nats = model.caption_nats(features, ids)
    return Parts(contrast, match, nats.sum() / jnp.maximum((ids[:, 1:] != PAD).sum(), 1))


def hard_negatives(s: jax.Array, same: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each text an image, and for each image a text, that does not belong to it, likelier the more similar: int [n] each.

    Where all of a batch belong together there is none, and any is taken.
    """
    of_image, of_text = jax.random.split(key)
    drawn = lambda key, logits: jax.random.categorical(key, jnp.where(same, NEVER, logits), axis=-1)
    return drawn(of_text, s.T), drawn(of_image, s)
