"""`report.html`: one file with everything in it, for screens of any size, light or dark; no scripts, nothing loaded."""

import base64
import html
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mmdiff.sweeps import charts
from mmdiff.sweeps.charts import Series, line_chart
from mmdiff.sweeps.results import ArmResult, Points, Results, mean_curve
from mmdiff.sweeps.table import NOTES, Table, cautions, final_table, findings

if TYPE_CHECKING:
    from mmdiff.sweeps.report import Facts

# the colours are Okabe and Ito's, told apart with any kind of colour vision; lighter ones on the dark ground
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #62676e; --line: #d9dce1; --ground: #fff; --panel: #f5f6f8;
  --warn: #8a4b00; --c0: #0072b2; --c1: #d55e00; --c2: #008060; --c3: #b0508a; --c4: #b07d00; --c5: #3a8fc4; --c6: #444 }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --faint: #a0a6ae; --line: #3a3f46; --ground: #16181b;
  --panel: #202327; --warn: #f0b35c; --c0: #5ab4e8; --c1: #ff8b4a; --c2: #35cf9e; --c3: #eaa0cc; --c4: #f0c040;
  --c5: #a8d8f5; --c6: #ccc } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  max-width: 76rem; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem } p, li { max-width: 48rem } .faint { color: var(--faint) }
.findings { font-size: 1.05rem; padding-left: 1.2rem }
.notice { border-left: 4px solid var(--warn); background: var(--panel); padding: .6rem 1rem; margin: 1rem 0 }
.notice ul { margin: .3rem 0; padding-left: 1.2rem } .notice h2 { margin: 0; color: var(--warn); font-size: 1rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
table { font-size: .92rem }
th, td { padding: .45rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-size: .85rem; color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal }
th:first-child, td:first-child { text-align: left } td:first-child { font-weight: 600 } td.number { font-weight: 600 }
.role { color: var(--faint); font-size: .8rem; font-weight: 400; margin-left: .3em }
.notes { font-size: .85rem; color: var(--faint); padding-left: 1.1rem }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0; padding: 0; list-style: none }
.sample { width: 2rem; height: .75rem; vertical-align: -.03rem; margin-right: .5rem; flex: none }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-weight: 600; margin-bottom: .2rem } .charts svg { width: 100%; display: block }
svg path { fill: none } svg .mean { stroke-width: 2.2; stroke-linejoin: round } svg .seed { stroke-width: 1; opacity: .4 }
svg .grid { stroke: var(--line); stroke-width: .7 } svg .axis { stroke: var(--faint); stroke-width: 1 }
svg .leader { stroke: var(--faint); stroke-width: .7; stroke-dasharray: 1 2 }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) } svg .tick { font-size: 11px; fill: var(--faint) }
svg .name { font-weight: 600 }
.sheets img { max-width: 100%; border-radius: 6px; border: 1px solid var(--line) }
pre, code { font: .85rem/1.5 ui-monospace, monospace } pre { background: var(--panel); padding: .7rem 1rem; margin: .3rem 0;
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem } dt { color: var(--faint) }
dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 44rem) { thead { display: none } table, tbody, tr, td { display: block; width: auto }
  tr { border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; padding: .2rem 0 }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .15rem .8rem; white-space: normal }
  td::before { content: attr(data-name); color: var(--faint); font-weight: 400 } td:first-child::before { content: "" }
  td:first-child { justify-content: start; align-items: center; font-size: 1.05rem; gap: 0 }
  dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .5rem } }
