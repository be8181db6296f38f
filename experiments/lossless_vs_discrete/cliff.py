"""E2: how much of an image a code can hold. Images of exactly H bits through tokenizers of exactly C bits.

    python experiments/lossless_vs_discrete/cliff.py --workdir runs/lossless/cliff

An image is one cell of 8x8 pixels with H fair bits (mmdiff/data/probe_pictures.py), drawn anew for every step; a tokenizer
has one code for it. Recovered: share of unseen images of which every bit is read back right from what the tokenizer gives
back. A code of C bits names at most 2^C images, so

    (1) recovered <= min(1, 2^(C - H))

Claim: (1) holds everywhere, the continuous twin recovers everything, and codes that are learnt need clearly more than H bits.
It would be wrong if any arm lay above (1) by more than four standard errors: then the code leaks or the count is wrong.

Every arm is trained for each H and seed, one after the other; what is finished is kept in WORKDIR/results.jsonl, and the same
command goes on from there. Two commands may share the work: each with its own --arms, in one WORKDIR.
"""

import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmdiff.config import Model, Tokenizer
from mmdiff.data.probe_pictures import BLOCKS, GREY
from mmdiff.tokenizers.network import UNTRAINED, TokenizerNetwork
from mmdiff.tokenizers.training import losses

ENTROPIES = (4, 8, 12, 16)
CELL, SEEDS, STEPS, BATCH, TESTED, LEARNING_RATE = 8, 3, 2000, 128, 16384, 1e-3
LAST = 0.9  # of the steps: no code starts anew after it
MODEL = Model(network="vit_autoencoder", width=96, depth=1, patch=CELL, head_width=32, compute="float32", lossless=False)
ARMS = {
    "FSQ 4x4": Tokenizer(quantizer="fsq", levels=(4, 4)),
    "FSQ 8x8": Tokenizer(quantizer="fsq", levels=(8, 8)),
    "FSQ 4^4": Tokenizer(quantizer="fsq", levels=(4,) * 4),
    "FSQ 8,5,5,5": Tokenizer(quantizer="fsq", levels=(8, 5, 5, 5)),
    "FSQ 4^6": Tokenizer(quantizer="fsq", levels=(4,) * 6),
    "FSQ 8,8,8,6,5": Tokenizer(quantizer="fsq", levels=(8, 8, 8, 6, 5)),
    "FSQ 4^8": Tokenizer(quantizer="fsq", levels=(4,) * 8),
    "VQ 256": Tokenizer(quantizer="vq", codes=256, code_width=8),
    "VQ 4096": Tokenizer(quantizer="vq", codes=4096, code_width=8),
    "SimVQ 4096": Tokenizer(quantizer="simvq", codes=4096, code_width=8),
    "LFQ 8": Tokenizer(quantizer="lfq", code_width=8),
    "LFQ 12": Tokenizer(quantizer="lfq", code_width=12),
    "LFQ 16": Tokenizer(quantizer="lfq", code_width=16),
    "continuous 8": Tokenizer(quantizer="none", code_width=8),
}


def cells(symbols: jax.Array, bits: jax.Array | int) -> jax.Array:
    """Images float32 [n, 8, 8, 3] in [-1, 1] of symbols int [n]: `probe_pictures.glyph_grid` of a cell each, on the device."""
    blocks = jnp.where(symbols[:, None] >> jnp.arange(BLOCKS**2) & 1, 255.0, 0.0)
    blocks = jnp.where(jnp.arange(BLOCKS**2) < bits, blocks, GREY).reshape(-1, BLOCKS, BLOCKS)
    scale = CELL // BLOCKS
    return (blocks.repeat(scale, 1).repeat(scale, 2)[..., None].repeat(3, 3)) / 127.5 - 1


def read(images: jax.Array, bits: jax.Array | int) -> jax.Array:
    """Symbols int [n] of images: a bit is set where the mean of its block is above the middle."""
    scale = CELL // BLOCKS
    means = images.reshape(-1, BLOCKS, scale, BLOCKS, scale, 3).mean((2, 4, 5)).reshape(-1, BLOCKS**2)
    places = jnp.arange(BLOCKS**2)
    return jnp.sum(jnp.where((means > 0) & (places < bits), 1 << places, 0), -1)


