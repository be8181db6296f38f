"""The words of a V2L tokenizer: the vocabulary of a language model, grown to pairs and triples and cut down to what is seen.

    (1) pair of a subword w = w and the likeliest next token after "a photo of w"; triple = pair and the next one likewise
    (2) embedding of a string = mean over templates of the unit vector of the template filled with it, not made unit again
    (3) of each training image the 5 candidates of (1) with the largest product with its vector; those named above `least`
        times in all are the global words

(1) asks the same language model whose vocabulary the local words are. Source: Zhu et al., arXiv 2403.07874, with the code
published with it (there 32,000 subwords of LLaMA-2, CLIP ViT-L/14, 80 templates, least = 100 of 1.28 million images, 11,908
words). Strings that say the same are one candidate here. The images are the caller's.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff.config import require
from mmdiff.document import DataError
from mmdiff.in_context.language import Language
from mmdiff.pretrained.clip import CLIP
from mmdiff.pretrained.encoder import normalised
from mmdiff.tokenizers.v2l.words import Words

PHOTO = "a photo of {}"
TOP = 5
AT_ONCE = 64

Ids = Callable[[Sequence[str]], np.ndarray]
"""Texts to ids int32 [n, t] as the text tower takes them, each with its end."""


def bytes_of(longest: int, end: int) -> Ids:
    """For towers whose words are bytes, as the stand-in's."""

    def ids(texts: Sequence[str]) -> np.ndarray:
        found = np.full((len(texts), longest), end, np.int32)
        for row, text in zip(found, texts, strict=True):
            given = text.encode()[: longest - 1]
            row[: len(given)] = list(given)
        return found

    return ids


def pieces_of(folder: str | Path, longest: int, end: int) -> Ids:
    """For towers whose words are those of the tokenizer.json in their folder, as CLIP's.

    Args:
      end: eos_token_id of their config.json; 2 stands in old ones of CLIP, and means nothing there.
    Raises:
      DataError: there is none, it ends texts otherwise, or the package tokenizers, which reads it, is not installed.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: not there; it says how the towers' texts are cut into pieces. Copy it beside config.json.")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(f"{path} is read by the package tokenizers: pip install tokenizers.") from error
    pieces = Tokenizer.from_file(str(path))
    pieces.no_padding()
    pieces.enable_truncation(longest)
    last = (pieces.encode("").ids or [-1])[-1]
    if last < 0 or end not in (2, last):
        raise DataError(f"{path} ends texts with {last}, and config.json says eos_token_id={end}: take both of one model.")

    def ids(texts: Sequence[str]) -> np.ndarray:
        found = np.full((len(texts), longest), last, np.int32)
        for row, given in zip(found, pieces.encode_batch(list(texts)), strict=True):
            row[: len(given.ids)] = given.ids
        return found

    return ids


def subwords(language: Language) -> list[str]:
    """What each piece of the vocabulary says; special ones and single bytes that are no text go by their names."""
    pieces = range(language.processor.get_piece_size())
    texts = [language.decode([piece]) for piece in pieces]
    return [
        text if text.strip() and "\ufffd" not in text else language.processor.id_to_piece(piece)
        for piece, text in zip(pieces, texts, strict=True)
    ]


def expanded(language: Language) -> list[tuple[str, str, str]]:
    """(1): of each piece itself, its pair and its triple."""
    single = subwords(language)
    after = language.greedy([language.encode(PHOTO.format(word), bos=True) for word in single], 1)
    pairs = [_joined(language, word, token) for word, token in zip(single, after[:, 0], strict=True)]
    after = language.greedy([language.encode(PHOTO.format(word), bos=True) for word in pairs], 1)
    triples = [_joined(language, word, token) for word, token in zip(pairs, after[:, 0], strict=True)]
    return list(zip(single, pairs, triples, strict=True))


def _joined(language: Language, text: str, token: int) -> str:
    """With the space that stands before the token, if there is one."""
    return language.decode([*language.encode(text), int(token)])


def text_embeddings(model: CLIP, ids: Ids, strings: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """(2): float32 [n, e]."""
    require(bool(templates), "templates: give at least one, as in 'a photo of a {}.'.")
    graph, params = nnx.split(model)
    embed = jax.jit(lambda params, ids: nnx.merge(graph, params).embed_texts(ids))
    total = np.zeros((), np.float32)
    for template in templates:
        require("{}" in template, f"template {template!r} has no {{}}, where the word is to stand.")
        total = total + _in_parts(lambda part: embed(params, part), ids([template.format(text) for text in strings]))
    return (total / len(templates)).astype(np.float32)


def image_embeddings(model: CLIP, images: np.ndarray) -> np.ndarray:
    """Unit vectors float32 [n, e] of uint8 [n, h, w, 3]."""
    graph, params = nnx.split(model)
    embed = jax.jit(lambda params, x: (m := nnx.merge(graph, params)).embed_images(normalised(x, m.vision.side)))
    return _in_parts(lambda part: embed(params, part), images)


def _in_parts(run: Callable[[np.ndarray], jax.Array], values: np.ndarray) -> np.ndarray:
    filled = np.concatenate([values, np.repeat(values[:1], -len(values) % AT_ONCE, axis=0)])
    parts = [np.asarray(run(filled[i : i + AT_ONCE])) for i in range(0, len(filled), AT_ONCE)]
    return np.concatenate(parts)[: len(values)]


def named(images: np.ndarray, candidates: np.ndarray, top: int = TOP) -> np.ndarray:
    """(3): how often each candidate [n, e] is among the `top` of an image, for image vectors [m, e]: int [n]."""
    count = np.zeros(len(candidates), np.int64)
    for start in range(0, len(images), AT_ONCE):
        products = jnp.asarray(images[start : start + AT_ONCE]) @ candidates.T
        np.add.at(count, np.asarray(jax.lax.top_k(products, min(top, len(candidates)))[1]).ravel(), 1)
    return count


def build_words(
    language: Language, model: CLIP, sizes: dict, ids: Ids, images: np.ndarray, templates: Sequence[str], least: int
) -> Words:
    """Local and global words.

    Args:
      model, sizes, ids: the network of images and texts, its config.json, and how it takes texts.
      images: uint8 [n, h, w, 3] of the training set.
      least: a candidate named at most so many times is no global word.
    Raises:
      ConfigError: no candidate is left.
    """
    grown = expanded(language)
    local = [word for word, _, _ in grown]
    candidates = list(dict.fromkeys(text for texts in grown for text in texts))
    vectors = text_embeddings(model, ids, candidates, templates)
    kept = np.flatnonzero(named(image_embeddings(model, images), vectors) > least)
    require(
        len(kept) > 0, f"least={least}: none of {len(candidates)} candidates is named so often; lower it, or give more images."
    )
    place = {text: number for number, text in enumerate(candidates)}
    own = vectors[[place[word] for word in local]]
    return Words.of(local, own, [candidates[i] for i in kept], vectors[kept], model, sizes)