"""


def render(results: Results, facts: "Facts") -> str:
    """The whole page."""
    title = _text(results.plan.question)
    told = findings(results)
    body = [
        f'<h1>{title}</h1>\n<p class="faint">{_text(facts.summary)}</p>',
        f'<ul class="findings">{_items(told)}</ul>' if told else "",
        _notice("Not finished", results.missing),
        _notice("Failed", results.failed),
        _notice("Compare with care", cautions(results)),
        "<h2>Results</h2>",
        _table(results, final_table(results)),
        f'<ul class="notes">{_items(NOTES)}</ul>',
        _curves(results),
        _differences(facts),
        _sheets(results),
        _commands(facts),
        "<h2>Made with</h2>",
        "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.setup().items()) + "</dl>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    opening = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n'
    return opening + "\n".join(part for part in body if part) + "\n</body></html>\n"


def _text(text: str) -> str:
    return html.escape(text)


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{_text(line)}</li>" for line in lines)


def _notice(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    return f'<div class="notice"><h2>{title}</h2><ul>{_items(f"{what}: {why}" for what, why in rows)}</ul></div>'


def _table(results: Results, table: Table) -> str:
    header, *rows = table
    lines = [
        "<tr>"
        + "".join(f"<th>{_text(name).replace(' ', '&nbsp;') if name[-1] in '↓↑' else _text(name)}</th>" for name in header)
        + "</tr></thead><tbody>"
    ]
    for number, row in enumerate(rows):
        role = ' <span class="role">baseline</span>' if number == 0 else ""
        cells = [f"<td>{_sample(number)}{_text(row[0])}{role}</td>"]
        for name, cell in zip(header[1:], row[1:], strict=True):
            kind = ' class="number"' if "±" in cell else ""
            cells.append(f'<td{kind} data-name="{html.escape(name)}">{_text(cell)}</td>')
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return '<div class="scroll"><table><thead>' + "\n".join(lines) + "</tbody></table></div>"


def _curves(results: Results) -> str:
    by_step, by_time, by_flops = (
        [_series(arm, number, per_step(arm)) for number, arm in enumerate(results.arms)]
        for per_step in (lambda arm: 1.0, _step_seconds, lambda arm: arm.planned.flops_per_step)
    )
    if not any(s.mean for s in by_step):
        return ""
    time_name, seconds = charts.time_unit(_most(by_time))
    flop_name, flops = charts.flop_unit(_most(by_flops))
    figures = (
        ("By steps", line_chart(by_step, "training step", "validation x_error")),
        ("By time", line_chart(by_time, f"training time in {time_name}", "validation x_error", seconds)),
        ("By computation", line_chart(by_flops, f"training {flop_name}", "validation x_error", flops)),
    )
    drawn = "".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in figures)
    thin = " Bold: mean over seeds; thin: each seed." if any(len(s.seeds) > 1 for s in by_step) else ""
    about = f"Error of the denoised image on held-out data; lower is better.{thin} Time is training alone."
    return f'<h2>Learning curves</h2><p class="faint">{about}</p>{_legend(by_step)}<div class="charts">{drawn}</div>'


def _most(series: list[Series]) -> float:
    return max((s.mean[-1][0] for s in series if s.mean), default=1.0)


def _step_seconds(arm: ArmResult) -> float:
    """What a step took on average; as planned, where no run has finished that could tell."""
    return arm.average("step_seconds") or arm.planned.step_seconds


def _series(arm: ArmResult, number: int, per_step: float) -> Series:
    """The arm's curve, with `per_step` units of the x axis for each step."""

    def stretched(points: Points) -> Points:
        return [(step * per_step, error) for step, error in points]

    return Series(arm.name, number, stretched(mean_curve(arm.runs)), [stretched(run.curve) for run in arm.runs if run.curve])


def _legend(series: list[Series]) -> str:
    items = []
    for s in series:
        if s.mean:
            items.append(f"<li>{_sample(s.number)}{_text(s.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _sample(number: int) -> str:
    """A piece of an arm's line."""
    line = f'<path {charts.line_style(number)} class="mean" d="M0 6H32"/>'
    return f'<svg class="sample" viewBox="0 0 32 12" aria-hidden="true">{line}</svg>'


def _differences(facts: "Facts") -> str:
    arms = facts.differences()
    if not arms:
        return ""
    rows = [
        f"<dt>{_text(name)}</dt><dd>{'<br>'.join(f'<code>{_text(d)}</code>' for d in fields) or 'nothing'}</dd>"
        for name, fields in arms.items()
    ]
    return f"<h2>What differs from {_text(facts.results.plan.baseline)}</h2><dl>{''.join(rows)}</dl>"


def _sheets(results: Results) -> str:
    parts = []
    for arm in results.arms:
        run = next((run for run in arm.runs if run.sheet is not None), None)
        if run is None or run.sheet is None:
            continue
        data = base64.b64encode(run.sheet.read_bytes()).decode()
        step = int(run.sheet.stem) if run.sheet.stem.isdecimal() else run.step
        title = f"{_text(arm.name)} <span class='faint'>seed {run.run.seed}, step {step:,}</span>"
        image = f'<img alt="sample sheet of {html.escape(arm.name)}" src="data:image/png;base64,{data}">'
        parts.append(f"<h3>{title}</h3>{image}")
    about = '<p class="faint">The same prompts and the same noise for every arm.</p>'
    return f'<section class="sheets"><h2>Samples</h2>{about}{"".join(parts)}</section>' if parts else ""


def _commands(facts: "Facts") -> str:
    told = "".join(f"<h3>{_text(name)}</h3><pre>{_text(command)}</pre>" for name, command in facts.commands().items())
    return f"<h2>To repeat an arm</h2>{told}" if told else ""
