"""E5 and E6: image paths trained jointly on captions, questions and drawings, on equal terms. Which learns what, and when?

    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:vq --workdir runs/tokenizers/vq
    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:fsq --workdir runs/tokenizers/fsq
    python experiments/lossless_vs_discrete/joint.py --workdir runs/lossless/joint

The arms are those that a file of systems names (--systems; its first lines say what is claimed). Each is trained for each
seed, and measured at 1/16, 1/8, 1/4, 1/2 and 1 of its steps with the moving average of its parameters. Points of one arm and
share are compared three ways: at equal positions (what the transformer reads), at equal operations without and with those of
training the tokenizer, and, since width and depth are the same, at nearly equal parameters. An interval is a bootstrap over
seeds that also redraws every measurement with its standard error; those of whole sets (frechet_random, text_bits_per_byte,
code_bits) have none. All arms and seeds are asked about the same documents, and all seeds of an arm share its tokenizer: how
far tokenizers that are trained again lie apart is in no interval. Beside the arms stands what who sees no image would reach.

WORKDIR gets a run per arm and seed, results.jsonl and, named after the file of systems, a page; the same command goes on where
it was stopped. Two commands may share the work, each with its own --arms or --systems, in one WORKDIR.
"""

import argparse
import collections
import html
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import mmdiff
from mmdiff import config
from mmdiff.config_files import load_experiment, replaced, run_config
from mmdiff.data.shapes import Shapes
from mmdiff.data.shapes_reader import attribute_accuracy, score_caption
from mmdiff.document import Document
from mmdiff.evaluation.evaluate import chosen, measure
from mmdiff.evaluation.task import Task
from mmdiff.sweeps.charts import Series, line_chart
from mmdiff.sweeps.page import STYLE
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.training import flops

HERE = Path(__file__).parent
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
WANTED = ("text_bits_per_byte", "question_accuracy", "caption_accuracy", "image_accuracy", "frechet_random", "code_bits")
COUNT, DRAWS = 200, 2000


def systems(path: Path) -> tuple[str, tuple[str, ...]]:
    """What a file of systems claims, and its arms."""
    found = runpy.run_path(str(path))
    if "ARMS" not in found:
        raise SystemExit(f"{path} names no ARMS: give a file like {HERE / 'systems.py'}.")
    told = (" ".join(part.split()) for part in (found["__doc__"] or "").split("\n\n"))
    return "\n".join(part for part in told if part.startswith("Claim")), found["ARMS"]


def settings(path: Path, arm: str, seed: int, steps: int | None) -> config.Config:
    """Of one run: checkpoints stay at every share of the steps."""
    cfg = load_experiment(f"{path}:{arm}")
    steps = steps or cfg.training.steps
    every = max(1, steps // 16)
    return replaced(
        cfg,
        {
            "training.steps": steps,
            "training.seed": seed,
            "training.checkpoint_every": every,
            "training.keep_every": every,
        },
    )


def trained(cfg: config.Config, workdir: Path) -> None:
    """Train, or go on with, one run, in a process of its own."""
    workdir.mkdir(parents=True, exist_ok=True)
    experiment = workdir / "experiment.json"
    experiment.write_text(cfg.to_json())
    command = [sys.executable, "-m", "mmdiff", "train", str(experiment), "--workdir", str(workdir)]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=(workdir / "log.txt").open("a"))
    if ended.returncode:
        raise SystemExit(f"{workdir}: training ended with {ended.returncode}; see {workdir / 'log.txt'}.")


def measured(workdir: Path, step: int, count: int) -> dict[str, float]:
    """The metrics that suit the arm, with standard errors."""
    task = Task(mmdiff.load(workdir, step=step), count)
    suitable = [*chosen(task, None), *(["frechet_random"] if task.model.cfg.layout.images != "read" else [])]
    return measure(task, [name for name in WANTED if name in suitable])


