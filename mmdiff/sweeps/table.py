"""The final table of a sweep, as strings, and what it says in words. The same workdir gives the same bytes."""

import math
from collections.abc import Sequence

from mmdiff.sweeps.progress import clock_time
from mmdiff.sweeps.results import ArmResult, Results, mean_and_interval, within_noise

WITHIN, UNKNOWN = "≈", "?"
LOWER = ("x_error", "text_bits_per_byte", "image_bits_per_dim")
HIGHER = ("accuracy", "exact", "validity")  # parts of a name
UNSTEADY = 1.25  # factor between the step time of the plan and of the runs that is worth telling
NOTES = (
    "± is the 95% confidence interval of the mean over seeds (Student's t; '-' for one seed).",
    "ratio: the arm's mean over the baseline's.",
    f"{WITHIN} behind a ratio: the difference may be chance, by how far the baseline's seeds lie apart (95% level: of twenty "
    "arms that change nothing, one is left unmarked).",
    f"{UNKNOWN} behind a ratio: that cannot be told, for the baseline has fewer than two finished seeds.",
    "Step time is training alone. Total time is the whole run: start, compilation, validation, samples, what kills lost.",
)

Table = list[list[str]]
"""The first row is the header."""


def final_table(results: Results, *, costs: bool = True) -> Table:
    """One row per arm; with `costs=False` only what does not depend on how fast the machine was."""
    metrics = results.metrics
    header = ["arm", "seeds"]
    header += ["steps", "parameters", "FLOPs per step", "step time", "total time"] if costs else []
    for metric in metrics:
        header += [f"{metric}{arrow(metric)}", "ratio"]
    return [header, *(_row(results, arm, metrics, costs) for arm in results.arms)]


def _row(results: Results, arm: ArmResult, metrics: Sequence[str], costs: bool) -> list[str]:
    planned, done = arm.planned, len(arm.finished)
    wanted = len(planned.seeds)
    cells = [arm.name, str(done) if done == wanted else f"{done} of {wanted}"]
    if costs:
        known = bool(planned.steps)
        seconds, total = arm.average("step_seconds"), arm.average("seconds")
        cells += [
            f"{planned.steps:,}" if known else "-",
            short(planned.parameters) if known else "-",
            short(planned.flops_per_step) if known else "-",
            duration(seconds) if seconds is not None else "-",
            clock_time(total) if total is not None else "-",
        ]
    for metric in metrics:
        cells += [value_cell(arm, metric), ratio_cell(arm, results.baseline, metric)]
    return cells


def finite(arm: ArmResult, metric: str) -> list[float] | None:
    """The values of a metric; None if there are none, or one of them is not a number."""
    values = arm.values(metric)
    plain = [value for value in values if value is not None]
    return plain if plain and len(plain) == len(values) else None


def value_cell(arm: ArmResult, metric: str) -> str:
    values = finite(arm, metric)
    if values is None:
        return "not finite" if arm.values(metric) else "-"
    mean, half = mean_and_interval(values)
    return f"{digits(mean, 4)} ± {'-' if half is None else digits(half, 2)}"


def ratio_cell(arm: ArmResult, baseline: ArmResult, metric: str) -> str:
    values, base = finite(arm, metric), finite(baseline, metric)
    if arm is baseline:
        return "1" if values is not None else "-"
    if values is None or base is None:
        return "-"
    mark = {None: f" {UNKNOWN}", True: f" {WITHIN}", False: ""}[within_noise(values, base)]
    below = sum(base) / len(base)
    return f"{sum(values) / len(values) / below:.3f}{mark}" if below else f"-{mark}"


def findings(results: Results) -> list[str]:
    """The first metric in words: one line about the baseline, one for each other arm."""
    metrics = results.metrics
    if not metrics or not (theirs := finite(results.baseline, metrics[0])):
        return []
    metric, base = metrics[0], results.baseline.name
    better = {" ↓": " (lower is better)", " ↑": " (higher is better)"}.get(arrow(metric), "")
    mean_0 = sum(theirs) / len(theirs)
    told = [f"{metric}{better} of {base}, the baseline: {digits(mean_0, 4)}."]
    for arm in results.arms[1:]:
        values = finite(arm, metric)
        if values is None:
            continue
        mean = sum(values) / len(values)
        if mean == mean_0 or not mean_0:
            told.append(f"{arm.name}: {digits(mean, 4)}.")
            continue
        change = f"{100 * abs(mean / mean_0 - 1):.2g}% {direction(metric, mean < mean_0)}"
        judged = {
            None: f"; may be chance, for {base} has fewer than two finished seeds",
            True: f"; may be chance, by how far seeds of {base} lie apart",
            False: f"; more than chance, by how far seeds of {base} lie apart",
        }[within_noise(values, theirs)]
        told.append(f"{arm.name}: {digits(mean, 4)}, {change}{judged}.")
    return told


def cautions(results: Results) -> list[tuple[str, str]]:
    """(what, why) of all that makes the arms hard to compare."""
    told = []
    for arm in results.arms:
        seconds, planned = arm.average("step_seconds"), arm.planned.step_seconds
        if seconds is not None and not planned / UNSTEADY < seconds < planned * UNSTEADY:
            why = f"a step took {duration(seconds)}, and {duration(planned)} when the plan was made; its times say little"
            told.append((arm.name, why))
    if len(results.plan.code) > 1:
        told.append(("code", "it changed while the sweep was under way, see below"))
    return told


def direction(metric: str, lower: bool) -> str:
    """In which direction a value lies from the baseline's: better or worse, where that is known."""
    way = arrow(metric)
    if not way:
        return "lower" if lower else "higher"
    return "better" if lower == (way == " ↓") else "worse"


def arrow(metric: str) -> str:
    """Which way is better, where that is known."""
    if metric in LOWER:
        return " ↓"
    return " ↑" if any(part in metric for part in HIGHER) else ""


def markdown(table: Table) -> str:
    """A table ready to paste."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def digits(value: float, count: int) -> str:
    """So many significant digits, zeros at the end kept."""
    return f"{value:#.{count}g}".removesuffix(".")


def short(number: float) -> str:
    """Three digits and a unit: `2.10 M`."""
    for size, unit in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, "")):
        if number >= size:
            return f"{number / size:.{max(0, 2 - math.floor(math.log10(number / size)))}f}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """One step's time, three digits."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    digits = max(0, 2 - math.floor(math.log10(max(1000 * seconds, 1e-3))))
    return f"{1000 * seconds:.{digits}f} ms"
