"""One page that answers, with intervals: where do discrete tokenizers lose what raw patches keep, and where do they win?

    python experiments/lossless_vs_discrete/report.py --results runs/lossless --out runs/lossless/report.html

RESULTS holds what the experiments left there, as for plots.py; what is missing is left out and named.

Every front end of E4 and every arm of E5 is compared with raw patches, measure by measure. An interval is a bootstrap over
the seeds of both sides, each value redrawn with its standard error; a measure is won or lost where the interval of the
difference leaves out zero, and open otherwise, as it is with fewer than three seeds on either side. Intervals are of 95% each:
of twenty comparisons between equals one is decided by chance. Nor are they independent: digits are counted together and by
size, arms at two points of their training. What has real numbers in place of codes is compared, too, and counted apart.
"""

import argparse
import base64
import html
import io
import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cliff
import drift
import entropy
import joint
import numpy as np
import plots
import rate
import readers
import selector

from mmdiff import config
from mmdiff.config_files import load_experiment
from mmdiff.sweeps.page import STYLE

BETTER = {  # measures of E5: what they are about, and the sign of what is good
    "question_accuracy": ("questions about scenes answered", 1),
    "caption_accuracy": ("attributes named in captions", 1),
    "image_accuracy": ("attributes drawn as asked", 1),
    "frechet_random": ("Frechet distance of drawings", -1),
    "text_bits_per_byte": ("bits per byte of text", -1),
}
WHEN = {1.0: "at the end", 0.25: "at a quarter of the steps"}
RAW_ARM = "raw"
ARMS = """Bits of an image: nominal, and by the entropy of single codes (E1, on the images of E5); vectors of real numbers
behind a front end have none. Digits of the largest size, counts and clocks that a reader of its own reads after the same
tokenizer for 64 x 64 pixels (E4; lowest to highest of the seeds). What the arm does when it has been trained (E5, 95%)."""
PROBES = ("ocr 5", "count", "clock")  # of E4, in the table of arms
FURTHER = ("selector/results.jsonl", "frozen_lm/results.jsonl")  # what is not among the panels of plots.py
VERDICTS = {"loses": "lost", "wins": "won", "open": "open"}
SIGNS = {"loses": "▼ ", "wins": "▲ ", "open": ""}  # not by colour alone
LEGEND = "▼ lost, ▲ won against raw patches; below each value the 95% of its gain over theirs, of which more is better."
OWN_STYLE = """
td small { color: var(--faint); font-weight: 400 } td.loses { box-shadow: inset 4px 0 var(--c1); background: var(--panel) }
td.wins { box-shadow: inset 4px 0 var(--c2); background: var(--panel); font-weight: 600 }
"""
SEEDS = 3  # fewer say little about how far seeds lie apart


class Comparison(NamedTuple):
    experiment: str
    measure: str
    what: str  # compared with raw patches
    raw: float
    value: float
    low: float  # of the gain over raw patches: positive is better
    high: float
    seeds: int  # on the side that has fewer

    @property
    def verdict(self) -> str:
        if self.seeds < SEEDS:
            return "open"
        return "wins" if self.low > 0 else "loses" if self.high < 0 else "open"


def gain(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]], sign: int) -> tuple[float, float]:
    """95% of sign * (mean of `ours` - mean of `theirs`), each a list of values with standard errors, one for each seed."""
    rng, means = np.random.default_rng(0), []
    for side in (ours, theirs):
        values, errors = np.asarray(side).T
        picked = rng.integers(0, len(values), (joint.DRAWS, len(values)))
        means.append((values[picked] + errors[picked] * rng.standard_normal(picked.shape)).mean(-1))
    low, high = np.quantile(sign * (means[0] - means[1]), [0.025, 0.975])
    return float(low), float(high)


def compared(
    experiment: str, measure: str, sides: dict[str, list[tuple[float, float]]], raw: str, sign: int
) -> Iterator[Comparison]:
    """Everything in `sides` with what is there of raw patches."""
    mean = lambda side: float(np.mean([value for value, _ in side]))
    for what, side in sides.items():
        if what != raw and side and sides.get(raw):
            low, high = gain(side, sides[raw], sign)
            seeds = min(len(side), len(sides[raw]))
            yield Comparison(experiment, measure, what, mean(sides[raw]), mean(side), low, high, seeds)


def of_readers(found: list[dict]) -> Iterator[Comparison]:
    """E4: each front end's own readers."""
    found = [row for row in found if row["reader"] == "own"]
    kinds = dict.fromkeys(kind for row in found for kind in row["right"])
    for kind in kinds:
        sides: dict[str, list[tuple[float, float]]] = {}
        for row in found:
            if kind in row["right"]:
                share = row["right"][kind]
                sides.setdefault(row["front_end"], []).append((share, math.sqrt(share * (1 - share) / row["count"])))
        yield from compared("E4, what readers of its own read right", kind, sides, readers.RAW, 1)


