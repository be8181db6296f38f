"""A small Q-Former, trained by itself on generated scenes behind a frozen tower, with BLIP-2's three losses.

    python experiments/stand_ins/two_tower.py --side 32 --patch 4 --out runs/stand_ins/two_tower_32
    python experiments/stand_ins/qformer.py --encoder runs/stand_ins/two_tower_32 --out runs/stand_ins/qformer

A model starts from FOLDER with front_end.kind="qformer" and front_end.init=FOLDER. Losses and their source:
mmdiff/adapters/qformer_losses.py. The tower's features are computed once. Held out: scenes that training never shows.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from mmdiff import config
from mmdiff.adapters.qformer_losses import Pretraining, as_bytes, losses
from mmdiff.data.shapes import Shapes
from mmdiff.pretrained.clip import load_clip_vision
from mmdiff.pretrained.encoder import normalised
from mmdiff.pretrained.load import save_module

TOKENS, WIDTH, DEPTH, HEADS, LONGEST, SKIPPED = 8, 128, 4, 4, 64, 1
STEPS, BATCH, LEARNING_RATE, EXAMPLES, TESTED, PIECE = 400, 32, 1e-3, 6000, 128, 100


def features_of(folder: Path, images: np.ndarray, skipped: int) -> np.ndarray:
    """float32 [n, s, f] of images uint8, by the tower without its last layers."""
    tower = load_clip_vision(folder)
    graph, state = nnx.split(tower)
    see = jax.jit(lambda state, x: nnx.merge(graph, state)(normalised(x, tower.side), -skipped or None))
    padded = np.concatenate([images, images[: -len(images) % PIECE]])
    return np.concatenate([np.asarray(see(state, padded[i : i + PIECE])) for i in range(0, len(padded), PIECE)])[: len(images)]


def scenes(count: int, split: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, side, side, 3] and int32 [n, LONGEST]."""
    source = Shapes(0, count, side, mix=(("draw", 1.0),), max_objects=2, split=split)
    documents = [source[i] for i in range(count)]
    texts = [as_bytes(document.texts[0], LONGEST) for document in documents]
    return np.stack([document.images[0].pixels for document in documents]), np.stack(texts)


def trained(features: np.ndarray, texts: np.ndarray, steps: int, seed: int) -> Pretraining:
    make = lambda: Pretraining(features.shape[-1], TOKENS, WIDTH, DEPTH, HEADS, LONGEST, nnx.Rngs(seed))
    graph, params = nnx.graphdef(nnx.eval_shape(make)), jax.jit(lambda: nnx.state(make()))()
    tx = optax.adamw(optax.cosine_onecycle_schedule(steps, LEARNING_RATE), weight_decay=0.05)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, features, texts, key):
        def total(params):
            parts = losses(nnx.merge(graph, params), features, texts, key)
            return sum(parts), parts

        grads, parts = jax.grad(total, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, parts

    opt_state, rng, key = tx.init(params), np.random.default_rng(seed), jax.random.key(seed)
    for number in range(1, steps + 1):
        pick = rng.integers(0, len(features), BATCH)
        params, opt_state, parts = step(params, opt_state, features[pick], texts[pick], jax.random.fold_in(key, number))
        if number % 50 == 0 or number == steps:
            told = ", ".join(f"{name} {float(value):.3f}" for name, value in parts._asdict().items())
            print(f"step {number} of {steps}: {told}", file=sys.stderr, flush=True)
    return nnx.merge(graph, params)


def measured(model: Pretraining, features: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Share of images whose nearest text, of all, is a caption of theirs; of pairs whose match is told rightly, half of them
    with the texts of others; nats per byte of the captions."""
    other = np.roll(texts, 1, axis=0)
    differs = (other != texts).any(-1)

    @jax.jit
    def run():
        said = [model.match_logits(features, ids).argmax(-1) for ids in (texts, other)]
        return model.similarity(*model.vectors(features, texts)), *said, model.caption_nats(features, texts)

    s, with_own, with_other, nats = map(np.asarray, run())
    found = (texts[s.argmax(-1)] == texts).all(-1).mean()
    right = np.concatenate([with_own == 1, (with_other == 0)[differs]]).mean()
    return {"retrieval": float(found), "match": float(right), "caption_nats": float(nats.sum() / (nats != 0).sum())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, metavar="TOWER", help="folder of a CLIP, real or a stand-in")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=32, help="of the scenes, in pixels (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} must be at least 1.")
    try:
        images, texts = scenes(EXAMPLES, "train", arguments.side)
        features = features_of(arguments.encoder, images, SKIPPED)
    except (config.ConfigError, ValueError) as error:
        parser.error(str(error))
    model = trained(features, texts, arguments.steps, arguments.seed)
    sizes = {
        "tokens": TOKENS,
        "width": WIDTH,
        "depth": DEPTH,
        "heads": HEADS,
        "features": features.shape[-1],
        "skipped": SKIPPED,
    }
    save_module(model, arguments.out, sizes)
    images, texts = scenes(TESTED, "test", arguments.side)
    found = measured(model, features_of(arguments.encoder, images, SKIPPED), texts)
    told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    print(f"{TESTED} unseen scenes: {told}: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
