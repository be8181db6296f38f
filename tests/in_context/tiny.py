"""A small language model, words, and a v2l tokenizer of images of 32 x 32 at patches of 8; all parameters random."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Tokenizer, Training
from mmdiff.in_context.language import Language, read_words
from mmdiff.pretrained.clip import CLIP
from mmdiff.pretrained.llama import Llama
from mmdiff.tokenizers.v2l.words import Words

WIDTH, GLOBAL, SIDE = 8, 12, 32
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HALF = SIZES | {"hidden_act": "gelu"}
TOWERS = {
    "text_config": HALF | {"vocab_size": 257, "max_position_embeddings": 32, "eos_token_id": 256},
    "vision_config": HALF | {"image_size": 16, "patch_size": 8},
    "projection_dim": WIDTH,
}
TEXTS = ["a large red circle at the top left and a small blue cross at the bottom", "a photo of a green square"]


def pieces(size: int) -> bytes:
    """Of SentencePiece, with <unk>, <s> and </s>."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=3,
    )
    return model.getvalue()


def random_like(module: nnx.Module, seed: int, size: float = 0.5) -> None:
    """Every parameter drawn anew."""
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    for number, leaf in enumerate(leaves):
        drawn = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), leaf[...].shape) * size
        leaf[...] = drawn + (leaf.ndim == 1)


@functools.cache
def language(layers: int = 2) -> Language:
    model = Llama(SIZES | {"num_hidden_layers": layers, "vocab_size": 300, "tie_word_embeddings": True}, nnx.Rngs(0))
    random_like(model, 1)
    return Language(model, read_words(pieces(300), "here"))


@functools.cache
def towers() -> CLIP:
    model = CLIP(TOWERS, nnx.Rngs(0))
    random_like(model, 2)
    return model


@functools.cache
def words() -> Words:
    rng = np.random.default_rng(0)
    drawn = lambda count: (rng.normal(size=(count, WIDTH)) * 0.3 + 0.2).astype(np.float32)
    told = [f"word {i}" for i in range(GLOBAL)]
    return Words.of([f"piece {i}" for i in range(300)], drawn(300), told, drawn(GLOBAL), towers(), TOWERS)


def experiment(path: Path, model: str = "vit", **tokenizer) -> Config:
    """With the words in a file of this folder."""
    file = path / "words.safetensors"
    if not file.is_file():
        words().save(file)
    settings = {
        "vit": Model(network="vit_autoencoder", width=16, depth=2, patch=8, head_width=8, compute="float32"),
        "conv": Model(
            network="conv_autoencoder", width=8, depth=1, patch=8, channels=(1, 1, 1, 1), head_width=8, compute="float32"
        ),
    }
    given = {"codes": 300, "code_width": WIDTH, "global_codes": GLOBAL, "global_tokens": 4, "commitment": 1.0}
    return Config(
        model=settings[model],
        tokenizer=Tokenizer(**{"quantizer": "v2l", "words": str(file), "tower": words().tower} | given | tokenizer),
        layout=Layout(row_length=16, markers=False),
        data=Data(source="shapes", generator=(("draw", 1.0),), vocabulary="bytes", size=64),
        optimizer=Optimizer(learning_rate=5e-3, warmup=1),
        training=Training(batch_size=4, steps=2),
    )


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)


def logits(which: Language, ids) -> jax.Array:
    """Of whole texts int [b, t], without a cache."""
    model = nnx.merge(which.graph, which.params)
    return model.logits(model(model.embed(jnp.asarray(ids)))[0])
