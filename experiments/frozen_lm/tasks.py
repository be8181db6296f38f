"""E7: what does a frozen language model, which has seen no image, do with an image's tokens? And what would no model do?

    python experiments/stand_ins/two_tower.py --out runs/stand_ins/two_tower
    python experiments/stand_ins/copying_lm.py --out runs/stand_ins/copying_lm
    python experiments/frozen_lm/words.py --language runs/stand_ins/copying_lm --towers runs/stand_ins/two_tower \\
        --out runs/v2l/words.safetensors
    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:v2l --workdir runs/tokenizers/v2l
    python experiments/frozen_lm/tasks.py --language runs/stand_ins/copying_lm --words runs/v2l/words.safetensors \\
        --tokenizer runs/tokenizers/v2l --workdir runs/frozen_lm

Restoration (mmdiff/in_context/restoration.py): share of the tokens to be written that are right, under the published protocol,
whose examples are corrupted copies of the answer, and under one whose examples are other images; each beside a plurality vote
of the same examples, without any model. Context is one row of the grid, as published.

Classification: N classes by colour or form, K examples of each from scenes that the tokenizer was trained on, one question
about a scene that it was not; the image is its first words (mmdiff/in_context/few_shot.py). Classes bear their own names, as
published, or other ones that no image of the prompt is described with: words may say "red" themselves, and then whatever
repeats what it reads is right, a network that has learnt nothing included, if its output is tied to its input. Beside it,
without any model, the class whose examples share most tokens with the question (of several, one at random). Intervals hold 95%
of bootstrap samples. Captions and questions: four examples, and what copying the caption, or the most frequent answer, of
the examples would give. Masked restoration: LoRA additions learn to write 30% of an image's tokens; beside them the most
frequent token of each place, and the token shown before.

All of it also with a model of the same sizes whose parameters have been shuffled, each matrix within itself: it has learnt
nothing, and is what every figure must be compared with.

Claims: (1) under the published protocol the vote alone is right in at least 0.99 of tokens, so that figures got with it say
nothing about images: wrong if the vote is below. (2) The language model does not beat the vote there: wrong if it does by more
than two standard errors. (3) With other names it classifies above chance, the shuffled one does not: wrong if chance lies
inside the interval of the first or below that of the second. (4) Under the protocol without the answer it does not beat that
protocol's vote by more than two standard errors; if it does, it uses context beyond copying.

What is finished is kept in WORKDIR/results.jsonl, and the same command goes on from there.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import mmdiff
from mmdiff.config import ConfigError, require
from mmdiff.data.shapes import COLOURS, FORMS, Scene, Shapes
from mmdiff.data.shapes_reader import score_caption
from mmdiff.document import DataError, Document
from mmdiff.evaluation.reconstruction import peak_ratio
from mmdiff.in_context import lora, prompts, restoration
from mmdiff.in_context.few_shot import classify, interval
from mmdiff.in_context.language import Language, load_language
from mmdiff.tokenizers.v2l.words import Words, read_words

CLASSES = {"colour": tuple(COLOURS), "form": FORMS}
EPISODES = [
    (attribute, ways, shots, naming)
    for attribute, ways, shots in (("colour", 2, 1), ("colour", 2, 2), ("form", 2, 2), ("colour", 3, 1))
    for naming in ("own", "other")
]
TRAINED, CONTROL, SHARED = "trained", "shuffled", "shared tokens"
SHOTS, ANSWER, CAPTION = 4, 6, 40  # of captions and questions: examples, tokens
POOL = 400  # scenes that examples are drawn from


class Setting(NamedTuple):
    tokenizer: Any
    words: Words
    languages: dict[str, Language]
    images: int
    episodes: int
    shown: int
    lora_steps: int
    seed: int

    def codes(self, documents: list[Document]) -> np.ndarray:
        return self.tokenizer.encode([document.images[0].pixels for document in documents])

    def local(self, images: list[np.ndarray]) -> np.ndarray:
        return self.tokenizer.encode(images)[:, self.tokenizer.network.global_tokens :]

    def spelt(self, codes: np.ndarray) -> list[list[str]]:
        """First words of images, of their codes."""
        own = codes[:, : self.tokenizer.network.global_tokens][:, : self.shown] - len(self.words.local_words)
        return [[self.words.global_words[i] for i in row] for row in own]

    @property
    def grid(self) -> tuple[int, int]:
        return self.tokenizer.network.grid


def shuffled(language: Language, seed: int) -> Language:
    """The same numbers in every matrix, in any order."""
    rng = np.random.default_rng(seed)
    mixed = lambda a: rng.permutation(np.asarray(a).reshape(-1)).reshape(a.shape)
    return language.replaced(jax.tree.map(mixed, language.params))


def scenes(count: int, split: str, seed: int, most: int = 2, kind: str = "draw") -> list[Document]:
    source = Shapes(seed, count, max_objects=most, mix=((kind, 1.0),), split=split)
    return [source[i] for i in range(count)]


def restore(setting: Setting, task: restoration.Task, leak: bool, name: str) -> dict[str, Any]:
    """One row: a task under one protocol, by one language model (or "vote")."""
    pixels = np.stack([document.images[0].pixels for document in scenes(setting.images, "test", setting.seed)])
    other = restoration.changed(task, pixels)
    tokens = setting.tokenizer.encode(list(pixels))
    whole = setting.tokenizer.network.global_tokens
    clean, given = tokens[:, whole:], setting.local(list(other))
    rng, size = np.random.default_rng(setting.seed), len(setting.words.local_words)
    examples = []
    for image in range(len(clean)):
        chosen: Any = image
        if not leak:
            rest = np.delete(np.arange(len(clean)), image)
            chosen = rng.choice(rest, len(restoration.RATES), replace=False)
        examples.append(restoration.corrupted(clean[chosen], given[chosen], size, rng, others=whole))
    if name == "vote":
        found = restoration.voted(task, given, setting.grid, examples, size)
    else:
        found = restoration.restored(setting.languages[name], task, given, setting.grid, examples, before=setting.grid[1])
    right = restoration.accuracy(task, setting.grid, found, clean)
    written = np.concatenate([tokens[:, :whole], np.where(found < size, found, 0)], axis=1)
    made = setting.tokenizer.decode(written)
    psnr = [peak_ratio(a, b) for a, b in zip(pixels, made, strict=True)]
    return {
        "accuracy": float(right.mean()),
        "error": float(right.std(ddof=1) / np.sqrt(len(right))),
        "psnr": float(np.mean(psnr)),
        "images": len(right),
    }


def class_of(attribute: str, scene: Scene) -> str:
    return getattr(scene[0], attribute)


def other_names(language: Language, avoided: str) -> list[str]:
    """Words of one token each that do not stand in `avoided`."""
    told = [language.processor.id_to_piece(i) for i in range(language.processor.get_piece_size())]
    found = [piece[1:] for piece in told if piece.startswith("\u2581") and piece[1:].isalpha() and len(piece) > 3]
    return [word for word in found if word not in avoided and len(language.encode(word)) == 1]


def most_shared(language: Language, names: list[str], examples: list[tuple[list[str], str]], given: list[str], rng) -> str:
    """The name whose examples have most tokens in common with the question's."""
    tokens = lambda words: set(prompts.image_words(language, words))
    score = [sum(len(tokens(words) & tokens(given)) for words, other in examples if other == name) for name in names]
    return str(rng.choice([name for name, one in zip(names, score, strict=True) if one == max(score)]))


