"""The modules of SEED: the Q-Former with its text side (stage 1), and what stands around the codes (stage 2).

Stage 1, on images and their texts; i, j number the pairs of a batch, pairs with the same text count as one:

    contrast   softmax of s a_i . b_j over j, and over i        a: the last query, b: the text's first position; unit length
    match      does text j belong to image i?                    queries that read the text, mean of their answers
    caption    the next word, given the queries

Stage 2, with f, g of the frozen tower, q = Q-Former(f) frozen, h = codes, widened, with a place for each:

    (1) loss = 5 quantizer + 2 mean (1 - cos(q, blocks(h))) + 0.5 mean (g - reverse(h))^2

`reverse` is the Reverse Q-Former: blocks over h, then one query that reads them. g is scaled to numbers of size 1.

Sources: Ge et al., SEED, arXiv 2307.08041, and their code; the losses of stage 1: Li et al., BLIP-2, arXiv 2301.12597.
Simplified: no label smoothing in the contrast; the blocks are pre-norm.
Letters: n images, k queries, d width, t words, v vocabulary, c numbers of a code, e width of g.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.nn.qformer import MLP, Attention, QFormer, reading
from mmdiff.pretrained.clip import unit

QUANTIZER, REBUILT, EMBEDDED = 5.0, 2.0, 0.5  # weights of (1)
WARMEST = 100.0  # the largest s
APART = -1e9  # log-probability of a pair that is not to be drawn


class Words(nnx.Module):
    """The text side of the Q-Former, and the three heads."""

    def __init__(self, size: int, longest: int, width: int, depth: int, out: int, rngs: nnx.Rngs):
        table = lambda rows: nnx.Param(jax.random.normal(rngs.params(), (rows, width)) * 0.02)
        self.embedding, self.place = table(size), table(longest)
        self.mlps = nnx.List([MLP(width, rngs) for _ in range(depth)])
        self.image_out, self.text_out = (nnx.Linear(width, out, use_bias=False, rngs=rngs) for _ in range(2))
        self.matches = nnx.Linear(width, 2, rngs=rngs)
        self.log_scale = nnx.Param(jnp.log(1 / 0.07))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int [n, t] to [n, t, d]."""
        return self.embedding[...][tokens] + self.place[: tokens.shape[1]]


@jax.custom_vjp
def scale_of(log_scale: jax.Array) -> jax.Array:
    """s = exp(log_scale), WARMEST at most. Up there only a gradient that makes it smaller passes, so that it neither goes on
    growing nor stays for ever; CLIP clamps the parameter after every step."""
    return jnp.minimum(jnp.exp(log_scale), WARMEST)