def of_joint(found: list[dict]) -> Iterator[Comparison]:
    """E5: arms at equal positions."""
    for share, when in WHEN.items():
        for metric, (told, sign) in BETTER.items():
            sides: dict[str, list[tuple[float, float]]] = {}
            for row in found:
                if row["share"] == share and metric in row["metrics"]:
                    of = row["metrics"]
                    sides.setdefault(row["arm"], []).append((of[metric], of.get(f"{metric}_stderr", 0.0)))
            yield from compared(f"E5 and E6, {when}", told, sides, RAW_ARM, sign)


def settings() -> dict[str, config.Config]:
    """Of every arm of E5 and E6."""
    files = [joint.HERE / file for file in plots.CURVES]
    return {arm: load_experiment(f"{file}:{arm}") for file in files for arm in joint.systems(file)[1]}


def counted(comparisons: Sequence[Comparison]) -> str:
    """How many are lost, won and open."""
    return ", ".join(f"{sum(c.verdict == verdict for c in comparisons)} {told}" for verdict, told in VERDICTS.items())


def arms(runs: list[dict], rates: dict | None, right: list[dict] | None) -> str:
    """Markdown, a row for each arm of E5: of E1, E4 and E5 what ARMS says."""
    known = {row["name"]: row for row in (rates or {}).get("shapes", {}).get("tokenizers", [])}
    own = [row for row in right or [] if row["reader"] == "own"]
    metrics = {"captions": "caption_accuracy", "questions": "question_accuracy", "drawn attributes": "image_accuracy"}
    ends = {metric: joint.summary(runs, metric) for metric in metrics.values()}
    lines = [
        f"| arm | bits of an image | {' | '.join((*PROBES, *metrics))} |",
        "| --- " * (2 + len(PROBES) + len(metrics)) + "|",
    ]
    known_arms = settings()
    for arm in joint.arms_of(runs):
        cfg = known_arms[arm]
        tokenizer, pixels = Path(cfg.data.tokenizer).name, not cfg.data.tokenizer and not cfg.front_end.encoder
        row, front = known.get(tokenizer), readers.RAW if pixels else f"{tokenizer}_64"
        coded = f"{row['nominal']:,.0f}, {row['entropy']:,.0f}" if row else ""
        cells = ["24,576" if pixels else coded if cfg.data.tokenizer else f"{math.prod(cfg.front_end.grid)} vectors"]
        for kind in PROBES:
            shares = [r["right"][kind] for r in own if r["front_end"] == front and kind in r["right"]]
            cells.append(f"{np.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})" if shares else "")
        for metric in metrics.values():
            found = ends[metric].get((arm, 1.0))
            cells.append(f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})" if found else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def answers(comparisons: Sequence[Comparison]) -> str:
    """HTML: how much is lost, won and open, then of each experiment a row for what stands in for raw patches."""
    tables, told, arms = [], [], settings()
    codes = lambda c: bool(arms[c.what].data.tokenizer) if c.what in arms else not c.what.startswith("continuous")
    for experiment in dict.fromkeys(c.experiment for c in comparisons):
        of = [c for c in comparisons if c.experiment == experiment]
        coded = [c for c in of if codes(c)]
        told.append(
            f"{experiment}: of {len(of)} comparisons {counted(of)}; of the {len(coded)} of codes alone {counted(coded)}."
        )
        measures = list(dict.fromkeys(c.measure for c in of))
        raw = {c.measure: f"{c.raw:.3f}" for c in of}
        rows = [cells([readers.RAW, *(raw[measure] for measure in measures)], ["", *measures])]
        for what in dict.fromkeys(c.what for c in of):
            found = {c.measure: c for c in of if c.what == what}
            rows.append(cells([what, *(found.get(measure, "") for measure in measures)], ["", *measures]))
        tables.append(f"<h2>{html.escape(experiment)}</h2>{as_html(['', *measures], rows)}")
    items = "".join(f"<li>{html.escape(line)}</li>" for line in told)
    return f'<ul class="findings">{items}</ul><p class="faint">{LEGEND}</p>' + "\n".join(tables)


