"""E10: does LaVIT's selector keep more of an image that says more? Images of exactly known entropy through its tokenizer.

    python experiments/lossless_vs_discrete/selector.py --workdir runs/lossless/selector

An image has 16 cells, one for each patch of the encoder: m of them, at random places, hold BITS fair bits each, the others are
plain grey; m is one of 0 to 10, all equally likely, so that on average nearly a third of the cells says something. One of 512
codes can name the place and the bits of a cell. The image's entropy is exactly

    (1) -log2 p(image) = log2 11 + log2 C(16, m) + m BITS

Nothing tells the tokenizer (semantic.py:lavit, trained here on such images) what m is: its loss asks for a third of all patches
of a batch, not of each image. Its encoder has random weights: features need only say what is in a patch. They are centred:
where all features have most in common, as those of untrained networks do, nearly all of the loss is about that.

Measured on unseen images: the mean share that is kept; Spearman's rank correlation of an image's share with (1), and its
bootstrap interval; how often cells with bits are kept, and how often plain ones. Which patches are kept is drawn, as in use, by
chances that the selector gives; the correlation of an image's mean chance, what its share is on average over many draws, stands
beside. The same before training is the negative control.

Claims, before it was run: (1) the mean share is 1/3, to 0.02; (2) the rank correlation is at least 0.6; (3) cells with bits are
kept more often than plain ones. (1) would be wrong if any seed lay outside; (2) if the interval over images and seeds lay below
0.6, or if the untrained selector reached 0.6 as well, for then it is no achievement; (3) if the difference were not positive
for every seed.

WORKDIR gets the images, a run per seed and results.jsonl; the same command goes on where it was stopped.
"""

import argparse
import json
import math
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import joint
import numpy as np
import PIL.Image
from flax import nnx
from scipy.stats import spearmanr

import mmdiff
from mmdiff import config
from mmdiff.config_files import load_experiment, replaced
from mmdiff.data.probe_pictures import GREY, glyph_grid
from mmdiff.pretrained.encoder import normalised
from mmdiff.pretrained.load import save_module
from mmdiff.tokenizers.semantic import own_keys

HERE = Path(__file__).parent
CELLS, CELL, MOST, BITS = 4, 8, 10, 4
ENCODER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SEEDS, STEPS, BATCH, IMAGES, TESTED, DRAWS = 3, 6000, 64, 16000, 512, 2000
LEARNING_RATE = 3e-3
RATIO, MARGIN, CORRELATION = 1 / 3, 0.02, 0.6


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [32, 32, 3], and which of its cells hold bits, bool [16]."""
    told = np.zeros(CELLS**2, bool)
    told[rng.permutation(CELLS**2)[: rng.integers(MOST + 1)]] = True
    pixels = glyph_grid(rng.integers(2**BITS, size=(CELLS, CELLS)), BITS, CELL)
    plain = ~told.reshape(CELLS, CELLS).repeat(CELL, 0).repeat(CELL, 1)
    return np.where(plain[..., None], GREY, pixels).astype(np.uint8), told


def entropy(told: np.ndarray) -> float:
    """Equation (1), bits."""
    count = int(told.sum())
    return math.log2(MOST + 1) + math.log2(math.comb(CELLS**2, count)) + count * BITS


def written(folder: Path, count: int) -> None:
    """`count` images to learn from, as documents."""
    if (folder / "documents.jsonl").is_file():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        name = f"images/{number:05d}.png"
        PIL.Image.fromarray(drawn(rng)[0]).save(folder / name)
        lines.append(json.dumps({"segments": [{"image": name}]}) + "\n")
    (folder / "documents.jsonl").write_text("".join(lines))


def encoder(folder: Path) -> Path:
    """A tower of random weights, in CLIP's form, whose features are 0 in the mean of such images."""
    if not (folder / "config.json").is_file():
        stand_in = runpy.run_path(str(HERE.parent / "stand_ins" / "two_tower.py"))
        cfg = stand_in["settings"](CELLS * CELL, CELL)
        cfg["vision_config"] |= ENCODER
        model, rng = stand_in["fresh"](cfg, nnx.Rngs(0)), np.random.default_rng(2)
        images = np.stack([drawn(rng)[0] for _ in range(TESTED)])
        features = model.vision(normalised(images, CELLS * CELL), -1)[:, 1:]
        model.vision.encoder.layers[-2].down.bias[...] -= features.mean((0, 1))
        save_module(model, folder, cfg)
    return folder


def settings(arguments: argparse.Namespace, seed: int) -> config.Config:
    """The tokenizer of one run. Its pixels are not asked about: their decoder is small."""
    changes = {
        "name": "selector",
        "model.width": 48,
        "model.depth": 1,
        "model.head_width": 16,
        "data.source": "documents",
        "data.path": str(arguments.workdir / "data"),
        "data.image_size": (CELLS * CELL, CELLS * CELL),
        "data.generator": (),
        "training.steps": arguments.steps,
        "training.batch_size": BATCH,
        "optimizer.learning_rate": LEARNING_RATE,
        "training.seed": seed,
        "training.sample_every": 0,
        "training.validation_rows": 64,
        "tokenizer.decay": 0.99,  # the usual codebook, for a long run
        "tokenizer.restart": 0.1,
        "tokenizer.encoder": str(arguments.encoder or encoder(arguments.workdir / "encoder")),
    }
    return replaced(load_experiment(f"{HERE / 'semantic.py'}:lavit"), changes)


