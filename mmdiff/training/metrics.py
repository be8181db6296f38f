"""What a run reports: one JSON object per line in `metrics.jsonl`, TensorBoard when installed, a line on the terminal.

    {"step": 50, "loss": 2.1, "text_loss": 1.6, "image_loss": 0.5, "seconds": 3.2, ...}

`step` counts the updates done, as a checkpoint's step does. Numbers are written so that they read back exactly; values
JSON has no number for are the strings "NaN", "Infinity" and "-Infinity", which `read_metrics` turns back into floats.
A resumed run first drops the lines after its checkpoint, so that the file equals an uninterrupted run's (but for times).
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

FILE = "metrics.jsonl"
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class Metrics:
    """The writer of one run. With `write=False` (every process but the first) its methods do nothing."""

    def __init__(self, workdir: str | Path, resume_step: int = 0, *, write: bool = True):
        """Drop lines of steps after `resume_step`, and a last line cut short by a kill; then append."""
        self._file: TextIO | None = None
        self._board = None
        if not write:
            return
        path = Path(workdir) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:  # optional; metrics.jsonl has everything but the images
            return
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line. Values are numbers or arrays of one element; the line is on disk, whole, when this returns."""
        if self._file is None:
            return
        record = {"step": int(step)} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, float(value), step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show uint8 [height, width, 3] on TensorBoard, if there is one."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl (or of the workdir that holds one), oldest first.

    A last line without its end (the writer was killed) is left out.

    Raises:
      ValueError: a line before the last is not a metrics record; the message names file and line.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    records = []
    for number, _, record in _lines(path):
        if record is None:
            raise ValueError(f"{path}:{number}: not a metrics record; remove the line.")
        records.append({k: float(v) if isinstance(v, str) and v in _NOT_FINITE else v for k, v in record.items()})
    return records


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict | None]]:
    """(line number, bytes, record or None if it is none) of every line that is complete."""
    *complete, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(complete, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield number, line, record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _truncate(path: Path, resume_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for number, line, record in _lines(path):
        if record is None:
            print(f"{path}:{number}: not a metrics record, dropped", file=sys.stderr)
        elif record["step"] <= resume_step:
            kept.append(line + b"\n")
    if (content := b"".join(kept)) != path.read_bytes():
        new = path.with_suffix(".jsonl.new")  # replaced in one move: a kill leaves the old file or the new one
        new.write_bytes(content)
        os.replace(new, path)


def _plain(value: Any) -> int | float | str:
    value = np.asarray(value).item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Progress:
    """How far a run is and how fast: a bar redrawn in place on a terminal, else a plain line per report."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        tokens_per_step: int = 0,
        flops_per_step: float = 0.0,
        peak_flops: float = 0.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._tokens = total, tokens_per_step
        self._flops, self._peak = flops_per_step, peak_flops
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty()
        self._last = (start, clock())

    def report(self, step: int, values: Mapping[str, Any], waited: float | None = None) -> None:
        """Show `values`, and since the report before the speed and how much of the time went by waiting for data."""
        before, then = self._last
        now = self._clock()
        self._last = (step, now)
        rate = (step - before) / max(now - then, 1e-9)
        parts = [f"step {step}/{self._total}"]
        parts += [f"{name} {float(np.asarray(value)):.4g}" for name, value in values.items()]
        if rate > 0:
            parts.append(f"{rate:.3g} step/s")
            if self._tokens:
                parts.append(f"{_short(rate * self._tokens)} tokens/s")
            if self._flops and self._peak:
                parts.append(f"MFU {100 * rate * self._flops / self._peak:.1f}%")
            elif self._flops:
                parts.append(f"{_short(rate * self._flops, ' ')}FLOP/s")
            if waited is not None:
                parts.append(f"data wait {100 * waited / max(now - then, 1e-9):.1f}%")
            parts.append(f"ETA {_clock_time((self._total - step) / rate)}")
        line = "  ".join(parts)
        if self._live:
            filled = 20 * step // max(self._total, 1)
            print(f"\r\x1b[K[{'#' * filled}{'.' * (20 - filled)}] {line}", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        if self._live:
            print(file=self._stream, flush=True)


def _short(number: float, space: str = "") -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{space}{unit}"
    return f"{number:.3g}{space}"


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
