"""Quality against the number of network evaluations (NFE), for every solver and grid and for a few-step model.

    WORKDIR/evaluation/ladder.json    every rung: solver, grid, nfe, numbers, seconds per image
                      ladder.html     the table and the curves
                      ladder.png      one row of drawings for each NFE, the same prompts and noise in every row

Seconds are of drawing `count` images in groups as `generate` makes them, prompts included, programs compiled before.
"""

import dataclasses
import html
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmdiff.diffusion import grids, solvers
from mmdiff.evaluation import sets
from mmdiff.evaluation.sheets import band, stacked
from mmdiff.evaluation.task import Task
from mmdiff.sampling.generate import GROUP
from mmdiff.sweeps.charts import Series, line_chart
from mmdiff.sweeps.page import STYLE

NFE = (1, 2, 4, 6, 8, 10, 20, 50)
FEW = (1, 2, 4, 8)
SOLVERS = ("ddim", "midpoint", "heun", "dpmpp_2m", "dpmpp_3m", "unipc2", "unipc3", "dpmpp_2m_sde")
SHOWN = 8  # drawings of a row


@dataclasses.dataclass(frozen=True)
class Rung:
    """One solver on one grid with `nfe` evaluations."""

    solver: str
    grid: str
    nfe: int
    numbers: dict[str, float]
    seconds: float
    """Per image."""
    drawn: list[np.ndarray] = dataclasses.field(repr=False)

    @property
    def series(self) -> str:
        return self.solver if self.solver == "few_step" else f"{self.solver} {self.grid.removeprefix('uniform_')}"


def usual_metrics(task: Task, known: Callable[[str], bool]) -> list[str]:
    """What a ladder measures when nothing is named: a distance of sets, and the reader's score where there is a reader."""
    return [sets.frechet_name(task.comparison.space), *filter(known, ("image_accuracy", "write_accuracy"))]


def climb(
    task: Task, few: Task | None, metrics: Sequence[str], chosen: Sequence[str] = SOLVERS, nfe: Sequence[int] = NFE
) -> Iterator[Rung]:
    """Measure rung by rung.

    Args:
      task: the ordinary model; its `drawing` may hold guidance. few: the same data with a few-step model.
      metrics: names from evaluate.METRICS, those of drawings.
    """
    shared = task.made
    for solver in chosen:
        for grid in ("tuned", "uniform_logsnr", "uniform_u"):
            seen: set[int] = set()
            for steps in nfe:
                used = _evaluations(solver, steps)
                if used in seen or (grid == "tuned" and (solver, steps) not in task.model.tuned):
                    continue
                seen.add(used)
                yield _rung(task, shared, metrics, solver, grid, steps, used)
    if few is not None:
        for steps in FEW:
            yield _rung(few, shared, metrics, "few_step", "uniform_u", steps, steps)


def _evaluations(solver: str, steps: int) -> int:
    levels = np.append(np.arange(grids.intervals(solver, steps), 0, -1.0), 0.0)
    return solvers.evaluations(solver, levels)


def _rung(task: Task, shared: dict, metrics: Sequence[str], solver: str, grid: str, steps: int, used: int) -> Rung:
    from mmdiff.evaluation.evaluate import METRICS

    made = {name: value for name, value in shared.items() if name.startswith(("features", "real", "judge"))}
    rung = dataclasses.replace(task, drawing=task.drawing | {"solver": solver, "grid": grid, "steps": steps}, made=made)
    groups = -(-len(rung.wanted) // GROUP)
    rung.draw(rung.wanted[: -(-len(rung.wanted) // groups)])  # compiles
    begin = time.perf_counter()
    drawn = rung.generated
    seconds = (time.perf_counter() - begin) / len(drawn)
    numbers: dict[str, float] = {}
    for name in metrics:
        numbers |= METRICS[name].measure(rung)
    shared.update(rung.made)
    return Rung(solver, grid, used, numbers, seconds, drawn[:SHOWN])


def columns(rungs: Sequence[Rung]) -> list[str]:
    """Names of the numbers, without standard errors."""
    return [name for name in rungs[0].numbers if not name.endswith("_stderr")] if rungs else []


def line(rung: Rung) -> str:
    """For the terminal."""
    told = "  ".join(f"{name} {value:.4f}" for name, value in rung.numbers.items() if not name.endswith("_stderr"))
    return f"{rung.solver:<13} {rung.grid:<15} {rung.nfe:>3} NFE  {told}  {1000 * rung.seconds:.1f} ms per image"


def write(rungs: Sequence[Rung], folder: Path, title: str, shown: str) -> list[Path]:
    """The three files. `shown`: the solver whose drawings are shown, beside those of a few-step model."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page, sheet = (folder / f"ladder.{end}" for end in ("json", "html", "png"))
    told = [{k: v for k, v in dataclasses.asdict(rung).items() if k != "drawn"} for rung in rungs]
    data.write_text(json.dumps(told, indent=1))
    page.write_text(render(rungs, title))
    rows = [rung for rung in rungs if rung.solver in (shown, "few_step")]
    best = {rung.nfe: rung for rung in rows if rung.solver == shown and rung.grid == "uniform_logsnr"}
    best |= {rung.nfe: rung for rung in rows if rung.solver == shown and rung.grid == "tuned"}
    rows = [*(best[nfe] for nfe in sorted(best)), *(rung for rung in rows if rung.solver == "few_step")]
    plural = lambda nfe: f"{nfe} evaluation{'s' * (nfe > 1)}"
    bands = [band(f"{plural(r.nfe)}, {r.solver}, {r.grid}", [(pixels, "") for pixels in r.drawn]) for r in rows]
    stacked(bands).save(sheet)
    return [data, page, sheet]


def render(rungs: Sequence[Rung], title: str) -> str:
    """The page."""
    names = columns(rungs)
    series = list(dict.fromkeys(rung.series for rung in rungs))
    figures = []
    for name in names:
        lines = []
        for number, key in enumerate(series):
            points = [(float(rung.nfe), rung.numbers[name]) for rung in rungs if rung.series == key]
            lines.append(Series(key, number, points, []))
        drawn = line_chart(lines, "network evaluations", name, log_x=True)
        figures.append(f"<figure><figcaption>{html.escape(name)}</figcaption>{drawn}</figure>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("solver", "grid", "NFE", *names, "ms per image"))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{cell}</td>"
            for cell in (
                rung.solver,
                rung.grid,
                rung.nfe,
                *(f"{rung.numbers[name]:.4f}" for name in names),
                f"{1000 * rung.seconds:.1f}",
            )
        )
        + "</tr>"
        for rung in rungs
    )
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head>{meta}<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>"
        '<p class="faint">Quality against network evaluations per image. The same prompts and noise on every rung.</p>'
        f'<div class="charts" style="max-width:{36 * len(figures)}rem">{"".join(figures)}</div>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></body></html>\n'
    )
