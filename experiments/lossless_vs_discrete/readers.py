"""E4: what can still be read from an image after a tokenizer? Readers of the probes, one of its own for each front end.

    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:vq_64 --workdir runs/tokenizers/vq_64
    python experiments/lossless_vs_discrete/readers.py --workdir runs/lossless/readers --tokenizers runs/tokenizers/vq_64

A reader is a small convolutional network on pixels that answers questions about fine detail (mmdiff/data/probes.py), sign by
sign: it asks what an image still shows, not how well some model of sequences learns to see. For each tokenizer there are two:
`fixed`, trained on untouched images; and `own`, which goes on from there for as many steps with images that have gone through
the tokenizer, so that nothing it sees is unfamiliar. Both are asked about held-out images that have gone through it. What the
second cannot answer is no longer there for a reader of this size; what only the first cannot is there in another form. That of
raw patches goes on for as many steps, too.

Claims: the reader of raw patches reads digits of the largest size right more than 99 times in 100, so that it is the front end
that is measured; on no kind does a reader behind a tokenizer beat it by more than two standard errors; small digits, the odd
pixel and exact colours suffer most. A kind on which a tokenizer did beat it would refute the second.

`--words FOLDER` adds photographed words (photographed.py): which sign does one begin with? `--kinds ocr` alone trains and asks
a reader of digits, within minutes.

Every reader is trained for each seed; what is finished is kept in WORKDIR/results.jsonl, and the same command goes on from
there.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import photographed
from flax import nnx

import mmdiff
from mmdiff.data.probes import QUESTIONS, SIZES, Probes
from mmdiff.document import Document

RAW = "raw patches"
SIDE, EXAMPLES, BATCH, LEARNING_RATE = 64, 8000, 64, 2e-3
WINDOW, MOST = 28, 40  # pixels of the window; more things than this are not counted
CLEAR, FAINT = 16.0, 0.02  # what outline, number and bits weigh beside levels in [-1, 1]; a contrast that says nothing
COUNT = 300  # held-out questions of each kind, and of digits of each size
KINDS = (*QUESTIONS, photographed.KIND)
STEPS = {
    ("ocr",): 100,
    ("count",): 100,
    ("spot", "same"): 100,
    ("colour",): 200,
    ("odd",): 200,
    ("clock",): 250,
    (photographed.KIND,): 350,
}
"""Kinds that one network learns, and for how long."""
SIGNS = f" {photographed.SIGNS}:"
LONGEST = 6  # signs of an answer that are read: enough to tell them apart
AT_ONCE = 250  # images that a tokenizer takes


class Examples(NamedTuple):
    images: np.ndarray  # uint8 [n, 2, 64, 64, 3]; one image twice where there is but one
    ground: np.ndarray  # float32 [n, 3]; median levels of the first, found once: sorting takes as long as a step
    kind: np.ndarray  # int32 [n]; number in KINDS
    answer: np.ndarray  # int32 [n, LONGEST]; numbers in SIGNS
    size: np.ndarray  # int32 [n]; of digits, else 0


def examples(documents: Sequence[Document], tokenizer=None) -> Examples:
    """What `documents` ask, their images sent through a tokenizer (None: as they are)."""
    images = [image.pixels for document in documents for image in document.images]
    if tokenizer is not None:
        parts = [np.asarray(tokenizer.reconstruct(images[i : i + AT_ONCE])) for i in range(0, len(images), AT_ONCE)]
        images = [image for part in parts for image in part]
    given = iter(images)
    pairs = [([next(given) for _ in document.images] * 2)[:2] for document in documents]
    shown = np.array(pairs)
    return Examples(
        shown,
        np.array([np.median(first, axis=(0, 1)) for first in shown[:, 0]], np.float32),
        np.array([KINDS.index(d.extra["kind"]) for d in documents], np.int32),
        np.array([[SIGNS.index(sign) for sign in written(d.extra["answer"])] for d in documents], np.int32),
        np.array([d.extra.get("size", 0) for d in documents], np.int32),
    )


def written(answer: str) -> str:
    """Of a length; of words the first sign."""
    answer = answer[0] if answer in ("same", "different") else answer
    return f"{answer:<{LONGEST}}"


class Reader(nnx.Module):
    """Images uint8 [n, 2, 64, 64, 3] and ground [n, 3] to the logits of the signs of an answer, [n, LONGEST, signs].

    Convolutions to 8 x 8 places see the levels of the first image, how far each pixel is from the ground, which is the median,
    and how far the second image is from the first. Beside them stand what strides would lose, of whatever stands out: which
    rows and columns it takes, itself in one size, how many things it is, and the bits of the pixel in its middle, without which
    no network of this size would tell 2^24 colours apart. So little is left to learn that each tokenizer can have its own.
    """

    def __init__(self, width: int, rngs: nnx.Rngs):
        conv = lambda a, b, size, stride: nnx.Conv(a * width, b * width, (size, size), strides=stride, rngs=rngs)
        self.enter = nnx.Conv(7, 2 * width, (4, 4), strides=4, rngs=rngs)
        self.convs = nnx.List([conv(2, 2, 3, 1), conv(2, 4, 3, 2), conv(4, 4, 3, 1), conv(4, 4, 3, 1)])
        self.norms = nnx.List([nnx.GroupNorm(each.out_features, num_groups=8, rngs=rngs) for each in self.convs])
        self.narrow = nnx.Linear(4 * width, 32, rngs=rngs)
        self.mixed = nnx.Linear(64 * 32 + 8 * width + WINDOW**2 + MOST + 8 * (SIDE + 1) + 1 + 24, 256, rngs=rngs)
        self.answer = nnx.Linear(256, len(KINDS) * LONGEST * len(SIGNS), rngs=rngs)

    def __call__(self, images: jax.Array, ground: jax.Array, kind: jax.Array) -> jax.Array:
        count = len(images)
        levels = images.astype(jnp.float32) / 127.5 - 1
        first, apart = levels[:, 0], jnp.abs(levels[:, 1] - levels[:, 0])
        figure, changed = first - (ground / 127.5 - 1)[:, None, None], apart.sum(-1)
        figure = jnp.sqrt(jnp.square(figure).sum(-1))
        x = nnx.relu(self.enter(jnp.concatenate([first, figure[..., None], apart], -1)))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            made = nnx.relu(norm(conv(x)))
            x = x + made if made.shape == x.shape else made
        edges = [CLEAR * jax.nn.one_hot(at, SIDE + 1) for shown in (figure, changed) for at in outline(shown)]
        seen, middle = window(figure, images[:, 0])
        bits = (middle[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
        things = CLEAR * jax.nn.one_hot(number(figure), MOST)
        clear = (seen, things, *edges, changed.max((1, 2)), CLEAR * (bits.astype(jnp.float32) - 0.5))
        parts = nnx.relu(self.narrow(x)), x.max((1, 2)), x.mean((1, 2)), *clear
        x = nnx.relu(self.mixed(jnp.concatenate([part.reshape(count, -1) for part in parts], -1)))
        every = self.answer(x).reshape(count, len(KINDS), LONGEST, len(SIGNS))
        return jnp.take_along_axis(every, kind[:, None, None, None], axis=1)[:, 0]


def strong(shown: jax.Array) -> jax.Array:
    """Which pixels of [n, h, w] reach half the strongest."""
    return shown > 0.5 * jnp.maximum(shown.max((1, 2), keepdims=True), FAINT)


def number(shown: jax.Array) -> jax.Array:
    """How many things stand out, less the holes in them, int32 [n]: Euler's number, from quads (Gray, 1971)."""
    there = jnp.pad(strong(shown).astype(jnp.int32), ((0, 0), (1, 1), (1, 1)))
    a, b, c, d = there[:, 1:, 1:], there[:, 1:, :-1], there[:, :-1, 1:], there[:, :-1, :-1]
    filled, crossed = a + b + c + d, (a == d) & (b == c) & (a != b)
    return ((filled == 1).sum((1, 2)) - (filled == 3).sum((1, 2)) - 2 * crossed.sum((1, 2))) // 4


