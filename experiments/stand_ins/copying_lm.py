"""A small language model that can copy in context: what stands in for LLaMA where nobody has brought it.

    python experiments/stand_ins/copying_lm.py --out runs/stand_ins/copying_lm

FOLDER is read by `mmdiff.in_context.language.load_language` (and `mmdiff.pretrained.llama.load_llama`) like the real one. It
knows the captions of our generators, and by heart nothing about images: what it can do with prompts in the form of
mmdiff/in_context/prompts.py it can by having seen that form filled with random tokens. A language model of billions of words
has learnt that from its texts; without it, answers in context are noise and say nothing about the images.

    captions     descriptions of scenes and words (mmdiff/data/)                                 learnt: all of it
    repeats      random tokens, again and again                                                  from the second time on
    restoration  examples that are all corrupted copies of one (input, output), as there         the outputs
    mapping      a few (input, output) pairs, each several times, in any order                   outputs seen before
    classes      a name for each set of tokens; an example shows some of its set among others    names, after the first of each

    loss = mean cross entropy of the next token over what is learnt

It does not begin from nothing. What copying takes, heads that work into each other's hands, arises by itself after some
thousand steps in which nothing else is learnt; to save these minutes they are set by hand and trained on from there:

    (1) first layer    reads the position before, whatever stands there, and notes that token beside its own
    (2) second layer   reads where the noted token is its own: behind its earlier occurrences
    (3)                and adds the token that stands there to what it foretells
    (4) first layer    notes the mean of the last tokens, some twenty, without those of the form of prompts
    (5) second layer   notes that a colon stood two positions before
    (6) third layer    reads, of what stands behind "Output: ", most where the mean of (4) is like its own, as (3)

(1) to (3) are induction heads (Olsson et al., arXiv 2209.11895); (4) to (6) answer as examples like the question do.

Printed: how often the two tokens that belong to a given input are found in ten corrupted examples, and how often the right one
of two names, for prompts of random tokens that training has not shown; of this model, of what it began as, and of one without
these heads and without training.
"""

import argparse
import functools
import io
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmdiff.data.shapes import COLOURS, FORMS, SIZES, Shapes
from mmdiff.data.words import WORD_LIST, Words
from mmdiff.in_context import prompts
from mmdiff.in_context.few_shot import classify
from mmdiff.in_context.language import WORDS, Language, read_words
from mmdiff.in_context.prompts import Pair
from mmdiff.pretrained.llama import Llama
from mmdiff.pretrained.load import save_module

CONFIG = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
STEPS, TOKENS, LEARNING_RATE = 1000, 2048, 1e-3
COUNT = 2  # tokens of an output, as in restoration
KINDS = {"captions": 0.1, "repeats": 0.1, "restoration": 0.25, "mapping": 0.2, "classes": 0.35}
PHASES = ((0.6, 128), (1.0, 256))  # up to this share of the steps: length of a row
TESTED = 128


