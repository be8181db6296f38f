"""E5: five image paths trained jointly on captions, questions and drawings, on equal terms. Which learns what, and when?

    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:vq --workdir runs/tokenizers/vq
    mmdiff train experiments/lossless_vs_discrete/tokenizers.py:fsq --workdir runs/tokenizers/fsq
    python experiments/lossless_vs_discrete/joint.py --workdir runs/lossless/joint

Every arm of systems.py is trained for each seed, and measured at 1/16, 1/8, 1/4, 1/2 and 1 of its steps with the moving
average of its parameters. Points of one arm and share are compared three ways: at equal positions (what the transformer reads),
at equal operations without and with those of training the tokenizer, and, since width and depth are the same, at nearly equal
parameters. An interval is a bootstrap over seeds that also redraws every measurement with its standard error.

Claims, before it was run: (1) arms on codes draw better early, their images being easier to learn; (2) arms on raw patches
answer questions about small differences of colour at least as well at the end. (1) would be wrong if the interval of image
accuracy of `raw` at 1/4 of the operations (tokenizer not counted) lay above those of `vq_ar` and `masked`; (2) if the interval
of question accuracy of an arm on codes lay above those of `raw` and `read` at the end.

WORKDIR gets a run per arm and seed, results.jsonl and report.html; the same command goes on where it was stopped. Two commands
may share the work, each with its own --arms, in one WORKDIR.
"""

import argparse
import html
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import mmdiff
from mmdiff import config
from mmdiff.config_files import load_experiment, replaced, run_config
from mmdiff.evaluation.evaluate import chosen, measure
from mmdiff.evaluation.task import Task
from mmdiff.sweeps.charts import Series, line_chart
from mmdiff.sweeps.page import STYLE
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.training import flops

HERE = Path(__file__).parent
ARMS = ("raw", "read", "vq_ar", "fsq_ar", "masked")
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
WANTED = ("text_bits_per_byte", "question_accuracy", "caption_accuracy", "image_accuracy", "frechet_random", "code_bits")
SHOWN = WANTED[:5]
COUNT, DRAWS = 200, 2000


def settings(arm: str, seed: int, steps: int | None) -> config.Config:
    """Of one run: checkpoints stay at every share of the steps."""
    cfg = load_experiment(f"{HERE / 'systems.py'}:{arm if arm != 'raw' else 'config'}")
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


def one_run(arm: str, seed: int, arguments: argparse.Namespace) -> Iterator[dict]:
    """Train and measure; a record per share."""
    cfg = settings(arm, seed, arguments.steps)
    workdir = arguments.workdir / arm / f"seed-{seed}"
    trained(cfg, workdir)
    model = mmdiff.load(workdir)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    per_step = costs(cfg, model.vocabulary.size, cfg.data.size)
    for share in SHARES:
        step = max(1, round(share * cfg.training.steps))
        record = {"arm": arm, "seed": seed, "steps": cfg.training.steps, "share": share, "parameters": parameters}
        record["positions"] = per_step["positions"] * step
        record["flops"] = per_step["flops"] * step + per_step["encoding"]
        record["flops_with_tokenizer"] = record["flops"] + per_step["tokenizer_training"]
        yield record | {"metrics": measured(workdir, step, arguments.count)}


def interval(values: list[float], errors: list[float]) -> tuple[float, float]:
    """95% of the means of bootstrap samples over seeds, each value redrawn with its standard error."""
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(values), (DRAWS, len(values)))
    drawn = np.asarray(values)[picked] + np.asarray(errors)[picked] * rng.standard_normal(picked.shape)
    low, high = np.quantile(drawn.mean(-1), [0.025, 0.975])
    return float(low), float(high)


def summary(records: list[dict], metric: str) -> dict[tuple[str, float], tuple[float, float, float]]:
    """(arm, share) to mean and interval."""
    found = {}
    for arm in ARMS:
        for share in SHARES:
            of = [r["metrics"] for r in records if r["arm"] == arm and r["share"] == share and metric in r["metrics"]]
            if of:
                values = [m[metric] for m in of]
                found[arm, share] = (float(np.mean(values)), *interval(values, [m.get(f"{metric}_stderr", 0.0) for m in of]))
    return found


def at_the_end(records: list[dict]) -> list[list[str]]:
    """A row of names, then one for each arm: its size, its cost, its metrics at the end."""
    rows = [["arm", "parameters", "operations", "with the tokenizer's", *SHOWN]]
    for arm in ARMS:
        last = [r for r in records if r["arm"] == arm and r["share"] == 1.0]
        if last:
            cells = [f"{last[0]['parameters']:,}", *(f"{last[0][name]:.3g}" for name in ("flops", "flops_with_tokenizer"))]
            for metric in SHOWN:
                cell = summary(records, metric).get((arm, 1.0))
                cells.append(f"{cell[0]:.3f} ({cell[1]:.3f} to {cell[2]:.3f})" if cell else "")
            rows.append([arm, *cells])
    return rows


def table(records: list[dict]) -> str:
    """The same as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in at_the_end(records)]
    return "\n".join([lines[0], "| --- " * (4 + len(SHOWN)) + "|", *lines[1:]])


def page(records: list[dict]) -> str:
    """Claims, the end, and curves of every metric over positions and over operations, both ways."""
    axes = (
        ("positions", "positions read"),
        ("flops", "operations"),
        ("flops_with_tokenizer", "operations, the tokenizer's training included"),
    )
    head, *rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in at_the_end(records)]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    seeds = len({r["seed"] for r in records})
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Joint training</title><style>{STYLE}</style></head><body><h1>Five image paths, trained jointly</h1>",
        *(f'<p class="faint">{html.escape(" ".join(text.split()))}</p>' for text in (__doc__ or "").split("\n\n")[2:4]),
        f"<h2>At the end, mean of {seeds} seeds (95% interval)</h2>",
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
    ]
    for metric in SHOWN:
        found, figures = summary(records, metric), []
        for axis, label in axes:
            series = []
            for number, arm in enumerate(ARMS):
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
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="of: %(choices)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run (default: those of systems.py)")
    parser.add_argument("--count", type=int, default=COUNT, help="held-out documents per metric (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    kept = arguments.workdir / "results.jsonl"
    read = lambda: [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    for seed in range(arguments.seeds):
        for arm in arguments.arms:
            done = [r for r in read() if (r["arm"], r["seed"]) == (arm, seed)]
            if len(done) == len(SHARES):
                continue
            records = list(one_run(arm, seed, arguments))
            with kept.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            last = records[-1]["metrics"]
            told = ", ".join(f"{name} {last[name]:.3f}" for name in SHOWN if name in last)
            print(f"{arm}, seed {seed}: {told}", file=sys.stderr, flush=True)
    records = read()
    (arguments.workdir / "report.html").write_text(page(records))
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
