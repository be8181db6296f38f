"""A frozen language model and its words: the texts that it continues, many at a time.

    language = load_language(FOLDER)                    config.json, safetensors and tokenizer.model, as LLaMA-2 has them
    language.greedy([ids, ids, ...], count=2)           int32 [n, 2]: at each step the likeliest token

Prompts of a call are filled up on their left to one length; what stands there is not read, so each prompt is continued as if
it were alone (to rounding). Letters: n prompts, t positions, v vocabulary.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff.config import require
from mmdiff.document import DataError
from mmdiff.pretrained.llama import Llama, load_llama

WORDS = "tokenizer.model"
BUCKET = 32  # lengths are rounded up to multiples of it: few lengths, few programs
GROUP = 32  # prompts at a time


class Language:
    """See above. `params` may be replaced by others of the same form (lora.py)."""

    def __init__(self, model: Llama, processor: Any):
        """`processor`: of SentencePiece."""
        self.graph, state = nnx.split(model, nnx.Param)
        self.params, self.processor = nnx.to_pure_dict(state), processor
        self.size = model.embedding.shape[0]
        pieces = processor.get_piece_size()
        require(pieces <= self.size, f"{WORDS} has {pieces} pieces, and the language model knows {self.size}: take its own.")
        self.known = np.arange(self.size) < pieces  # rows behind them fill up a vocabulary, and say nothing

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of a text by itself."""
        return self.processor.encode(text, add_bos=bos)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    @property
    def end(self) -> int:
        """Id of the end of a text."""
        return self.processor.eos_id()

    def replaced(self, params: Any) -> "Language":
        """The same with other parameters."""
        other = object.__new__(Language)
        other.__dict__.update(self.__dict__, params=params)
        return other

    def greedy(self, prompts: Sequence[Sequence[int]], count: int, allowed: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """The `count` tokens that follow each prompt, each the likeliest after those before it.

        Args:
          prompts: ids; none empty.
          allowed: for each prompt, which tokens may stand at each place, bool [count, v]; None: all. Those that are no
            piece never do.
        Returns:
          int32 [n, count].
        """
        if not len(prompts):
            return np.zeros((0, count), np.int32)
        for prompt in prompts:
            require(len(prompt) > 0, "an empty prompt cannot be continued; begin it with language.encode('', bos=True).")
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")  # little to fill up
        found = np.zeros((len(prompts), count), np.int32)
        for start in range(0, len(order), GROUP):
            chosen = order[start : start + GROUP]
            rows = np.concatenate(
                [chosen, np.repeat(chosen[:1], -len(chosen) % min(GROUP, 1 << (len(chosen) - 1).bit_length()))]
            )
            longest = -(-max(len(prompts[i]) for i in rows) // BUCKET) * BUCKET
            ids = np.zeros((len(rows), longest), np.int32)
            for row, i in enumerate(rows):
                ids[row, longest - len(prompts[i]) :] = prompts[i]
            first = np.array([longest - len(prompts[i]) for i in rows], np.int32)
            may = np.ones((count, 1, 1), bool) if allowed is None else np.stack([allowed[i] for i in rows], axis=1)
            found[chosen] = np.asarray(_greedy(self.graph, self.params, ids, first, may & self.known))[: len(chosen)]
        return found


@functools.partial(jax.jit, static_argnames="graph")
def _greedy(graph, params, ids: jax.Array, first: jax.Array, allowed: jax.Array) -> jax.Array:
    """int32 [n, count] after ids [n, t], with allowed bool [count, n, v]."""
    model = nnx.merge(graph, params)
    states, cache = model(model.embed(ids), model.cache(len(ids), ids.shape[1] + len(allowed) - 1), first)
    choose = lambda states, may: jnp.where(may, model.logits(states[:, -1:])[:, 0], -jnp.inf).argmax(-1).astype(jnp.int32)

    def advance(carry, may):
        token, cache = carry
        states, cache = model(model.embed(token[:, None]), cache, first)
        following = choose(states, may)
        return (following, cache), following

    token = choose(states, allowed[0])
    _, others = jax.lax.scan(advance, (token, cache), allowed[1:])
    return jnp.concatenate([token[None], others]).T


def load_language(folder: str | Path, **options) -> Language:
    """From a folder as LLaMA-2 has it, or as experiments/stand_ins/copying_lm.py writes it.

    Args:
      options: dtype and place, of `mmdiff.pretrained.load.load_module`.
    Raises:
      DataError: as of `load_llama`, or no tokenizer.model.
    """
    model = load_llama(folder, **options)
    path = Path(folder) / WORDS
    if not path.is_file():
        raise DataError(f"{path}: not there; it is the SentencePiece model of the language model's words.")
    return Language(model, read_words(path.read_bytes(), str(path)))


def read_words(data: bytes, where: str):
    """A SentencePiece processor. Raises DataError for anything else."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{where} is no SentencePiece model, or a damaged one.") from error
