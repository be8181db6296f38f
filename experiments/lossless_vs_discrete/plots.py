"""One picture of what the experiments of this folder found.

    python experiments/lossless_vs_discrete/plots.py --results runs/lossless --out docs/lossless.png

RESULTS holds what they left there; a panel whose file is missing is left out. Those that leave no folder are asked for theirs:

    python experiments/lossless_vs_discrete/input_layer.py --json > runs/lossless/input_layer.json
    python experiments/lossless_vs_discrete/rate.py --into runs/lossless/rate.json ...
    python experiments/lossless_vs_discrete/drift.py --into runs/lossless/drift.json ...
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joint
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from readers import RAW

ANCHORS = ("JPEG", "WebP")
LOSSLESS = ("next pixels", "PNG", "WebP lossless")
COLOURS, DASHES = 10, ("-", "--", ":")  # of curves: more than ten get the same colours in other dashes
CURVES = {  # of E5 and E6: the arms of a file, and what of them
    "systems.py": ("image_accuracy", "question_accuracy", "caption_accuracy"),
    "lavit_arms.py": ("image_accuracy", "caption_accuracy"),
    "orders.py": ("code_bits",),
}


def input_layer(axes: Axes, found: dict) -> None:
    """E0: share of values that come back, by how many numbers the layer has for each."""
    for patch in dict.fromkeys(row["patch"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["patch"] == patch]
        ratio = [row["width"] / row["values"] for row in rows]
        (line,) = axes.plot(ratio, [row["float32"] for row in rows], marker="o", label=f"patch {patch}, float32")
        axes.plot(ratio, [row["bfloat16"] for row in rows], marker="o", ls="--", c=line.get_color(), label="bfloat16")
    axes.set(title="E0  what the input layer gives back", xlabel="width / values of a patch", ylabel="share of values, exact")
    axes.legend(fontsize=7)


def entropy(axes: Axes, found: list[dict]) -> None:
    """E1: bits that a model of next pixels finds in images of H bits."""
    for row in found:
        axes.plot([row["entropy"]] * len(row["found"]), row["found"], "o", c="C0", ms=4)
    bits = np.array([row["entropy"] for row in found])
    axes.plot(bits, bits, c="k", lw=1, label="H")
    axes.plot(bits, 1.05 * bits + 1, c="k", lw=1, ls="--", label="1.05 H + 1")
    axes.set(title="E1  next pixels on images of known entropy", xlabel="H, bits", ylabel="bits found, every seed")
    axes.legend(fontsize=7)


def ledger(axes: Axes, found: dict) -> None:
    """E1: bits of an image, by everything that says it, for the first set of images; files without their headers."""
    name, parts = next(iter(found.items()))
    counted = ("nominal", "entropy", "prior")
    bars = [(f"{row['name']}, {kind}", row[kind]) for row in parts["tokenizers"] for kind in counted if kind in row]
    lossless = [(row["name"], row["bits"] - row["header"]) for row in parts["codecs"] if row["name"] in LOSSLESS]
    names, bits = zip(*(bars + lossless), strict=True)
    colours = ["C0"] * len(bars) + ["C1"] * len(lossless)
    axes.barh(range(len(names)), bits, color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    for place, value in enumerate(bits):
        axes.text(value, place, f" {value:,.0f}", va="center", fontsize=7)
    axes.set(title=f"E1  bits of an image of {name}; orange: lossless", xscale="log", xlim=(min(bits) / 2, max(bits) * 4))


def cliff(axes: Axes, found: list[dict]) -> None:
    """E2: recovered against how many bits are missing, all cells, and the bound."""
    names = list(dict.fromkeys(row["arm"] for row in found if row["capacity"] is not None))
    for number, name in enumerate(names):
        rows = [row for row in found if row["arm"] == name]
        missing = [row["entropy"] - row["capacity"] for row in rows]
        shares = [np.mean(row["recovered"]) for row in rows]
        axes.plot(missing, shares, marker="ox^vsD*P"[number % 8], c=f"C{number % 10}", lw=0.7, ms=4, label=name)
    x = np.linspace(-10, 12, 200)
    axes.plot(x, np.minimum(1, 2.0**-x), c="k", lw=1.2, label="2^(C - H)")
    axes.set(title="E2  images that come back", xlabel="H - C, bits", ylabel="share recovered", yscale="log", ylim=(1e-4, 1.5))
    axes.legend(fontsize=6)


def rate(axes: Axes, found: dict) -> None:
    """E3: PSNR by bits, for the last set of images; files without their headers."""
    name, parts = list(found.items())[-1]
    for anchor in ANCHORS:
        rows = [r for r in parts["codecs"] if r["name"].split()[0] == anchor and math.isfinite(r["psnr"])]
        axes.plot([r["bits"] - r["header"] for r in rows], [r["psnr"] for r in rows], marker=".", label=f"{anchor}, no header")
    for row in parts["tokenizers"]:
        if "entropy" in row:
            label = f"{row['name']}, entropy to nominal"
            axes.plot([row["entropy"], row["nominal"]], [row["psnr"]] * 2, marker="o", label=label)
        else:
            axes.axhline(row["psnr"], ls=":", c="k", lw=1, label=row["name"])
    axes.set(title=f"E3  images of {name.split('/')[-1]}", xlabel="bits of an image", ylabel="PSNR, dB", xscale="log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7)


def readers(axes: Axes, found: list[dict]) -> None:
    """E4: right answers of each front end's own readers, by kind and front end; a dot for every seed."""
    found = [row for row in found if row["reader"] == "own"]
    kinds = list(dict.fromkeys(kind for row in found for kind in row["right"] if kind != "ocr"))
    fronts = list(dict.fromkeys(row["front_end"] for row in found))
    for number, front in enumerate(fronts):
        for place, kind in enumerate(kinds):
            of = [row["right"][kind] for row in found if row["front_end"] == front and kind in row["right"]]
            x = place + (number - (len(fronts) - 1) / 2) * 0.8 / len(fronts)
            colour = "k" if front == RAW else f"C{number}"
            label = front if place == 0 else None
            axes.bar(x, np.mean(of) if of else 0, 0.8 / len(fronts), color=colour, alpha=0.6, label=label)
            axes.plot([x] * len(of), of, ".", c=colour, ms=3)
    axes.set_xticks(range(len(kinds)), kinds, rotation=60, fontsize=7)
    axes.set(title="E4  answers that are right, each front end's own readers", ylim=(0, 1.3))
    axes.legend(fontsize=7, ncols=3, loc="upper center")