def costs(cfg: config.Config, vocabulary_size: int, images: float) -> dict[str, float]:
    """Per step of training: positions, operations, and of the tokenizer: to encode the images of a step (each only once, they
    are kept), and in all to train it."""
    found = {"positions": cfg.training.batch_size * cfg.layout.row_length, "flops": flops.training_flops(cfg, vocabulary_size)}
    if not cfg.layout.codes:
        return found | {"encoding": 0.0, "tokenizer_training": 0.0}
    tokenizer = run_config(Path(cfg.data.tokenizer))
    one = flops.training_flops(tokenizer, 0)  # forward and backward, of a whole batch
    rows, cols = TokenizerNetwork.of(tokenizer).grid
    seen = tokenizer.training.batch_size * tokenizer.layout.row_length // (rows * cols)
    return found | {"encoding": one / 3 / 2 / seen * images, "tokenizer_training": one * tokenizer.training.steps}


def one_run(arm: str, cfg: config.Config, arguments: argparse.Namespace) -> Iterator[dict]:
    """Train and measure; a record per share."""
    seed, steps = cfg.training.seed, cfg.training.steps
    workdir = arguments.workdir / arm / f"seed-{seed}-steps-{steps}"
    trained(cfg, workdir)
    model = mmdiff.load(workdir)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    per_step = costs(cfg, model.vocabulary.size, cfg.data.size)
    for share in SHARES:
        step = max(1, round(share * steps))
        record = {"arm": arm, "seed": seed, "steps": steps, "count": arguments.count, "share": share}
        record["parameters"] = parameters
        record["positions"] = per_step["positions"] * step
        record["flops"] = per_step["flops"] * step + per_step["encoding"]
        record["flops_with_tokenizer"] = record["flops"] + per_step["tokenizer_training"]
        yield record | {"metrics": measured(workdir, step, arguments.count)}


def unseen(data: config.Data, count: int) -> dict[str, float]:
    """What is right without an image, of the same held-out documents: another one's caption or scene, and to each question the
    answer that it has most often in 5,000 documents to learn from."""

    def documents(kind: str, count: int, split: str) -> list[Document]:
        made = Shapes(0, count, data.generator_image_size, data.max_objects, ((kind, 1.0),), split)
        return [made[i] for i in range(count)]

    answers: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for document in documents("question", 5000, "train"):
        answers[document.extra["question"]][document.extra["answer"]] += 1
    kinds = {kind: documents(kind, count, data.validation_split) for kind in ("caption", "question", "draw")}
    usual = lambda d: max(answers[d.extra["question"]].most_common(1), default=("",))[0]
    others = lambda kind: zip(kinds[kind][1:] + kinds[kind][:1], (d.extra["scene"] for d in kinds[kind]), strict=True)
    right = {
        "caption_accuracy": [score_caption(other.texts[0], scene) for other, scene in others("caption")],
        "question_accuracy": [usual(d) == d.extra["answer"] for d in kinds["question"]],
        "image_accuracy": [attribute_accuracy(other.extra["scene"], scene) for other, scene in others("draw")],
    }
    return {name: float(np.mean(values)) for name, values in right.items()}


def interval(values: list[float], errors: list[float]) -> tuple[float, float]:
    """95% of the means of bootstrap samples over seeds, each value redrawn with its standard error."""
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(values), (DRAWS, len(values)))
    drawn = np.asarray(values)[picked] + np.asarray(errors)[picked] * rng.standard_normal(picked.shape)
    low, high = np.quantile(drawn.mean(-1), [0.025, 0.975])
    return float(low), float(high)


def arms_of(records: list[dict]) -> list[str]:
    return list(dict.fromkeys(record["arm"] for record in records))


def summary(records: list[dict], metric: str) -> dict[tuple[str, float], tuple[float, float, float]]:
    """(arm, share) to mean and interval."""
    found = {}
    for arm in arms_of(records):
        for share in SHARES:
            of = [r["metrics"] for r in records if r["arm"] == arm and r["share"] == share and metric in r["metrics"]]
            if of:
                values = [m[metric] for m in of]
                found[arm, share] = (float(np.mean(values)), *interval(values, [m.get(f"{metric}_stderr", 0.0) for m in of]))
    return found


def at_the_end(records: list[dict]) -> list[list[str]]:
    """A row of names, then one for each arm: its size, its cost, its metrics at the end."""
    rows = [["arm", "parameters", "operations", "with the tokenizer's", *WANTED]]
    for arm in arms_of(records):
        last = [r for r in records if r["arm"] == arm and r["share"] == 1.0]
        if last:
            cells = [f"{last[0]['parameters']:,}", *(f"{last[0][name]:.3g}" for name in ("flops", "flops_with_tokenizer"))]
            for metric in WANTED:
                cell = summary(records, metric).get((arm, 1.0))
                cells.append(f"{cell[0]:.3f} ({cell[1]:.3f} to {cell[2]:.3f})" if cell else "")
            rows.append([arm, *cells])
    return rows


