"""Small models of every image path, with random parameters none of which is zero."""

import functools

import jax
import numpy as np

from mmdiff.config import CODED, Config, Data, Layout, Model
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import Image
from mmdiff.layout import lay_out, pack, plan_images, stack, text_pieces
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model as Trained
from mmdiff.tokenizers.model import Tokenizer
from mmdiff.tokenizers.network import TokenizerNetwork
from tests.tokenizers.tiny import QUANTIZERS, SIZE, experiment

PATCH, COUNT = 4, 8  # pixels of a code, codes of an image
PATHS = ("next_code", "masked_code", "read")


@functools.cache
def tokenizer(name: str = "fsq") -> Tokenizer:
    cfg = experiment("conv", QUANTIZERS[name])
    return Tokenizer(cfg, jax.jit(TokenizerNetwork.of(cfg).init)(jax.random.key(3)))


def configuration(images: str, block: str = "attention", sparse: str = "none", **layout) -> Config:
    codes = images in CODED
    return Config(
        model=Model(
            width=48,
            depth=2,
            patch=PATCH,
            block=block,
            head_width=16,
            key_width=16,
            lossless=not codes,
            compute="float32",
            sparse=sparse,
        ),
        layout=Layout(row_length=64, max_grid=4, images=images, **layout),
        data=Data(image_size=SIZE, tokenizer="somewhere" if codes else ""),
    )


@functools.cache
def model(images: str, **more) -> Trained:
    cfg, codes = configuration(images, **more), tokenizer()
    vocabulary = Vocabulary.bytes(max_grid=4)
    if cfg.layout.codes:
        vocabulary = vocabulary.with_codes(codes.codes)
    network = Network.of(cfg, vocabulary.size)
    key = jax.random.key(5)
    random = lambda leaf: leaf + 0.15 * jax.random.normal(key, leaf.shape)  # the heads start at zero
    params = jax.tree.map(random, jax.jit(network.init)(key))
    return Trained(cfg, params, vocabulary, tokenizer=codes if cfg.layout.codes else None)


def picture(seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def pieces_of(made: Trained, document):
    return text_pieces(document, made.vocabulary, PATCH, made.tokenizer)


def rows_of(made: Trained, *documents, trailing: bool = False, end: bool = True, length: int = 64):
    """A batch with one document in each row."""
    laid = []
    for document in documents:
        pieces = document if isinstance(document, list) else pieces_of(made, document)
        plans = plan_images(pieces, made.cfg.layout, trailing)
        laid.append(lay_out(pieces, plans, made.vocabulary, made.cfg.layout, patch_values=3 * PATCH**2, end=end)[0])
    return stack([pack([row], length) for row in laid])


def logits_of(made: Trained, rows, tokens=None, patches=None):
    """float32 [b, t, v] of whole rows, without a cache; clean patches."""
    network = made.network
    x = (rows.patches if patches is None else patches) / np.float32(127.5) - 1
    bound = network.bind(made.params)
    u = np.zeros(rows.tokens.shape, np.float32)
    tokens = rows.tokens if tokens is None else tokens
    return bound.text_logits(bound.hidden(tokens, rows.is_patch, x, u, rows.cell, rows.position, rows.mask))
