"""A small frozen encoder with random parameters, and tokenizers on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Sampling, Tokenizer, Training
from mmdiff.pretrained.clip import CLIP
from mmdiff.pretrained.load import save_module

HALF = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP_CONFIG = {
    "text_config": HALF | {"vocab_size": 8, "max_position_embeddings": 4, "eos_token_id": 7},
    "vision_config": HALF | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2},
    "projection_dim": 8,
}
CODES = Tokenizer(quantizer="vq", codes=24, code_width=4, depth=1)


def filled(make, seed: int):
    """The module that `make` makes, with random parameters none of which is zero or one, without asking the compiler."""
    graph, params = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        return jnp.asarray(0.35 * rng.standard_normal(leaf.shape) + ("scale" in jax.tree_util.keystr(path)), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(drawn, params))


def encoder(folder) -> str:
    """Its folder, in the form of CLIP."""
    save_module(filled(lambda: CLIP(CLIP_CONFIG, nnx.Rngs(0)), 1), folder, CLIP_CONFIG)
    return str(folder)


def experiment(network: str, folder: str, tokenizer: Tokenizer = CODES, **training) -> Config:
    usual = {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "sample_every": 4, "validate_every": 4}
    return Config(
        model=Model(network=network, width=16, depth=1, patch=8, head_width=16, lossless=False),
        tokenizer=dataclasses.replace(tokenizer, encoder=folder),
        layout=Layout(markers=False, row_length=16),
        data=Data(source="shapes", generator=(("draw", 1.0),), vocabulary="bytes", size=32),
        optimizer=Optimizer(learning_rate=3e-3, warmup=2, weight_decay=0.1),
        training=Training(**usual | {"validation_rows": 8} | training),
        sampling=Sampling(steps=2),
    )


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