def outline(shown: jax.Array) -> tuple[jax.Array, ...]:
    """The rows, from the first to before the last, and columns of [n, h, w] that reach half its strongest: four int32 [n]."""
    there = strong(shown)
    lines = there.any(2), there.any(1)
    return tuple(at for line in lines for at in (line.argmax(-1), line.shape[-1] - line[:, ::-1].argmax(-1)))


def window(figure: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What stands out, in one size: `figure` [n, h, w] within its outline as float [n, WINDOW, WINDOW], and the pixel of images
    uint8 [n, h, w, 3] in its middle, [n, 3]."""
    top, bottom, left, right = outline(figure)

    def weights(begin: jax.Array, end: jax.Array, count: int) -> jax.Array:
        at = begin[:, None] + (end - begin)[:, None] * (jnp.arange(WINDOW) + 0.5) / WINDOW - 0.5
        near = nnx.relu(1 - jnp.abs(at[..., None] - jnp.arange(count)))
        return near / jnp.maximum(near.sum(-1, keepdims=True), FAINT)

    height, width = figure.shape[1:]
    seen = jnp.einsum("nry,nyx,ncx->nrc", weights(top, bottom, height), figure, weights(left, right, width))
    seen = seen / jnp.maximum(figure.max((1, 2)), FAINT)[:, None, None]
    return seen, images[jnp.arange(len(images)), (top + bottom) // 2, (left + right) // 2]


WIDTH = 16
GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Reader(WIDTH, nnx.Rngs(0))))


def optimiser(steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_onecycle_schedule(steps, LEARNING_RATE), weight_decay=0.05)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames=("params", "opt_state"))
def step(steps: int, params, opt_state, data: Examples):
    """One of `steps`."""

    def loss(params):
        logits = nnx.merge(GRAPH, params)(data.images, data.ground, data.kind)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.answer).sum(-1).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimiser(steps).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def trained(data: Examples, steps: int, seed: int, begin: nnx.State | None = None) -> nnx.State:
    """A reader of `data`, which goes on from `begin`."""
    params = nnx.state(Reader(WIDTH, nnx.Rngs(seed))) if begin is None else begin
    opt_state, rng = optimiser(steps).init(params), np.random.default_rng([seed, begin is not None])
    for _ in range(steps):
        pick = rng.integers(0, len(data.kind), BATCH)
        params, opt_state, _ = step(steps, params, opt_state, Examples(*(part[pick] for part in data)))
    return params


@jax.jit
def read(params: nnx.State, data: Examples) -> jax.Array:
    return nnx.merge(GRAPH, params)(data.images, data.ground, data.kind).argmax(-1)


def asked(params: nnx.State, data: Examples) -> dict[str, float]:
    """Share of right answers by kind, and of digits by size (`ocr 5`)."""
    parts = range(0, len(data.kind), AT_ONCE)
    found = [np.asarray(read(params, Examples(*(part[i : i + AT_ONCE] for part in data)))) for i in parts]
    right, result = (np.concatenate(found) == data.answer).all(-1), {}
    for number, kind in enumerate(KINDS):
        if (data.kind == number).any():
            result[kind] = float(right[data.kind == number].mean())
        if kind == "ocr":
            result |= {f"ocr {size}": float(right[data.size == size].mean()) for size in SIZES if (data.size == size).any()}
    return result


def held_out(kinds: Sequence[str], count: int) -> list[Document]:
    """`count` questions of each kind, and of digits of each size."""
    found = []
    for kind in kinds:
        number = count * len(SIZES) if kind == "ocr" else count
        source = Probes(0, number, SIDE, ((kind, 1.0),), "test")
        found += [source[i] for i in range(number)]
    return found


def once(path: Path, make: Callable[[], nnx.State]) -> nnx.State:
    """What `make` gives, kept in `path`."""
    structure = jax.tree.structure(nnx.state(nnx.eval_shape(lambda: Reader(WIDTH, nnx.Rngs(0)))))
    if not path.is_file():
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, *map(np.asarray, jax.tree.leaves(make())))
        unfinished.replace(path)
    with np.load(path) as file:
        return jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])


def table(records: list[dict]) -> str:
    """Markdown, questions by front ends: the share of right answers of its own reader, mean over seeds (lowest to highest where
    there are several), then of the fixed one."""
    fronts = list(dict.fromkeys(r["front_end"] for r in records))
    lines = [f"| question | {' | '.join(fronts)} |", "| --- " * (1 + len(fronts)) + "|"]
    questions = dict.fromkeys(name for r in records for name in r["right"])
    for question in sorted(questions, key=lambda name: KINDS.index(name.split()[0])):
        cells = []
        for front in fronts:
            of = lambda reader, front=front, question=question: [
                r["right"][question]
                for r in records
                if (r["front_end"], r["reader"]) == (front, reader) and question in r["right"]
            ]
            own, fixed = of("own"), of("fixed")
            spread = f" ({min(own):.3f} to {max(own):.3f})" if len(own) > 1 else ""
            cells.append((f"{np.mean(own):.3f}{spread}" if own else "") + (f", fixed {np.mean(fixed):.3f}" if fixed else ""))
        lines.append(f"| {question} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tokenizers", nargs="*", type=Path, default=[], metavar="RUN", help="of images of 64 x 64")
    parser.add_argument("--words", type=Path, metavar="FOLDER", help="photographed words")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help="%(choices)s (default: all there are)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each network (default: 100 to 350, by kind)")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="for each network (default: %(default)s)")
    parser.add_argument("--count", type=int, default=COUNT, help="questions of each generated kind (default: %(default)s)")
    arguments = parser.parse_args()
    chosen = arguments.kinds or (KINDS if arguments.words else tuple(QUESTIONS))
    if photographed.KIND in chosen and not arguments.words:
        parser.error(f"--kinds {photographed.KIND} needs --words FOLDER")
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    kept = arguments.workdir / "results.jsonl"
    records = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    how_long = lambda kinds: arguments.steps or next(steps for group, steps in STEPS.items() if kinds[0] in group)
    settings = lambda kinds: {"steps": how_long(kinds), "examples": arguments.examples, "count": arguments.count}
    records = [r for r in records if r | settings(r["kinds"]) == r]  # of other settings: not asked for now
    done = {(r["front_end"], r["reader"], r["seed"], tuple(r["kinds"])) for r in records}
    for kinds in STEPS:
        kinds = tuple(kind for kind in kinds if kind in chosen)
        fronts = [(RAW, None), *((path.name, path) for path in arguments.tokenizers)]
        seeds = range(arguments.seeds)
        wanted = [(name, path, r, s) for name, path in fronts for r in ("fixed", "own") for s in seeds]
        wanted = [(name, path, r, s) for name, path, r, s in wanted if (name, r, s, kinds) not in done]
        if not kinds or not wanted:
            continue
        if kinds == (photographed.KIND,):
            learnt, questions = (
                photographed.examples(arguments.words, arguments.examples),
                photographed.held_out(arguments.words),
            )
        else:
            source = Probes(0, arguments.examples, SIDE, tuple((kind, 1 / len(kinds)) for kind in kinds))
            learnt, questions = [source[i] for i in range(len(source))], held_out(kinds, arguments.count)
        raw = data = examples(learnt)
        test, of = examples(questions), RAW
        for name, path, reader, seed in wanted:
            if name != of:
                tokenizer = mmdiff.load_tokenizer(path)
                of, data, test = name, examples(learnt, tokenizer), examples(questions, tokenizer)
            steps = how_long(kinds)
            file = lambda of, kinds=kinds, steps=steps, seed=seed: (
                arguments.workdir / f"{of}-{'-'.join(kinds)}-{steps}-{arguments.examples}-{seed}.npz"
            )
            params = once(file("fixed"), functools.partial(trained, raw, steps, seed))
            if reader == "own":
                params = once(file(f"own-{name.replace(' ', '_')}"), functools.partial(trained, data, steps, seed, params))
            right = asked(params, test)
            record = {"front_end": name, "reader": reader, "seed": seed, "kinds": kinds} | settings(kinds)
            records.append(record | {"right": right})
            with kept.open("a") as lines:
                lines.write(json.dumps(records[-1]) + "\n")
            told = ", ".join(f"{kind} {share:.3f}" for kind, share in right.items())
            print(f"{name}, {reader}, seed {seed}: {told}", file=sys.stderr, flush=True)
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
