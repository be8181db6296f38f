"""Small models behind every front end, with a random vision tower and parameters none of which is zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff.config import Config, Data, FrontEnd, Layout, Model, Tower
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import Image
from mmdiff.layout import lay_out, pack, plan_images, stack, text_pieces
from mmdiff.models.network import Network
from mmdiff.pretrained.clip import CLIP
from mmdiff.pretrained.load import save_module
from mmdiff.sampling.generate import Model as Trained
from mmdiff.training.loss import normalise

SIDE, PATCH = 8, 4
TOWER = Tower(side=SIDE, patch=PATCH, width=16, hidden=16, depth=2, heads=2, activation="gelu")
VISION = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
TEXT = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
CLIP_CONFIG = {
    "vision_config": VISION | {"num_attention_heads": 2, "hidden_act": "gelu"},
    "text_config": TEXT | {"max_position_embeddings": 4},
    "projection_dim": 4,
}
MANY = {"tokens": 3, "width": 16, "depth": 2, "heads": 2}
FRONTS = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp"},
    "resampler": {"kind": "resampler", **MANY},
    "gated": {"kind": "resampler", "gated": 1, **MANY},
    "qformer": {"kind": "qformer", **MANY},
    "causal_former": {"kind": "causal_former", **MANY},
    "merger": {"kind": "merger", "tokens": 3, "depth": 1, "init": "somewhere"},
}


def write_tower(folder):
    """A CLIP with random weights, in a folder."""
    save_module(CLIP(CLIP_CONFIG, nnx.Rngs(7)), folder, CLIP_CONFIG)


def configuration(front: str, images: str = "read", block: str = "attention", encoder: str = "somewhere", **more) -> Config:
    return Config(
        model=Model(
            width=32,
            depth=2,
            patch=PATCH,
            block=block,
            head_width=16,
            key_width=16,
            lossless=False,
            compute="float32",
        ),
        layout=Layout(row_length=64, max_grid=4, images=images),
        front_end=FrontEnd(**{"encoder": str(encoder), "tower": TOWER} | FRONTS[front] | more),
        data=Data(image_size=(SIDE, SIDE)),
    )


@functools.cache
def model(front: str, **more) -> Trained:
    cfg = configuration(front, **more)
    vocabulary = Vocabulary.bytes(max_grid=4)
    network = Network.of(cfg, vocabulary.size)
    return Trained(cfg, parameters(network), vocabulary)


def parameters(network: Network):
    """Random ones, none of them zero or one, without asking the compiler."""
    rng = np.random.default_rng(5)
    drawn = lambda leaf: (0.2 * rng.standard_normal(leaf.shape) + 0.1).astype(np.float32)
    return jax.tree.map(drawn, jax.eval_shape(network.init, jax.random.key(0)))


def picture(seed: int = 0, side: int = SIDE) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def rows_of(made: Trained, *rows, length: int = 64, end: bool = True):
    """A batch; each argument is the list of documents of one row."""
    return stack([pack([laid(made, document, end) for document in documents], length) for documents in rows])


def laid(made: Trained, document, end: bool = True):
    """One document."""
    pieces = text_pieces(document, made.vocabulary, PATCH, made.tokenizer)
    plans, values = plan_images(pieces, made.cfg.layout, False), made.cfg.patch_values
    return lay_out(pieces, plans, made.vocabulary, made.cfg.layout, patch_values=values, end=end)[0]


@functools.partial(jax.jit, static_argnames="network")
def logits(network: Network, params, rows):
    bound, clean, x = network.bind(params), jnp.zeros(rows.tokens.shape), normalise(rows.patches)
    return bound.text_logits(bound.hidden(rows.tokens, rows.is_patch, x, clean, rows.cell, rows.position, rows.mask))


def logits_of(made: Trained, *rows, end: bool = True):
    """float32 [b, t, v] of whole rows; two of them, as all tests share the program."""
    assert len(rows) == 2
    return np.asarray(logits(made.network, made.params, jax.tree.map(jnp.asarray, rows_of(made, *rows, end=end))))
