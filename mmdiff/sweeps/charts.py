"""Line charts as SVG that sits in a page and takes its colours from it (light and dark), with no library.

An axis is logarithmic where its values span more than a factor; labels stand at the ends of the lines when there are few.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44
LETTER, BOLD = 6.4, 7.7  # pixels of a letter, about
LABELLED = 6  # arms whose lines are labelled
COLOURS = 7
DASHES = ("", "6 3", "2 3")
LOG_X, LOG_Y = 100.0, 3.0  # an axis whose values span more than this factor is logarithmic
LABEL_STEP = 14  # pixels between labels, at least


@dataclasses.dataclass(frozen=True)
class Series:
    """One arm: the mean line, and a thin one per seed where there are several."""

    name: str
    number: int
    mean: Points
    seeds: list[Points]


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values to pixels."""

    low: float
    high: float
    log: bool
    begin: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], factor: float, begin: float, end: float, zero: bool) -> "Axis":
        """`zero`: a linear axis starts there."""
        low, high = min(values), max(values)
        if low > 0 and high / low > factor:
            return cls(low / 1.08, high * 1.08, True, begin, end)
        pad = 0.06 * (high - low) or abs(high) * 0.06 or 1.0
        return cls(0.0 if zero else low - pad, high if zero else high + pad, False, begin, end)

    def place(self, value: float) -> float:
        f = math.log if self.log else float
        share = (f(value) - f(self.low)) / ((f(self.high) - f(self.low)) or 1.0)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values, about five of them."""
        if not self.log:
            return linear_ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), tuple(range(1, 10))):
            ticks = [d * 10.0**power for power in powers for d in digits if self.low <= d * 10.0**power <= self.high]
            if len(ticks) >= 4:
                return ticks
        return ticks


def linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(d * power for d in (1, 2, 2.5, 5, 10) if d * power >= raw * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(series: Sequence[Series], x_label: str, y_label: str, x_scale: float = 1.0, log_x: bool = False) -> str:
    """An `<svg>`; "" when there is nothing to draw. Values on the x axis are divided by `x_scale`; `log_x`: logarithmic,
    whatever they span."""
    scaled = [
        dataclasses.replace(s, mean=_divided(s.mean, x_scale), seeds=[_divided(p, x_scale) for p in s.seeds])
        for s in series
        if s.mean
    ]
    points = [point for s in scaled for line in (s.mean, *s.seeds) for point in line]
    if not points:
        return ""
    labelled = len(scaled) <= LABELLED
    room = max(len(_short(s.name)) for s in scaled) * BOLD + 14 if labelled else RIGHT
    x = Axis.of([p[0] for p in points], 1.0 if log_x else LOG_X, LEFT, WIDTH - room, zero=True)
    y = Axis.of([p[1] for p in points], LOG_Y, HEIGHT - BOTTOM, TOP, zero=False)
    parts = [*_axes(x, y, x_label, y_label)]
    for s in scaled:
        style = line_style(s.number)
        if len(s.seeds) > 1:
            parts += [f'<path class="seed" {style} d="{_path(line, x, y)}"/>' for line in s.seeds]
        title = f"<title>{html.escape(s.name)}</title>"
        parts.append(f'<path class="mean" {style} d="{_path(s.mean, x, y)}">{title}</path>')
        end_x, end_y = s.mean[-1]
        dot = f'<circle style="fill:var(--c{s.number % COLOURS})" cx="{x.place(end_x):.1f}" cy="{y.place(end_y):.1f}" r="2.5"/>'
        parts.append(dot)
    if labelled:
        parts += _labels(scaled, x, y)
    told = html.escape(f"{y_label} against {x_label}", quote=True)
    return f'<svg role="img" aria-label="{told}" viewBox="0 0 {WIDTH} {HEIGHT}">' + "\n".join(parts) + "</svg>"


def _divided(line: Points, scale: float) -> Points:
    return [(x / scale, y) for x, y in line]


def _axes(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, x.end
    parts = []
    for value in y.ticks():
        at = y.place(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in _apart(x.ticks(), x):
        at = x.place(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right:.1f}"/>')
    scale = " (log scale)"
    x_text, y_text = x_label + scale * x.log, y_label + scale * y.log
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="label" x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x_text}</text>')
    turned = f'transform="translate(12 {middle}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{html.escape(y_text)}</text>')
    return parts


def _apart(ticks: list[float], axis: Axis) -> list[float]:
    """Those whose numbers do not touch."""
    kept: list[float] = []
    for value in ticks:
        wide = LETTER * len(number(value)) + 8
        if not kept or axis.place(value) - axis.place(kept[-1]) >= wide:
            kept.append(value)
    return kept


def _labels(series: Sequence[Series], x: Axis, y: Axis) -> list[str]:
    """Names at the right, at the heights where the lines end, moved apart where they would touch."""
    ends = sorted(((y.place(s.mean[-1][1]), s) for s in series), key=lambda end: end[0])
    heights = spread([at for at, _ in ends], LABEL_STEP, TOP + 6, HEIGHT - BOTTOM - 2)
    parts, edge = [], x.end + 8
    for (at, s), height in zip(ends, heights, strict=True):
        end = x.place(s.mean[-1][0])
        parts.append(f'<path class="leader" d="M{end + 4:.1f} {at:.1f}L{edge - 2:.1f} {height:.1f}"/>')
        fill = f'style="fill:var(--c{s.number % COLOURS})"'
        parts.append(f'<text class="name" {fill} x="{edge:.1f}" y="{height + 4:.1f}">{html.escape(_short(s.name))}</text>')
    return parts


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Ascending heights near those wanted, `apart` from each other, and inside [low, high] if they fit."""
    placed: list[float] = []
    for at in wanted:
        placed.append(max(at, low, placed[-1] + apart if placed else low))
    limit = max(high, low + apart * (len(placed) - 1))
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - apart
    return placed


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def line_style(index: int) -> str:
    dash = DASHES[index // COLOURS % len(DASHES)]
    return f'style="stroke:var(--c{index % COLOURS})"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _path(line: Points, x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x.place(a):.1f} {y.place(b):.1f}" for a, b in line)


def number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def time_unit(most: float) -> tuple[str, float]:
    """(name, seconds) of the unit that suits up to `most` seconds."""
    return next(((n, s) for n, s in (("hours", 3600.0), ("minutes", 60.0)) if most >= 2 * s), ("seconds", 1.0))


def flop_unit(most: float) -> tuple[str, float]:
    """(name, operations) of the unit that suits up to `most` operations."""
    units = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
    return next(((n, s) for n, s in units if most >= s), ("MFLOP", 1e6))
