"""A small encoder of images and texts, trained on generated scenes: what stands in for CLIP where nobody has brought it.

    python experiments/stand_ins/two_tower.py --out runs/stand_ins/two_tower                  64 x 64 pixels, patches of 8
    python experiments/stand_ins/two_tower.py --side 32 --patch 4 --out runs/stand_ins/two_tower_32

It learns which caption belongs to which scene of its batch; equal captions count as one. FOLDER is read by
`mmdiff.pretrained.clip.load_clip` like the real one, its words are bytes. What it knows is coloured forms on dark ground:
distances in its space say nothing about photographs, and no metric computed with it may bear CLIP's name.

    loss = mean cross entropy of softmax(s a_i . b_j) over j and over i, to the pairs with the same caption

Held out: scenes that training never shows (mmdiff/data/shapes.py). Source of the loss: Radford et al., arXiv 2103.00020.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmdiff.config import ConfigError
from mmdiff.data.shapes import Shapes
from mmdiff.layout import patch_cells
from mmdiff.models.patches import sincos
from mmdiff.pretrained.clip import CLIP
from mmdiff.pretrained.encoder import normalised
from mmdiff.pretrained.load import save_module

END, LONGEST, SIDE, PATCH = 256, 96, 64, 8
TEXT = {"vocab_size": 257, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6}
STEPS, BATCH, LEARNING_RATE, EXAMPLES, TESTED = 600, 64, 1e-3, 10_000, 256


def settings(side: int = SIDE, patch: int = PATCH) -> dict[str, Any]:
    """config.json, for images of `side` pixels cut into patches of `patch`."""
    return {
        "text_config": TEXT | {"max_position_embeddings": LONGEST, "eos_token_id": END, "hidden_act": "gelu"},
        "vision_config": VISION | {"image_size": side, "patch_size": patch, "hidden_act": "gelu"},
        "projection_dim": 64,
        "words": "bytes",
    }


def as_bytes(text: str) -> np.ndarray:
    """int32 [LONGEST]: bytes, then the end."""
    found = np.full(LONGEST, END, np.int32)
    given = text.encode()[: LONGEST - 1]
    found[: len(given)] = list(given)
    return found


def scenes(count: int, split: str, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, side, side, 3] and int32 [n, LONGEST]."""
    source = Shapes(0, count, side, mix=(("draw", 1.0),), max_objects=2, split=split)
    documents = [source[i] for i in range(count)]
    return np.stack([d.images[0].pixels for d in documents]), np.stack([as_bytes(d.texts[0]) for d in documents])


def fresh(cfg: dict[str, Any], rngs: nnx.Rngs) -> CLIP:
    model = CLIP(cfg, rngs)
    for module, width in ((model.text, TEXT["hidden_size"]), (model.vision, VISION["hidden_size"])):
        for name in ("embedding", "place", "first"):
            if hasattr(module, name):
                parameter = getattr(module, name)
                parameter[...] = jax.random.normal(rngs.params(), parameter.shape) * width**-0.5
    model.log_scale[...] = jnp.log(10.0)
    return model


def loss_of(model: CLIP, images: jax.Array, texts: jax.Array) -> jax.Array:
    a, b = model.embed_images(normalised(images, images.shape[1])), model.embed_texts(texts)
    same = (texts[:, None] == texts).all(-1)
    target = same / same.sum(-1, keepdims=True)
    logits = jnp.exp(jnp.minimum(model.log_scale[...], jnp.log(100.0))) * a @ b.T
    return optax.softmax_cross_entropy(jnp.stack([logits, logits.T]), target).mean()


def trained(images: np.ndarray, texts: np.ndarray, steps: int, seed: int, cfg: dict[str, Any] | None = None) -> CLIP:
    cfg = cfg or settings()
    model, side = fresh(cfg, nnx.Rngs(seed)), cfg["vision_config"]["image_size"] // cfg["vision_config"]["patch_size"]
    waves = sincos(jnp.asarray(patch_cells(side, side)[:, :2]), cfg["vision_config"]["hidden_size"])
    model.vision.place[...] = model.vision.place[...].at[1:].add(waves)  # else features hardly say where they stand
    graph, params = nnx.split(model)
    tx = optax.adamw(optax.cosine_onecycle_schedule(steps, LEARNING_RATE), weight_decay=0.05)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, texts):
        value, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), images, texts))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, rng = tx.init(params), np.random.default_rng(seed)
    for number in range(1, steps + 1):
        pick = rng.integers(0, len(images), BATCH)
        params, opt_state, value = step(params, opt_state, images[pick], texts[pick])
        if number % 100 == 0:
            print(f"step {number} of {steps}: {float(value):.3f}", file=sys.stderr, flush=True)
    return nnx.merge(graph, params)


def retrieved(model: CLIP, images: np.ndarray, texts: np.ndarray) -> float:
    """Share of images whose nearest text, of all, is a caption of theirs."""
    a = np.concatenate([np.asarray(model.embed_images(normalised(part, part.shape[1]))) for part in np.split(images, 4)])
    nearest = (a @ np.asarray(model.embed_texts(texts)).T).argmax(-1)
    return float((texts[nearest] == texts).all(-1).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=SIDE, metavar="PIXELS", help="of the images")
    parser.add_argument("--patch", type=int, default=PATCH, metavar="PIXELS", help="each of which is one feature of an image")
    arguments = parser.parse_args()
    for name in ("steps", "patch"):
        if (count := getattr(arguments, name)) < 1:
            parser.error(f"--{name} {count} must be at least 1.")
    if arguments.side % arguments.patch:
        parser.error(f"--side {arguments.side} is no multiple of --patch {arguments.patch}.")
    cfg = settings(arguments.side, arguments.patch)
    try:
        shown = scenes(EXAMPLES, "train", arguments.side)
    except ConfigError as error:
        parser.error(str(error))
    model = trained(*shown, arguments.steps, arguments.seed, cfg)
    save_module(model, arguments.out, cfg)
    images, texts = scenes(TESTED, "test", arguments.side)
    told = len(np.unique(texts, axis=0))
    print(f"{retrieved(model, images, texts):.3f} of {TESTED} unseen scenes find their caption among {told}: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