@functools.partial(jax.jit, static_argnames=("network", "steps"))
def trained_and_tested(
    network: TokenizerNetwork, bits: jax.Array | int, steps: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Train one tokenizer from `key`: share of images recovered, and of codes used."""
    first, data, test = jax.random.split(key, 3)
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    params = network.init(first)
    draw = lambda key, count: jax.random.randint(key, (count,), 0, 1 << bits)

    def step(carry, number):
        params, opt_state = carry
        symbols, restarts = jax.random.split(jax.random.fold_in(data, number))
        images = cells(draw(symbols, BATCH), bits)
        loss = lambda p: losses(network, p, images, jnp.ones(BATCH), key=restarts, restart=number < LAST * steps)
        grads, (_, codebook) = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates) | {UNTRAINED: codebook}, opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    symbols, model = draw(test, TESTED), network.bind(params)
    quantised = model.quantise(model.encode(cells(symbols, bits)))
    used = jnp.unique_counts(quantised.ids, size=TESTED, fill_value=-1).counts
    return jnp.mean(read(model.decode(quantised.codes), bits) == symbols), jnp.sum(used > 0)


def measure(name: str, bits: int, seeds: int, steps: int) -> dict:
    network = TokenizerNetwork(MODEL, ARMS[name], (1, 1))
    begin = time.monotonic()
    keys = jax.random.split(jax.random.key(bits), seeds)
    recovered, used = zip(*(map(float, trained_and_tested(network, bits, steps, key)) for key in keys), strict=True)
    capacity = network.bits
    bound = 1.0 if math.isinf(capacity) else min(1.0, 2.0 ** (capacity - bits))
    error = math.sqrt(max(bound * (1 - bound), 1 / TESTED) / TESTED)
    return {
        "arm": name,
        "capacity": None if math.isinf(capacity) else capacity,
        "entropy": bits,
        "recovered": recovered,
        "codes_seen": used,
        "bound": bound,
        "obeys": max(recovered) <= bound + 4 * error,
        "steps": steps,
        "seconds": time.monotonic() - begin,
    }


def table(results: list[dict]) -> str:
    """Markdown: arms by entropy, "mean of the seeds (lowest to highest; bound)"."""
    entropies = sorted({r["entropy"] for r in results})
    lines = [f"| tokenizer | bits | {' | '.join(f'H = {h}' for h in entropies)} |", "| --- " * (2 + len(entropies)) + "|"]
    for name in dict.fromkeys(r["arm"] for r in results):
        found = {r["entropy"]: r for r in results if r["arm"] == name}
        first = next(iter(found.values()))
        capacity = "" if first["capacity"] is None else f"{first['capacity']:.1f}"
        told = [_cell(found[h]) if h in found else "" for h in entropies]
        lines.append(f"| {name} | {capacity} | {' | '.join(told)} |")
    return "\n".join(lines)


def _cell(result: dict) -> str:
    low, high = min(result["recovered"]), max(result["recovered"])
    bound = "" if result["bound"] == 1 else f"; at most {result['bound']:.4g}"
    broken = "" if result["obeys"] else ", ABOVE THE BOUND"
    return f"{np.mean(result['recovered']):.4g} ({low:.4g} to {high:.4g}{bound}){broken}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="of: %(choices)s")
    parser.add_argument("--entropies", nargs="+", type=int, default=list(ENTROPIES), metavar="H")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    kept = arguments.workdir / "results.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    done = {(r["arm"], r["entropy"]) for r in results if r["steps"] == arguments.steps}
    for name in arguments.arms:
        for bits in arguments.entropies:
            if (name, bits) not in done:
                results.append(measure(name, bits, arguments.seeds, arguments.steps))
                with kept.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                print(f"{name}, H = {bits}: {_cell(results[-1])}, {results[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table([r for r in results if r["steps"] == arguments.steps]))
    return 0 if all(r["obeys"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