def sentences(count: int) -> list[str]:
    """Captions, and what a photo may be of: the words among which a subword finds its neighbours."""
    scenes, words = Shapes(0, count, max_objects=2, mix=(("draw", 1.0),)), Words(0, count // 4)
    told = [text for source in (scenes, words) for text in source.texts(count)]
    things = [f"{size} {colour} {form}" for size in SIZES for colour in COLOURS for form in FORMS]
    photos = [f"a photo of {start}{thing}" for thing in things for start in ("", "a ")]
    photos += [f"a photo of {' '.join(thing.split()[1:])}" for thing in things]
    return told + photos * max(1, count // 500)


def made_words(size: int, texts: list[str]) -> bytes:
    """A SentencePiece model with LLaMA's conventions: <unk>, <s>, </s>, the 256 bytes, then pieces."""
    import sentencepiece

    forms = [prompts.INPUT, prompts.OUTPUT, prompts.CLASSES, prompts.RESTORATION, prompts.CAPTION, prompts.QUESTION]
    lines = [line for text in [*texts, *forms * 50, *WORD_LIST] for line in text.split("\n") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=3,
    )
    return model.getvalue()


class Lessons:
    """Documents as ids and how much each of them is learnt."""

    def __init__(self, language: Language, texts: list[str], seed: int):
        self.language, self.rng = language, np.random.default_rng(seed)
        self.texts = [[*language.encode(text, bos=True), language.end] for text in texts]

    def tokens(self, *shape: int) -> np.ndarray:
        return self.rng.integers(3, self.language.size, shape)

    def one(self) -> tuple[list[int], list[float]]:
        match self.rng.choice(list(KINDS), p=list(KINDS.values())):
            case "captions":
                ids = self.texts[self.rng.integers(len(self.texts))]
                return ids, [1.0] * len(ids)
            case "repeats":
                ids, times = self.tokens(self.rng.integers(2, 16)).tolist(), self.rng.integers(3, 6)
                return ids * times, [0.0] * len(ids) + [1.0] * len(ids) * (times - 1)
            case "restoration":
                return self.filled(*self.restoration(self.rng.integers(3, 11)))
            case "mapping":
                return self.filled(*self.mapping())
            case _:
                return self.classes()

    def restoration(self, count: int) -> tuple[str, list[Pair], list[bool]]:
        """Corrupted copies of one pair; the last is left whole."""
        width = int(self.rng.choice([COUNT, COUNT, 4, 8]))
        whole, pairs = self.tokens(width + COUNT), []
        for rate in [*self.rng.uniform(0.1, 0.5, count), 0.0]:
            copy = np.where(self.rng.random(whole.shape) < rate, self.tokens(*whole.shape), whole)
            pairs.append(Pair(copy[:width].tolist(), copy[width:].tolist()))
        return prompts.RESTORATION.format(COUNT), pairs, [False] + [True] * count

    def mapping(self) -> tuple[str, list[Pair], list[bool]]:
        kinds, width = self.rng.integers(2, 5), int(self.rng.choice([2, 4]))
        known = [Pair(self.tokens(width).tolist(), self.tokens(COUNT).tolist()) for _ in range(kinds)]
        order = self.rng.permutation(np.repeat(np.arange(kinds), 3))
        seen = [i in order[:place] for place, i in enumerate(order)]
        return prompts.RESTORATION.format(COUNT), [known[i] for i in order], seen

    def filled(self, instruction: str, pairs: list[Pair], learnt: list[bool]) -> tuple[list[int], list[float]]:
        ids = self.language.encode(instruction, bos=True)
        weights = [0.05] * len(ids)
        before, between = self.language.encode(prompts.INPUT), self.language.encode(prompts.OUTPUT)
        for pair, counts in zip(pairs, learnt, strict=True):
            ids += [*before, *pair.given, *between, *pair.wanted]
            weights += (
                [0.05] * len(before) + [0.0] * len(pair.given) + [0.05] * len(between) + [float(counts)] * len(pair.wanted)
            )
        return ids, weights

    def episode(self, ways: int, shots: int) -> tuple[list[str], list[tuple[list[int], str]], list[int], str]:
        """Names, examples in any order, one more input and its name. Half of an input's tokens come from its class's set."""
        pool = WORD_LIST if self.rng.random() < 0.5 else (*COLOURS, *FORMS, *SIZES)
        names = [str(name) for name in self.rng.choice(pool, ways, replace=False)]
        size, length = int(self.rng.integers(3, 7)), int(self.rng.integers(6, 17))
        sets, common = [self.tokens(size) for _ in names], self.tokens(6)
        own = self.rng.uniform(0.3, 0.8)

        def shown(which: int) -> list[int]:
            other = np.where(self.rng.random(length) < 0.5, self.rng.choice(common, length), self.tokens(length))
            chosen = np.where(self.rng.random(length) < own, self.rng.choice(sets[which], length), other)
            return chosen.tolist()

        order = self.rng.permutation(np.repeat(np.arange(ways), shots))
        asked = int(self.rng.integers(ways))
        return names, [(shown(i), names[i]) for i in order], shown(asked), names[asked]

    def classes(self) -> tuple[list[int], list[float]]:
        ways = int(self.rng.integers(2, 4))
        names, examples, given, name = self.episode(ways, int(self.rng.integers(1, 5 - ways + 1)))
        told = "[" + " or ".join(f"'{name}'" for name in names) + "]"
        pairs = [Pair(given, self.language.encode(name)) for given, name in [*examples, (given, name)]]
        known = [name in [other for _, other in examples[:place]] for place, (_, name) in enumerate([*examples, (given, name)])]
        return self.filled(prompts.CLASSES.format(told), pairs, known)

    def rows(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents one behind the other, the last cut: int32 and float32 [count, length + 1]."""
        ids, weights = [], []
        for _ in range(count):
            row: list[int] = []
            weight: list[float] = []
            while len(row) < length + 1:
                more, learnt = self.one()
                row, weight = row + more, weight + learnt
            ids.append(row[: length + 1])
            weights.append(weight[: length + 1])
        return np.array(ids, np.int32), np.array(weights, np.float32)


def fresh(seed: int) -> Llama:
    """One that has learnt nothing."""
    rngs = nnx.Rngs(seed)
    model = Llama(CONFIG, rngs)
    model.embedding[...] = jax.random.normal(rngs.params(), model.embedding.shape) * CONFIG["hidden_size"] ** -0.5
    return model


def begun(seed: int, language: Language) -> Llama:
    """`fresh` with the heads of (1) to (6) in place.

    Of the width the first numbers are switches, and three slots follow: the token's own, that of the token before, and the
    mean of those lately read. Switches are on or off, never 0: all tokens shall be of one length, since a norm divides by it.
    """
    model, width, head = fresh(seed), CONFIG["hidden_size"], CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    # always on; is a token of the form, a colon, the bracket; behind a colon, behind the bracket; a colon two before
    one, form, colon, bracket, behind_colon, behind_bracket, output = range(SWITCHES := 7)
    rng, size, planes = np.random.default_rng(seed), (width - SWITCHES) // 3, head // 2
    own, before, lately = (slice(SWITCHES + i * size, SWITCHES + (i + 1) * size) for i in range(3))
    turn = CONFIG["rope_theta"] ** (-np.arange(planes) / planes)
    near, window, far = (np.flatnonzero((turn > a) & (turn < b)) for a, b in ((0.06, 2), (0.015, 0.09), (0, 2.5e-3)))
    places, gate = np.concatenate([far[:-1], planes + far[:-1]])[:size], far[-1]  # what turns least says something for itself
    like = np.linalg.qr(rng.normal(size=(size, size)))[0][:, : len(places)]
    before_input, before_output = language.encode(prompts.INPUT), language.encode(prompts.OUTPUT)  # both end in a space
    embedding = np.zeros(model.embedding.shape)
    embedding[:, one] = 2
    embedding[:, [form, colon, bracket]] = -0.5
    embedding[[*before_input, *before_output], form] = embedding[before_output[-2], colon] = 0.5
    embedding[before_input[-2], bracket] = 0.5
    embedding[:, own] = rng.normal(size=(len(embedding), size))
    embedding[:, own] /= np.linalg.norm(embedding[:, own], axis=-1, keepdims=True)
    model.embedding[...] = jnp.asarray(embedding, jnp.float32)
    for number, each in enumerate(model.layers):
        parts = {name: 0.05 * np.asarray(getattr(each, name).kernel[...]) for name in ("q", "k", "v", "out", "down")}
        q, k, v, out = (parts[name] for name in ("q", "k", "v", "out"))

        def cleared(which: int, q=q, k=k, v=v, out=out) -> int:
            """Where the numbers of a head begin."""
            start = which * head
            for matrix in (q.T, k.T, v.T, out):
                matrix[start : start + head] = 0
            return start

        def carry(start: int, what: slice | int, into: slice | int, strength: float, at: int = 0, v=v, out=out) -> None:
            """From one place of the width to another, through the numbers of a head from `at` on."""
            what, into = (np.r_[place] for place in (what, into))
            through = start + at + np.arange(len(what))
            v[what, through], out[through, into] = 1, strength

        def back(start: int, which: np.ndarray, by: int, strength: float, q=q, k=k) -> None:
            """Read `by` positions before: q is k turned on."""
            q[one, start + which] = strength * np.cos(by * turn[which])
            q[one, start + planes + which] = -strength * np.sin(by * turn[which])
            k[one, start + which] = strength

        if number == 0:
            start = cleared(0)  # (1)
            back(start, near, 1, 1)
            carry(start, own, before, 0.21)
            carry(start, colon, behind_colon, 0.21, at=size)
            carry(start, bracket, behind_bracket, 0.21, at=size + 1)
            start = cleared(1)  # (4)
            back(start, window, 11, 0.35)
            q[one, start + gate], k[form, start + gate] = 3, -3
            carry(start, own, lately, 0.7)
        if number == 1:
            start = cleared(0)  # (2) and (3)
            q[own, start + places], k[before, start + places] = 3 * like, 3 * like
            carry(start, own, own, 0.45)
            start = cleared(1)  # (5)
            back(start, near, 1, 1.5)
            carry(start, behind_colon, output, 0.16)
        if number == 2:
            start = cleared(1)  # (6); two behind a colon is also what stands behind the bracket, where an input begins
            q[lately, start + places], k[lately, start + places] = 3 * like, 3 * like
            q[one, start + gate], k[output, start + gate], k[behind_bracket, start + gate] = 4, 4, -4
            carry(start, own, own, 0.45)
        for name, values in parts.items():
            getattr(each, name).kernel[...] = jnp.asarray(values, jnp.float32)
    return model


def trained(model: Llama, lessons: Lessons, steps: int) -> Llama:
    graph, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, min(100, steps // 4), steps, LEARNING_RATE / 20)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    def loss_of(params, ids, weights):
        model = nnx.merge(graph, params)
        logits = model.logits(model(model.embed(ids[:, :-1]))[0])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return (nats * weights[:, 1:]).sum() / jnp.maximum(weights[:, 1:].sum(), 1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, ids, weights):
        value, grads = jax.value_and_grad(loss_of)(params, ids, weights)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, started = tx.init(params), time.monotonic()
    for number in range(1, steps + 1):
        length = next(length for share, length in PHASES if number <= share * steps)
        params, opt_state, value = step(params, opt_state, *lessons.rows(TOKENS // length, length))
        if number % 50 == 0:
            print(
                f"step {number} of {steps}: {float(value):.3f}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
            )
    return nnx.merge(graph, params)


def copied(language: Language, count: int, seed: int) -> float:
    """Share of tokens found again in ten corrupted examples."""
    lessons = Lessons(language, [], seed)
    asked, wanted = [], []
    for _ in range(count):
        instruction, pairs, _ = lessons.restoration(10)
        asked.append(prompts.paired(language, instruction, pairs[:-1], pairs[-1].given))
        wanted.append(pairs[-1].wanted)
    return float((language.greedy(asked, COUNT) == np.array(wanted)).mean())


def named(language: Language, count: int, seed: int) -> float:
    """Share of right names of two, two examples of each."""
    lessons = Lessons(language, [], seed)
    asked, names, wanted = [], [], []
    for _ in range(count):
        choice, examples, given, name = lessons.episode(2, 2)
        told = "[" + " or ".join(f"'{name}'" for name in choice) + "]"
        pairs = [Pair(ids, language.encode(each)) for ids, each in examples]
        asked.append(prompts.paired(language, prompts.CLASSES.format(told), pairs, given))
        names.append(choice)
        wanted.append(name)
    return float(np.mean([a == b for a, b in zip(classify(language, asked, names), wanted, strict=True)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} must be at least 1.")
    texts = sentences(5000)
    words = made_words(CONFIG["vocab_size"], texts)
    untrained = Language(fresh(arguments.seed), read_words(words, WORDS))
    at_first = Language(begun(arguments.seed, untrained), untrained.processor)
    model = trained(begun(arguments.seed, untrained), Lessons(untrained, texts, arguments.seed), arguments.steps)
    save_module(model, arguments.out, CONFIG)
    (arguments.out / WORDS).write_bytes(words)
    of = {"trained": Language(model, untrained.processor), "as it began": at_first, "untrained": untrained}
    for name, language in of.items():
        found = copied(language, TESTED, arguments.seed + 1), named(language, TESTED, arguments.seed + 2)
        print(f"{name}: {found[0]:.3f} of tokens copied, {found[1]:.3f} of names right (chance 0.5): {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