def drift(axes: Axes, found: dict) -> None:
    """E9: PSNR after k rounds."""
    for number, (name, sets) in enumerate(found.items()):
        for style, (kind, told) in zip(("-", "--", ":"), sets.items(), strict=False):
            rounds = range(1, len(told["psnr"]) + 1)
            axes.plot(rounds, told["psnr"], style, c=f"C{number}", label=f"{name}, {kind}")
    axes.set(title="E9  encoded and decoded k times", xlabel="k", ylabel="PSNR to the original, dB")
    axes.legend(fontsize=7)


def curves(file: str, metric: str) -> Callable[[Axes, list[dict]], None]:
    """E5 and E6: a metric by the operations spent, the mean over seeds and its interval, of the arms that `file` names."""
    named = joint.systems(joint.HERE / file)[1]

    def panel(axes: Axes, found: list[dict]) -> None:
        found = [row for row in found if row["arm"] in named]
        values = joint.summary(found, metric)
        for number, arm in enumerate(arm for arm in named if arm in joint.arms_of(found)):
            at = {r["share"]: r["flops"] for r in found if r["arm"] == arm}
            shares = [share for share in joint.SHARES if (arm, share) in values]
            if shares:
                mean, low, high = np.array([values[arm, share] for share in shares]).T
                x = [at[share] for share in shares]
                axes.plot(x, mean, marker=".", c=f"C{number % COLOURS}", ls=DASHES[number // COLOURS], label=arm)
                axes.fill_between(x, low, high, color=f"C{number % COLOURS}", alpha=0.2, lw=0)
        title = f"{'E5' if file == 'systems.py' else 'E6'}  {metric}, {file}"
        axes.set(title=title, xlabel="operations, without the tokenizer's training", xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if values:
            axes.legend(fontsize=7)

    return panel


PANELS: tuple[tuple[Callable[[Axes, Any], None], str], ...] = (
    (input_layer, "input_layer.json"),
    (entropy, "entropy/results.jsonl"),
    (ledger, "rate.json"),
    (cliff, "cliff/results.jsonl"),
    (rate, "rate.json"),
    (readers, "readers/results.jsonl"),
    (drift, "drift.json"),
    *((curves(file, metric), "joint/results.jsonl") for file, metrics in CURVES.items() for metric in metrics),
)
COLUMNS = 2


def read(path: Path) -> Any:
    """A JSON value, or of .jsonl a list of them; None if there is no such file."""
    if not path.is_file():
        return None
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def figure_of(results: Path) -> Figure:
    there = [(panel, found) for panel, name in PANELS if (found := read(results / name))]
    rows = max(1, math.ceil(len(there) / COLUMNS))
    figure = Figure(figsize=(6 * COLUMNS, 4 * rows), layout="constrained")
    places = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes, (panel, found) in zip(places.flat, there, strict=False):
        axes.grid(alpha=0.3)
        panel(axes, found)
    for axes in places.flat[len(there) :]:
        axes.set_axis_off()
    return figure


def draw(results: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure_of(results).savefig(out, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw(arguments.results, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