def few_shot(setting: Setting, attribute: str, ways: int, shots: int, naming: str, name: str) -> dict[str, Any]:
    """`name`: of a language model, or SHARED."""
    language, rng = setting.languages.get(name, setting.languages[TRAINED]), np.random.default_rng(setting.seed)
    known, unseen = scenes(POOL, "train", setting.seed, 1), scenes(POOL, "test", setting.seed, 1)
    spelt = {which: setting.spelt(setting.codes(pool)) for which, pool in (("known", known), ("unseen", unseen))}
    by_class = lambda pool, value: [i for i, d in enumerate(pool) if class_of(attribute, d.extra["scene"]) == value]
    of_known = {value: by_class(known, value) for value in CLASSES[attribute]}
    of_unseen = {value: by_class(unseen, value) for value in CLASSES[attribute]}
    askable = [value for value in CLASSES[attribute] if of_unseen[value] and len(of_known[value]) >= shots]
    asked: list[tuple[list[str], list[tuple[list[str], str]], list[str]]] = []
    wanted = []
    for _ in range(setting.episodes):
        chosen = [str(value) for value in rng.choice(askable, ways, replace=False)]
        pairs = [(spelt["known"][i], value) for value in chosen for i in rng.choice(of_known[value], shots, replace=False)]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        right = chosen[rng.integers(ways)]
        given = spelt["unseen"][rng.choice(of_unseen[right])]
        called = {value: value for value in chosen}
        if naming == "other":
            free = other_names(language, " ".join([*given, *(word for words, _ in pairs for word in words)]))
            require(
                len(free) >= ways, f"the language model has {len(free)} words that could be other names, and {ways} are needed."
            )
            called = dict(zip(chosen, map(str, rng.choice(free, ways, replace=False)), strict=True))
        asked.append(([called[value] for value in chosen], [(words, called[value]) for words, value in pairs], given))
        wanted.append(called[right])
    if name == SHARED:
        found = [most_shared(language, *one, rng) for one in asked]
    else:
        found = classify(language, [prompts.classification(language, *one) for one in asked], [names for names, _, _ in asked])
    share, low, high = interval([a == b for a, b in zip(found, wanted, strict=True)])
    none = float(np.mean([answer is None for answer in found]))
    return {"accuracy": share, "low": low, "high": high, "chance": 1 / ways, "none": none, "episodes": len(found)}


