"""E4: what can still be read from an image after a tokenizer? Readers of the probes, one trained anew for each front end.

    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:vq_64 --workdir runs/tokenizers/vq_64
    python experiments/lossless_vs_discrete/readers.py --workdir runs/lossless/readers --tokenizers runs/tokenizers/vq_64

A reader is a small model on raw patches that only reads (layout.images="read") and answers questions about fine detail
(mmdiff/data/probes.py). For each tokenizer two are asked: `anew`, trained on images that have gone through the tokenizer, so
that nothing it sees is unfamiliar; and `fixed`, the reader of the untouched images. Both are asked about held-out images that
have gone through it. What the first cannot answer is no longer there for a reader of this size; what only the second cannot
is there in another form.

Claims: the reader of raw patches reads digits of the largest size right more than 99 times in 100, so that it is the front end
that is measured; on no kind does a reader behind a tokenizer beat it by more than two standard errors; small digits, the odd
pixel and exact colours suffer most. A kind on which a tokenizer did beat it would refute the second.

Every reader is trained for each seed; what is finished is kept in WORKDIR/results.jsonl, and the same command goes on from
there.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

import mmdiff
from mmdiff.config import Config, Data, Layout, Model, Optimizer, Training
from mmdiff.data.batches import Batches
from mmdiff.data.probes import QUESTIONS, SIZES, Probes
from mmdiff.data.sources import GeneratorSource
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import Document, Image
from mmdiff.evaluation.prompts import describe
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model as Trained
from mmdiff.training import state as train_state
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.step import compile_train_step

RAW = "raw patches"
COUNT = 300  # held-out questions of each kind
CONFIG = Config(
    name="reader",
    model=Model(width=256, depth=4, patch=8, block="attention", head_width=32, compute="float32"),
    layout=Layout(row_length=320, images="read", max_grid=8, text_drop=0.0),
    data=Data(source="probes", size=40000, vocabulary="bytes", generator_image_size=64),
    optimizer=Optimizer(learning_rate=1e-3, warmup=100, b2=0.99),
    training=Training(steps=2000, batch_size=8, ema=0.99),
)


class Through:
    """Documents whose images have gone through a tokenizer; None: as they are."""

    def __init__(self, source, tokenizer):
        self.source, self.tokenizer = source, tokenizer
        self.outline, self.where = source.outline, source.where

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Document:
        document = self.source[index]
        if self.tokenizer is None:
            return document
        images = [segment for segment in document.segments if isinstance(segment, Image)]
        made = iter(self.tokenizer.reconstruct([image.pixels for image in images]))
        swap = lambda segment: Image(next(made), segment.learn) if isinstance(segment, Image) else segment
        return Document(*map(swap, document.segments), extra=document.extra)


def reader(tokenizer, steps: int, seed: int, kinds: tuple[str, ...]) -> Trained:
    """One reader, trained."""
    cfg = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, steps=steps, seed=seed))
    vocabulary = Vocabulary.bytes(cfg.layout.max_grid)
    mix = tuple((kind, 1 / len(kinds)) for kind in kinds)
    source = GeneratorSource(Probes(seed, cfg.data.size, 64, mix), "probes")
    batches = Batches(Through(source, tokenizer), vocabulary, cfg)
    network = Network.of(cfg, vocabulary.size)
    tx, _ = make_optimizer(cfg.optimizer, steps)
    state = train_state.create(network.init(jax.random.key(seed)), tx, seed)
    step = compile_train_step(network, cfg, tx, state, batches.batch(0))
    for number, rows in enumerate(batches.iterate(0, steps), 1):
        state, metrics = step(state, rows)
        if number % 200 == 0:
            print(f"  step {number} of {steps}: {float(metrics['text_loss']):.3f}", file=sys.stderr, flush=True)
    return Trained(cfg, state.ema, vocabulary)


def asked(model: Trained, tokenizer, kinds: tuple[str, ...], count: int) -> dict[str, float]:
    """Share of right answers by kind, and of digits by size (`ocr 5`)."""
    result = {}
    for kind in kinds:
        source = Through(GeneratorSource(Probes(0, count, 64, ((kind, 1.0),), "test"), "probes"), tokenizer)
        documents = [source[i] for i in range(count)]
        answers = describe(model, [Document(*d.segments[:-1]) for d in documents], seed=0, max_tokens=12)
        right = np.array([a == d.extra["answer"] for a, d in zip(answers, documents, strict=True)])
        result[kind] = float(right.mean())
        if kind == "ocr":
            sizes = np.array([d.extra["size"] for d in documents])
            result |= {f"ocr {size}": float(right[sizes == size].mean()) for size in SIZES if (sizes == size).any()}
    return result


def table(records: list[dict]) -> str:
    """Markdown: front ends and readers by kind, mean over seeds (lowest to highest where there are several)."""
    names = list(dict.fromkeys(name for r in records for name in r["right"]))
    lines = [f"| front end | reader | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for front, kind in dict.fromkeys((r["front_end"], r["reader"]) for r in records):
        of = [r["right"] for r in records if (r["front_end"], r["reader"]) == (front, kind)]
        cells = []
        for name in names:
            values = [right[name] for right in of]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        lines.append(f"| {front} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tokenizers", nargs="*", type=Path, default=[], metavar="RUN", help="of images of 64 x 64")
    parser.add_argument("--kinds", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), metavar="KIND", help="%(choices)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=CONFIG.training.steps)
    parser.add_argument("--count", type=int, default=COUNT)
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    kept, kinds = arguments.workdir / "results.jsonl", tuple(arguments.kinds)
    records = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    tokenizers = {path.name: mmdiff.load_tokenizer(path) for path in arguments.tokenizers}
    for seed in range(arguments.seeds):
        done = {(r["front_end"], r["reader"]) for r in records if r["seed"] == seed}
        missing = [name for name in tokenizers if (name, "fixed") not in done]
        plain = reader(None, arguments.steps, seed, kinds) if (RAW, "anew") not in done or missing else None

        def keep(front: str, kind: str, model: Trained, tokenizer, seed=seed) -> None:
            right = asked(model, tokenizer, kinds, arguments.count)
            records.append({"front_end": front, "reader": kind, "seed": seed, "steps": arguments.steps, "right": right})
            with kept.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            told = ", ".join(f"{name} {share:.3f}" for name, share in right.items())
            print(f"{front}, {kind}, seed {seed}: {told}", file=sys.stderr, flush=True)

        if (RAW, "anew") not in done:
            keep(RAW, "anew", plain, None)
        for name in missing:
            keep(name, "fixed", plain, tokenizers[name])
        for name, tokenizer in tokenizers.items():
            if (name, "anew") not in done:
                keep(name, "anew", reader(tokenizer, arguments.steps, seed, kinds), tokenizer)
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