def kept(tokenizer, params, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which patches are kept, drawn as in use, bool [n, 16], and the chance that each is, float32 [n, 16]."""

    @jax.jit
    def of(params, images):
        model = tokenizer.network.bind(params)
        features, _ = model.module.tower(images)
        return model.keep(features, own_keys(images, jax.random.key(0))), jnp.exp(model.module.selector(features)[..., 0])

    pieces = np.split(images.astype(np.float32) / 127.5 - 1, max(1, len(images) // 64))
    drawn, chances = map(np.concatenate, zip(*(of(params, piece) for piece in pieces), strict=True))
    return drawn > 0.5, chances


def measured(tokenizer, count: int) -> dict:
    """Shares and entropies of `count` unseen images, and how often cells are kept; `untrained`: where training began."""
    rng = np.random.default_rng(1)
    images, told = (np.stack(parts) for parts in zip(*(drawn(rng) for _ in range(count)), strict=True))
    begin = jax.random.fold_in(jax.random.key(tokenizer.cfg.training.seed), 1)
    fresh = jax.jit(tokenizer.network.init)(begin) | {"tower": tokenizer.params["tower"]}
    entropies, found = np.asarray([entropy(cells) for cells in told]), {}
    for name, params in (("trained", tokenizer.params), ("untrained", fresh)):
        keep, chances = kept(tokenizer, params, images)
        found[name] = {
            "share": float(keep.mean()),
            "shares": keep.mean(1).tolist(),
            "chances": chances.mean(1).astype(float).tolist(),
            "correlation": rank_correlation(keep.mean(1), entropies),
            "correlation_of_chances": rank_correlation(chances.mean(1), entropies),
            "of_cells_with_bits": float(keep[told].mean()),
            "of_plain_cells": float(keep[~told].mean()),
        }
    return found | {"entropies": entropies.tolist()}


def interval(records: list[dict], name: str, what: str = "shares") -> tuple[float, float]:
    """95% of the mean rank correlations of shares (or "chances") in samples redrawn over seeds and, of each, over images."""
    rng, means = np.random.default_rng(0), []
    for _ in range(DRAWS):
        values = []
        for record in rng.choice(np.asarray(records, dtype=object), len(records)):
            pick = rng.integers(0, len(record["entropies"]), len(record["entropies"]))
            values.append(rank_correlation(np.asarray(record[name][what])[pick], np.asarray(record["entropies"])[pick]))
        means.append(np.mean(values))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, 0 where one of the two is constant."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0


def report(records: list[dict]) -> tuple[str, bool]:
    """A table, and whether all that was claimed holds."""
    head = ("selector", "share kept", "rank correlation of shares", "of chances", "cells with bits", "plain cells")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    intervals = {name: interval(records, name) for name in ("trained", "untrained")}
    for name, (low, high) in intervals.items():
        of = lambda key, name=name: [record[name][key] for record in records]
        told = f"{np.mean(of('correlation')):.2f} ({low:.2f} to {high:.2f})"
        low, high = interval(records, name, "chances")
        told += f" | {np.mean(of('correlation_of_chances')):.2f} ({low:.2f} to {high:.2f})"
        shares = ", ".join(f"{share:.3f}" for share in of("share"))
        cells = " | ".join(f"{np.mean(of(key)):.1%}" for key in ("of_cells_with_bits", "of_plain_cells"))
        lines.append(f"| {name} | {shares} | {told} | {cells} |")
    right = [record["trained"] for record in records]
    claims = {
        f"mean share 1/3 +- {MARGIN}": all(abs(r["share"] - RATIO) <= MARGIN for r in right),
        f"rank correlation at least {CORRELATION}": intervals["trained"][1] >= CORRELATION,
        "not so before training": np.mean([r["untrained"]["correlation"] for r in records]) < CORRELATION,
        "cells with bits are kept more often": all(r["of_cells_with_bits"] > r["of_plain_cells"] for r in right),
    }
    lines += [""] + [f"{'holds' if good else 'DOES NOT HOLD'}: {claim}" for claim, good in claims.items()]
    return "\n".join(lines), bool(all(claims.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="another one, of 16 patches")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--images", type=int, default=IMAGES, help="to learn from")
    arguments = parser.parse_args()
    written(arguments.workdir / "data", arguments.images)
    kept_in = arguments.workdir / "results.jsonl"
    records = [json.loads(line) for line in kept_in.read_text().splitlines()] if kept_in.is_file() else []
    same = lambda record: record["steps"] == arguments.steps and record["encoder"] == str(arguments.encoder)
    for seed in range(arguments.seeds):
        if any(same(record) and record["seed"] == seed for record in records):
            continue
        workdir = arguments.workdir / f"steps-{arguments.steps}" / f"seed-{seed}"
        joint.trained(settings(arguments, seed), workdir)
        told = {"seed": seed, "steps": arguments.steps, "encoder": str(arguments.encoder)}
        records.append(told | measured(mmdiff.load_tokenizer(workdir), TESTED))
        with kept_in.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(f"seed {seed}: rank correlation {records[-1]['trained']['correlation']:.2f}", file=sys.stderr, flush=True)
    text, holds = report([record for record in records if same(record) and record["seed"] < arguments.seeds])
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