def table(records: list[dict]) -> str:
    """The same as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in at_the_end(records)]
    return "\n".join([lines[0], "| --- " * (4 + len(WANTED)) + "|", *lines[1:]])


def beside(data: config.Data, count: int) -> str:
    """A line for a table of arms."""
    return "Without an image: " + ", ".join(f"{name} {value:.3f}" for name, value in unseen(data, count).items()) + "."


def page(records: list[dict], claims: str, floor: str) -> str:
    """Claims, the end, and curves of every metric over positions and over operations, both ways."""
    axes = (
        ("positions", "positions read"),
        ("flops", "operations"),
        ("flops_with_tokenizer", "operations, the tokenizer's training included"),
    )
    head, *rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in at_the_end(records)]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    seeds = len({r["seed"] for r in records})
    compared = " ".join((__doc__ or "").split("\n\n")[2].split())
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Joint training</title><style>{STYLE}</style></head><body><h1>Image paths, trained jointly</h1>",
        f'<p class="faint">{html.escape(compared)}</p>',
        *(f'<p class="faint">{html.escape(text)}</p>' for text in claims.splitlines()),
        f"<h2>At the end, mean of {seeds} seeds (95% interval)</h2>",
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
        f'<p class="faint">{floor}</p>',
    ]
    for metric in WANTED:
        found, figures = summary(records, metric), []
        for axis, label in axes:
            series = []
            for number, arm in enumerate(arms_of(records)):
                at = {r["share"]: r[axis] for r in records if r["arm"] == arm}
                points = lambda which, at=at, arm=arm, found=found: [
                    (at[share], found[arm, share][which]) for share in SHARES if (arm, share) in found
                ]
                if points(0):
                    series.append(Series(arm, number, points(0), [points(1), points(2)]))
            figures.append(f"<figure>{line_chart(series, label, metric, log_x=True)}</figure>")
        parts.append(f'<h2>{metric}</h2><div class="charts">{"".join(figures)}</div>')
    parts.append('<p class="faint">Thick: mean over seeds. Thin: ends of its interval.</p></body></html>')
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--systems", type=Path, default=HERE / "systems.py", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="some of those in FILE (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run (default: those in FILE)")
    parser.add_argument("--count", type=int, default=COUNT, help="held-out documents per metric (default: %(default)s)")
    arguments = parser.parse_args()
    claims, arms = systems(arguments.systems)
    wanted = arguments.arms or arms
    if unknown := set(wanted) - set(arms):
        parser.error(f"--arms {' '.join(sorted(unknown))}: {arguments.systems} has {' '.join(arms)}")
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    kept = arguments.workdir / "results.jsonl"
    every = [settings(arguments.systems, arm, seed, arguments.steps) for seed in range(arguments.seeds) for arm in wanted]
    steps = {arm: cfg.training.steps for arm, cfg in zip(wanted, every, strict=False)}

    def recorded() -> list[dict]:
        """What is there of these arms, steps and count; results of others stay in the file."""
        found = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
        of = lambda arm: steps.get(arm) or settings(arguments.systems, arm, 0, arguments.steps).training.steps
        found = [r for r in found if r["arm"] in arms and r["count"] == arguments.count]
        return sorted((r for r in found if r["steps"] == of(r["arm"])), key=lambda r: arms.index(r["arm"]))

    for cfg, arm in zip(every, list(wanted) * arguments.seeds, strict=True):
        if sum((r["arm"], r["seed"]) == (arm, cfg.training.seed) for r in recorded()) == len(SHARES):
            continue
        records = list(one_run(arm, cfg, arguments))
        with kept.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        last = records[-1]["metrics"]
        told = ", ".join(f"{name} {last[name]:.3f}" for name in WANTED if name in last)
        print(f"{arm}, seed {cfg.training.seed}: {told}", file=sys.stderr, flush=True)
    records = recorded()
    floor = beside(every[0].data, arguments.count)
    (arguments.workdir / f"{arguments.systems.stem}.html").write_text(page(records, claims, floor))
    print(f"{table(records)}\n\n{floor}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