def until_stop(language: Language, ids: np.ndarray) -> str:
    """What stands before the first full stop or line end."""
    text = language.decode([i for i in ids if i != language.end])
    return text.split("\n")[0].split(".")[0].strip()


def captions(setting: Setting, name: str) -> dict[str, Any]:
    language, rng = setting.languages[name], np.random.default_rng(setting.seed)
    known, unseen = scenes(POOL, "train", setting.seed, 1), scenes(setting.images, "test", setting.seed, 1)
    spelt, of_unseen = setting.spelt(setting.codes(known)), setting.spelt(setting.codes(unseen))
    drawn = [rng.choice(len(known), SHOTS, replace=False) for _ in unseen]
    asked = [
        prompts.caption(language, [(spelt[i], known[i].texts[0]) for i in chosen], given)
        for chosen, given in zip(drawn, of_unseen, strict=True)
    ]
    found = [until_stop(language, ids) for ids in language.greedy(asked, CAPTION)]
    score = [score_caption(text, d.extra["scene"]) for text, d in zip(found, unseen, strict=True)]
    copied = [
        np.mean([score_caption(known[i].texts[0], d.extra["scene"]) for i in c]) for c, d in zip(drawn, unseen, strict=True)
    ]
    return {"accuracy": float(np.mean(score)), "copied": float(np.mean(copied)), "images": len(score), "example": found[0]}


def questions(setting: Setting, name: str) -> dict[str, Any]:
    language, rng = setting.languages[name], np.random.default_rng(setting.seed)
    known = scenes(POOL, "train", setting.seed, 1, "question")
    unseen = scenes(setting.images, "test", setting.seed, 1, "question")
    spelt, of_unseen = setting.spelt(setting.codes(known)), setting.spelt(setting.codes(unseen))
    asked, votes = [], []
    for given, document in zip(of_unseen, unseen, strict=True):
        first = document.extra["question"].split()[:2]  # of the same kind, as far as two words say
        alike = [i for i, d in enumerate(known) if d.extra["question"].split()[:2] == first]
        chosen = rng.choice(alike, min(SHOTS, len(alike)), replace=False)
        told = [(spelt[i], known[i].extra["question"], known[i].extra["answer"]) for i in chosen]
        asked.append(prompts.question(language, told, given, document.extra["question"]))
        answers = [answer for _, _, answer in told]
        votes.append(max(answers, key=answers.count))
    found = [until_stop(language, ids) for ids in language.greedy(asked, ANSWER)]
    right = [document.extra["answer"] for document in unseen]
    share = lambda given: float(np.mean([a == b for a, b in zip(given, right, strict=True)]))
    return {"accuracy": share(found), "vote": share(votes), "images": len(found)}


def masked(setting: Setting, name: str) -> dict[str, Any]:
    """By the language model as it is and with LoRA, by the most frequent token of each place, by the last token shown."""
    local = lambda documents: setting.codes(documents)[:, setting.tokenizer.network.global_tokens :]
    seen, unseen = local(scenes(4 * POOL, "train", setting.seed)), local(scenes(setting.images, "test", setting.seed))
    language = setting.languages[name]
    holes = np.random.default_rng(setting.seed).random(unseen.shape) < lora.MASKED
    told = lambda step, loss: (
        print(f"LoRA, {name}, step {step} of {setting.lora_steps}: {loss:.3f}", file=sys.stderr) if step % 50 == 0 else None
    )
    additions = lora.trained(language, seen, steps=setting.lora_steps, key=jax.random.key(setting.seed), progress=told)
    taught = language.replaced(lora.added(language.params, additions))
    frequent = np.array([np.bincount(place).argmax() for place in seen.T])
    share = lambda found: float((found == unseen)[holes].mean())
    return {
        "accuracy": share(lora.filled(taught, unseen, holes)),
        "frozen": share(lora.filled(language, unseen, holes)),
        "frequent": share(np.broadcast_to(frequent, unseen.shape)),
        "repeated": share(repeated(unseen, holes)),
        "tokens": int(holes.sum()),
    }