def _scale_forward(log_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = scale_of(log_scale)
    return scale, scale


def _scale_backward(scale: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    slope = gradient * scale
    return (jnp.where(scale < WARMEST, slope, jnp.maximum(slope, 0.0)),)  # descent goes against it


scale_of.defvjp(_scale_forward, _scale_backward)


def contrast(former: QFormer, words: Words, features: jax.Array, tokens: jax.Array, real: jax.Array):
    """s a_i . b_j, float32 [n, n], of images and texts that do not read each other."""
    mask = reading(len(former.queries), real, "apart", causal=True)
    queries, text = former(features, mask, words(tokens), words.mlps)
    a, b = unit(words.image_out(queries[:, -1])), unit(words.text_out(text[:, 0]))
    return scale_of(words.log_scale[...]) * a @ b.T


def pair_losses(
    former: QFormer,
    words: Words,
    features: jax.Array,
    tokens: jax.Array,
    real: jax.Array,
    weight: jax.Array,
    key: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The three losses, means over the pairs that count, and the share of images that find their text in the batch.

    Args:
      features [n, f, c]; tokens int [n, t], from the beginning to the end; real bool [n, t]; weight [n], 0 at padding.
      key: of the pairs that do not match, drawn from those that are hard to tell apart.
    """
    mean = lambda each: (each * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
    logits = contrast(former, words, features, tokens, real)
    there = (weight > 0)[None] & (weight > 0)[:, None] | jnp.eye(len(weight), dtype=bool)
    logits = jnp.where(there, logits, APART)
    same = ((tokens[:, None] == tokens).all(-1) & there).astype(jnp.float32)
    target = same / same.sum(-1, keepdims=True)
    nats = lambda logits: -(jnp.where(target > 0, jax.nn.log_softmax(logits), 0.0) * target).sum(-1)
    contrasted = mean((nats(logits) + nats(logits.T)) / 2)
    found = jnp.take_along_axis(same, logits.argmax(-1)[:, None], axis=1)[:, 0]

    one, two = jax.random.split(key)
    hard = jax.lax.stop_gradient(jnp.where(same > 0, APART, logits))
    text_of, image_of = jax.random.categorical(one, hard), jax.random.categorical(two, hard.T)
    other = same.sum(-1) < there.sum(-1)  # else there is no pair that does not match
    join = lambda a, b, c: jnp.concatenate([a, b, c])
    answers = matching(
        former,
        words,
        join(features, features, features[image_of]),
        join(tokens, tokens[text_of], tokens),
        join(real, real[text_of], real),
    )
    right, wrong, wrong_too = jnp.split(answers, 3)
    matched = mean(-right[:, 1] - jnp.where(other, wrong[:, 0] + wrong_too[:, 0], 0.0)) / 3

    mask = reading(len(former.queries), real, "caption", causal=True)
    _, text = former(features, mask, words(tokens), words.mlps)
    said = jax.nn.log_softmax(text[:, :-1].astype(jnp.float32) @ words.embedding[...].T)
    of_word = jnp.take_along_axis(said, tokens[:, 1:, None], axis=-1)[..., 0]
    told = real[:, 1:] * weight[:, None]
    captioned = -(of_word * told).sum() / jnp.maximum(told.sum(), 1e-9)
    return {"contrast_loss": contrasted, "match_loss": matched, "caption_loss": captioned}, mean(found)


def matching(former: QFormer, words: Words, features: jax.Array, tokens: jax.Array, real: jax.Array) -> jax.Array:
    """Log-probabilities [n, 2] that a text does not belong to an image, and that it does."""
    mask = reading(len(former.queries), real, "together", causal=True)
    queries, _ = former(features, mask, words(tokens), words.mlps)
    return jax.nn.log_softmax(words.matches(queries).mean(1).astype(jnp.float32))


class Blocks(nnx.Module):
    """Blocks in which everything reads everything: [n, k, d] to the same."""

    def __init__(self, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(depth)])
        self.owns = nnx.List([Attention(width, width, heads, rngs) for _ in range(depth)])
        self.mlps = nnx.List([MLP(width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for norm, own, mlp in zip(self.norms, self.owns, self.mlps, strict=True):
            y = norm(x)
            x = x + own(y, y)
            x = x + mlp(x)
        return self.norm(x)


class Between(nnx.Module):
    """What stage 2 trains but the codebook: to codes, and from codes back to queries and on to the image's embedding."""

    def __init__(self, width: int, code_width: int, count: int, depth: int, heads: int, out: int, rngs: nnx.Rngs):
        linear = lambda a, b: nnx.Linear(a, b, rngs=rngs)
        self.to_first, self.to_second = linear(width, width), linear(width, code_width)
        self.from_first, self.from_second = linear(code_width, code_width), linear(code_width, width)
        self.place = nnx.Param(jax.random.normal(rngs.params(), (count, width)) * 0.02)
        self.rebuilding, self.reversing = (Blocks(width, depth, heads, rngs) for _ in range(2))
        self.reverse = QFormer(width, width, 1, heads, 1, rngs)
        self.rebuilt, self.embedded = linear(width, width), linear(width, out)

    def narrow(self, queries: jax.Array) -> jax.Array:
        """[n, k, d] to what is quantised, [n, k, c]."""
        return self.to_second(jnp.tanh(self.to_first(queries)))

    def wide(self, codes: jax.Array) -> jax.Array:
        """[n, k, c] to h [n, k, d]."""
        return self.from_second(jnp.tanh(self.from_first(codes))) + self.place[...]

    def queries(self, h: jax.Array) -> jax.Array:
        """The Q-Former's output, reconstructed."""
        return self.rebuilt(self.rebuilding(h))

    def embedding(self, h: jax.Array) -> jax.Array:
        """The embedding of the image, predicted: [n, e], numbers of size 1."""
        queries, _ = self.reverse(self.reversing(h), jnp.ones((len(h), 1, 1), bool))
        return self.embedded(queries[:, 0])
