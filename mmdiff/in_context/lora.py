"""LoRA: a frozen language model taught by small additions to some of its matrices, here to fill masked tokens of images.

    (1) W' = W + (alpha / r) A B           A [in, r] random, B [r, out] zero at first; r = 4, alpha = 32
    (2) loss = mean cross entropy of the masked tokens, after a prompt that shows the others and, so far, the whole

    ###
    Input: < tokens, <unk> in place of those masked >
    Output: tokens

(1) is a pure function of the frozen parameters and the additions; only A and B are trained. Sources: Hu et al., arXiv
2106.09685; masked restoration with it, of 30% of an image's tokens: Zhu et al., arXiv 2403.07874, whose published code has
(1) on queries and keys and nothing of training or masked prediction: (2) and the form of the prompt are ours.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmdiff.config import require
from mmdiff.in_context import prompts
from mmdiff.in_context.language import Language

RANK, ALPHA, MASKED = 4, 32.0, 0.3
MATRICES = ("q", "k")
Additions = dict[str, dict[str, dict[str, jax.Array]]]
"""{layer: {matrix: {"a", "b"}}}."""


def fresh(params: Any, key: jax.Array, rank: int = RANK, matrices: Sequence[str] = MATRICES) -> Additions:
    """Additions that change nothing yet, to the named matrices (q, k, v, out) of every layer."""
    made: Additions = {}
    for number, layer in params["layers"].items():
        made[str(number)] = {}
        for place, name in enumerate(matrices):
            require(name in ("q", "k", "v", "out"), f"LoRA on {name!r}: choose from q, k, v and out.")
            inside, outside = layer[name]["kernel"].shape
            drawn = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, int(number)), place), (inside, rank))
            made[str(number)][name] = {"a": drawn * inside**-0.5, "b": jnp.zeros((rank, outside))}
    return made


def added(params: Any, additions: Additions, alpha: float = ALPHA) -> Any:
    """(1): parameters of the same form; what has no addition is the very array that was given."""
    layers = dict(params["layers"])
    for number, matrices in additions.items():
        layer = dict(layers[int(number)])
        for name, parts in matrices.items():
            scale = alpha / parts["a"].shape[1]
            kernel = layer[name]["kernel"]
            layer[name] = layer[name] | {"kernel": kernel + (scale * parts["a"] @ parts["b"]).astype(kernel.dtype)}
        layers[int(number)] = layer
    return params | {"layers": layers}


def masked_rows(language: Language, tokens: np.ndarray, masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with their answers int32 [b, t], and where something is learnt, float32 [b, t]; tokens and masked [b, l]."""
    shown = np.where(masked, language.processor.unk_id(), tokens)
    before, between = language.encode(prompts.INPUT, bos=True), language.encode(prompts.OUTPUT)
    fixed = lambda ids: np.broadcast_to(np.array(ids, np.int32), (len(tokens), len(ids)))
    ids = np.concatenate([fixed(before), shown, fixed(between), tokens], axis=1).astype(np.int32)
    weights = np.zeros(ids.shape, np.float32)
    weights[:, -tokens.shape[1] :] = masked
    return ids, weights


def trained(
    language: Language,
    tokens: np.ndarray,
    *,
    steps: int,
    key: jax.Array,
    batch: int = 16,
    learning_rate: float = 3e-3,
    matrices: Sequence[str] = MATRICES,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Additions:
    """Additions that have learnt (2) on images' tokens int [n, l]."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    additions = fresh(language.params, key, matrices=matrices)
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    opt_state = tx.init(additions)
    for number in range(1, steps + 1):
        chosen = tokens[rng.integers(0, len(tokens), batch)]
        ids, weights = masked_rows(language, chosen, rng.random(chosen.shape) < MASKED)
        additions, opt_state, value = _step(language.graph, tx, language.params, additions, opt_state, ids, weights)
        progress(number, float(value))
    return additions


@functools.partial(jax.jit, static_argnames=("graph", "tx"))
def _step(graph, tx, params, additions, opt_state, ids, weights):
    def loss_of(additions):
        model = nnx.merge(graph, added(params, additions))
        logits = model.logits(model(model.embed(ids[:, :-1]))[0])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return (nats * weights[:, 1:]).sum() / jnp.maximum(weights[:, 1:].sum(), 1)

    value, grads = jax.value_and_grad(loss_of)(additions)
    updates, opt_state = tx.update(grads, opt_state, additions)
    return optax.apply_updates(additions, updates), opt_state, value


def filled(language: Language, tokens: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Tokens int32 [b, l] with those masked written by the language model, one after the other; the rest is forced."""
    length = tokens.shape[1]
    ids, _ = masked_rows(language, tokens, masked)
    allowed = np.ones((*tokens.shape, language.size), bool)
    known = np.zeros((*tokens.shape, language.size), bool)
    np.put_along_axis(known, tokens[..., None], True, axis=-1)
    allowed = np.where(masked[..., None], allowed, known)
    return language.greedy([row[:-length].tolist() for row in ids], length, list(allowed))