def repeated(tokens: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Tokens [n, l], in holes the last one before that is none; -1 where there is none before."""
    last = np.maximum.accumulate(np.where(holes, 0, np.arange(tokens.shape[1])), axis=1)
    return np.take_along_axis(np.where(holes, -1, tokens), last, axis=1)


def kind(attribute: str, ways: int, shots: int, naming: str) -> str:
    return f"{attribute}, {ways} ways, {shots} shots, {naming} names"


def experiments(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for task in restoration.TASKS:
        for protocol, leak in (("faithful", True), ("no leak", False)):
            for who in ("vote", TRAINED, *([CONTROL] if leak else [])):
                found[f"{task} / {protocol} / {who}"] = lambda t=task, k=leak, w=who: restore(setting, t, k, w)
    for episode in EPISODES:
        for who in (TRAINED, CONTROL, SHARED):
            found[f"{kind(*episode)} / {who}"] = lambda e=episode, w=who: few_shot(setting, *e, w)
    for what, function in (("captions", captions), ("questions", questions), ("masked", masked)):
        for who in (TRAINED, CONTROL):
            found[f"{what} / {who}"] = lambda f=function, w=who: f(setting, w)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """What of `found` is there, as Markdown."""
    number = lambda name, key="accuracy": format(found[name][key], ".3f") if name in found else ""
    lines = ["| restoration | vote, faithful | model, faithful | shuffled, faithful | vote, no leak | model, no leak |"]
    lines.append("| --- " * 6 + "|")
    for task in restoration.TASKS:
        cells = [f"{task} / {p} / {w}" for p, w in (("faithful", "vote"), ("faithful", TRAINED), ("faithful", CONTROL))]
        cells += [f"{task} / no leak / vote", f"{task} / no leak / {TRAINED}"]
        lines.append(f"| {task} | " + " | ".join(map(number, cells)) + " |")
    lines += ["", "| classes | model | shuffled | shared tokens, no model | chance |", "| --- " * 5 + "|"]
    for episode in EPISODES:
        name = kind(*episode)
        cells = []
        for who in (TRAINED, CONTROL, SHARED):
            row = found.get(f"{name} / {who}")
            cells.append(f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {1 / episode[1]:.3f} |")
    lines += ["", "| | model | shuffled | without a model |", "| --- " * 4 + "|"]
    for what, key, beside in (("captions", "copied", ""), ("questions", "vote", ""), ("masked", "frequent", "frozen")):
        names = [f"{what} / {who}" for who in (TRAINED, CONTROL)]
        cells = [number(name) + (f", {number(name, beside)} {beside}" if beside and name in found else "") for name in names]
        alone = number(f"{what} / {TRAINED}", key)
        if what == "masked":
            alone += f", {number(f'{what} / {TRAINED}', 'repeated')} repeated"
        lines.append(f"| {what} | {' | '.join(cells)} | {alone} |")
    return "\n".join(lines)


def opened(arguments: argparse.Namespace) -> Setting:
    """Raises DataError where the parts do not belong together."""
    language, words = load_language(arguments.language), read_words(arguments.words)
    tokenizer = mmdiff.load_tokenizer(arguments.tokenizer)
    if tokenizer.cfg.tokenizer.quantizer != "v2l":
        raise DataError(
            f"{arguments.tokenizer} is no v2l tokenizer (tokenizer.quantizer={tokenizer.cfg.tokenizer.quantizer!r})."
        )
    own = tokenizer.params["codebook"]
    if not (np.array_equal(own["local"], words.local) and np.array_equal(own["global"], words.global_)):
        raise DataError(f"{arguments.tokenizer} was trained with other words than {arguments.words}.")
    if len(words.local_words) != language.processor.get_piece_size():
        raise DataError(f"{arguments.words} has {len(words.local_words)} local words, not those of {arguments.language}.")
    languages = {TRAINED: language, CONTROL: shuffled(language, arguments.seed)}
    return Setting(
        tokenizer, words, languages, arguments.images, arguments.episodes, arguments.shown, arguments.lora_steps, arguments.seed
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--words", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="RUN")
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--images", type=int, default=64, help="of each restoration task; at least 11")
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--shown", type=int, default=4, help="global words that stand for an image in a prompt")
    parser.add_argument("--lora-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="what begins so, e.g. inpainting colour")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for name in ("episodes", "shown", "lora_steps"):
        if (count := getattr(arguments, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} {count} must be at least 1.")
    if arguments.images < 11:
        parser.error(f"--images {arguments.images}: ten other images make the examples of one; give at least 11")
    try:
        setting = opened(arguments)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 65
    asked = {
        "tokenizer": setting.tokenizer.fingerprint,
        **{name: getattr(setting, name) for name in ("images", "episodes", "shown", "lora_steps", "seed")},
        "language": str(arguments.language),
    }
    file = arguments.workdir / "results.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    found = {line["name"]: line for line in lines if line["asked"] == asked}
    for name, measure in experiments(setting).items():
        if name in found or (arguments.only and not any(name.startswith(start) for start in arguments.only)):
            continue
        found[name] = {"name": name, **measure(), "asked": asked}
        with file.open("a") as out:
            out.write(json.dumps(found[name]) + "\n")
        print(f"{name}: {found[name]['accuracy']:.3f}", file=sys.stderr, flush=True)
    print(json.dumps(found) if arguments.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
