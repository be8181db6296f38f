"""E1, where the entropy is known: does a model of next pixels find it? Images of exactly H bits, drawn anew for every step.

    python experiments/lossless_vs_discrete/entropy.py --workdir runs/lossless/entropy

An image is one cell of 8 x 8 pixels with H fair bits (as in cliff.py), so no model can need fewer than H bits for it on
average: that it comes close is what makes such a model a measure of the entropy of other images (rate.py).

Claim: the mean of -log2 p over unseen images lies between H and 1.05 H + 1. It would be wrong if it lay outside by more than
four standard errors; below H, the model would see what it predicts.

What is finished is kept in WORKDIR/results.jsonl, and the same command goes on from there.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cliff import CELL, ENTROPIES, cells

from mmdiff.config import Config, Data, Layout, Model
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.image_paths import next_pixel
from mmdiff.layout import ImagePiece, ImagePlan, Rows, lay_out, stack
from mmdiff.models.network import Network

SEEDS, STEPS, BATCH, TESTED, LEARNING_RATE = 3, 2000, 32, 2048, 2e-3
CONFIG = Config(
    model=Model(width=64, depth=4, patch=1, block="attention", head_width=32, sparse="strided", compute="float32"),
    layout=Layout(row_length=CELL**2 + 8, images="next_pixel", max_grid=CELL),
    data=Data(image_size=(CELL, CELL)),
)
VOCABULARY = Vocabulary.bytes(CELL)


def rows_of(images: jax.Array) -> Rows:
    """Rows with one image float32 [n, 8, 8, 3] in [-1, 1] each, and no text."""
    piece = ImagePiece(np.zeros((CELL**2, 3), np.uint8), CELL, CELL)
    row, _ = lay_out([piece], [ImagePlan(True, 0)], VOCABULARY, CONFIG.layout, patch_values=3)
    rows = stack([row] * len(images))
    pixels = jnp.rint((images.reshape(len(images), CELL**2, 3) + 1) * 127.5).astype(jnp.uint8)
    first = int(np.flatnonzero(row.is_patch)[0])
    return dataclasses.replace(rows, patches=jnp.asarray(rows.patches).at[:, first : first + CELL**2].set(pixels))


@functools.partial(jax.jit, static_argnames="steps")
def bits_found(bits: jax.Array | int, steps: int, key: jax.Array) -> jax.Array:
    """-log2 p of unseen images under a model trained from `key`, float32 [TESTED / BATCH]: means of batches."""
    network = Network.of(CONFIG, VOCABULARY.size)
    first, data, test = jax.random.split(key, 3)
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    params = network.init(first)

    def nats(params, key):
        rows = rows_of(cells(jax.random.randint(key, (BATCH,), 0, 1 << bits), bits))
        found = next_pixel.losses(network, CONFIG, params, rows)
        return found.image / found.image_weight * 3 * CELL**2

    def step(carry, number):
        params, opt_state = carry
        grads = jax.grad(nats)(params, jax.random.fold_in(data, number))
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    return jax.lax.map(lambda key: nats(params, key), jax.random.split(test, TESTED // BATCH)) / math.log(2)


def measure(bits: int, seeds: int, steps: int) -> dict:
    found = [np.asarray(bits_found(bits, steps, key)) for key in jax.random.split(jax.random.key(bits), seeds)]
    errors = [float(one.std(ddof=1) / math.sqrt(len(one))) for one in found]
    means = [float(one.mean()) for one in found]
    inside = all(bits - 4 * e <= m <= 1.05 * bits + 1 + 4 * e for m, e in zip(means, errors, strict=True))
    return {"entropy": bits, "found": means, "stderr": errors, "as_claimed": inside}


def table(results: list[dict]) -> str:
    """Markdown."""
    lines = ["| H | bits found: mean over seeds (lowest to highest) |", "| --- | --- |"]
    for r in results:
        wrong = "" if r["as_claimed"] else ", NOT AS CLAIMED"
        lines.append(f"| {r['entropy']} | {np.mean(r['found']):.3f} ({min(r['found']):.3f} to {max(r['found']):.3f}){wrong} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--entropies", nargs="+", type=int, default=list(ENTROPIES), metavar="H")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    kept = arguments.workdir / "results.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    results = [r for r in results if (r["seeds"], r["steps"]) == (arguments.seeds, arguments.steps)]
    for bits in arguments.entropies:
        if bits not in [r["entropy"] for r in results]:
            found = measure(bits, arguments.seeds, arguments.steps)
            results.append(found | {"seeds": arguments.seeds, "steps": arguments.steps})
            with kept.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print(f"H = {bits}: {found['found']}", file=sys.stderr, flush=True)
    print(table(results))
    return 0 if all(r["as_claimed"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