def cells(row: Sequence[str | Comparison], head: Sequence[str]) -> str:
    """A row of a table: of a comparison its value, whether that is lost or won, and the interval of the gain."""
    parts = []
    for cell, name in zip(row, head, strict=True):
        kind, text = "", html.escape(cell) if isinstance(cell, str) else ""
        if isinstance(cell, Comparison):
            kind = f' class="{cell.verdict}"'
            text = f"{SIGNS[cell.verdict]}{cell.value:.3f}<br><small>{cell.low:+.3f} to {cell.high:+.3f}</small>"
        parts.append(f'<td{kind} data-name="{html.escape(name)}">{text}</td>')
    return "".join(parts)


def as_html(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table with rows of `cells`."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def from_markdown(text: str) -> str:
    """HTML of tables of `| a | b |` lines, of headings in `**` and of paragraphs, each line of which is one."""
    parts = []
    for part in text.split("\n\n"):
        if part.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip().split("|")[1:-1]] for line in part.splitlines()]
            parts.append(as_html(head, [cells(row, head) for row in rows]))
        else:
            heading = part.startswith("**") and part.endswith("**")
            tag = "h3" if heading else "p"
            parts += [f"<{tag}>{html.escape(line.strip('*'))}</{tag}>" for line in part.splitlines()]
    return "\n".join(parts)


def claims(doc: str | None) -> str:
    """The paragraphs of an experiment's first lines that say what is claimed."""
    told = [" ".join(part.split()) for part in (doc or "").split("\n\n")]
    return "".join(f'<p class="faint">{html.escape(part)}</p>' for part in told if part.startswith("Claim"))


def picture(results: Path) -> str:
    """The one of plots.py, as part of the page."""
    figure, file = plots.figure_of(results), io.BytesIO()
    figure.savefig(file, dpi=80, format="png")
    return f'<p class="sheets"><img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"></p>'


def page(results: Path) -> str:
    read = {name: plots.read(results / name) for name in (*(name for _, name in plots.PANELS), *FURTHER)}
    comparisons = [*of_readers(read["readers/results.jsonl"] or []), *of_joint(read["joint/results.jsonl"] or [])]
    missing = [name for name, found in read.items() if not found]
    sections = []
    if read["entropy/results.jsonl"]:
        sections.append(("E1, known entropy", claims(entropy.__doc__), entropy.table(read["entropy/results.jsonl"])))
    if read["cliff/results.jsonl"]:
        sections.append(("E2, capacity", claims(cliff.__doc__), cliff.table(read["cliff/results.jsonl"])))
    if read["rate.json"]:
        told = "\n\n".join(rate.lines(name, **parts) for name, parts in read["rate.json"].items())
        sections.append(("E1 and E3, bits and what they buy", claims(rate.__doc__), told))
    if read["readers/results.jsonl"]:
        sections.append(("E4, detail", claims(readers.__doc__), readers.table(read["readers/results.jsonl"])))
    if read["joint/results.jsonl"]:
        table = arms(read["joint/results.jsonl"], read["rate.json"], read["readers/results.jsonl"])
        sections.append(("All arms", f'<p class="faint">{ARMS}</p>', table))
        told = [joint.systems(joint.HERE / file)[0] for file in plots.CURVES]
        told.append(joint.beside(settings()["raw"].data, joint.COUNT))
        about = "".join(f'<p class="faint">{html.escape(text)}</p>' for text in told)
        sections.append(("E5 and E6, joint training, at the end", about, joint.table(read["joint/results.jsonl"])))
    if found := read["frozen_lm/results.jsonl"]:
        tasks = runpy.run_path(str(joint.HERE.parent / "frozen_lm" / "tasks.py"))
        table = tasks["table"]({row["name"]: row for row in found})
        sections.append(("E7, a frozen language model", claims(tasks["__doc__"]), table))
    if read["drift.json"]:
        sections.append(("E9, drift", claims(drift.__doc__), drift.table(read["drift.json"], drift.ROUNDS)))
    if found := read["selector/results.jsonl"]:
        longest = max(row["steps"] for row in found)
        told, _ = selector.report([row for row in found if row["steps"] == longest])
        sections.append(("E10, what LaVIT's selector keeps", claims(selector.__doc__), told))
    how = " ".join((__doc__ or "").split("\n\n")[3].split())
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Lossless against discrete</title>'
            f"<style>{STYLE}{OWN_STYLE}</style></head><body><h1>Where do discrete tokenizers lose what raw patches keep?</h1>",
            f'<p class="faint">{html.escape(how)}</p>',
            answers(comparisons),
            f'<p class="notice">Not run, and so not here: {html.escape(", ".join(missing))}.</p>' if missing else "",
            "<h2>All experiments</h2>",
            picture(results),
            *(f"<h2>{title}</h2>{about}{from_markdown(table)}" for title, about, table in sections),
            "</body></html>",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(arguments.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
