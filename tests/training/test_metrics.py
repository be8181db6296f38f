import io
import json
import math
import sys
import types

import numpy as np
import pytest

from mmdiff.training.metrics import FILE, Metrics, Progress, read_metrics


def write(workdir, steps, resume_step=0):
    metrics = Metrics(workdir, resume_step)
    for step in steps:
        metrics.write(step, {"loss": np.float32(1) / np.float32(step), "seconds": 0.5})
    metrics.close()


def test_floats_read_back_exactly(tmp_path):
    metrics = Metrics(tmp_path)
    values = {"loss": np.float32(0.1), "third": 1 / 3, "rows": np.int32(7), "tiny": 5e-324}
    metrics.write(np.int32(50), values)
    (record,) = read_metrics(tmp_path)  # readable before close
    assert record == {"step": 50, "loss": float(np.float32(0.1)), "third": 1 / 3, "rows": 7, "tiny": 5e-324}
    assert isinstance(record["rows"], int)
    metrics.close()


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(1, {"loss": math.nan, "up": np.float32(math.inf), "down": -math.inf})
    metrics.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)["up"] == "Infinity"
    (record,) = read_metrics(tmp_path / FILE)
    assert math.isnan(record["loss"])
    assert (record["up"], record["down"]) == (math.inf, -math.inf)


def test_a_resumed_run_writes_the_file_of_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", range(1, 10))
    write(tmp_path / "cut", range(1, 8))
    assert (tmp_path / "cut" / FILE).read_bytes() != (tmp_path / "whole" / FILE).read_bytes()
    write(tmp_path / "cut", range(5, 10), resume_step=4)
    assert (tmp_path / "cut" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert [p.name for p in (tmp_path / "cut").glob("metrics*")] == [FILE]


def test_a_half_written_line_is_tolerated(tmp_path):
    write(tmp_path, range(1, 6))
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 6, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, [6], resume_step=5)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_bytes().startswith(whole)


def test_a_bad_line_in_the_middle_is_named_and_dropped_on_resume(tmp_path, capsys):
    write(tmp_path, [1, 2])
    path = tmp_path / FILE
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\ngarbage\n" + second + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a metrics record"):
        read_metrics(tmp_path)
    write(tmp_path, [3], resume_step=2)
    assert "metrics.jsonl:2" in capsys.readouterr().err
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_other_processes_write_nothing(tmp_path):
    metrics = Metrics(tmp_path / "run", write=False)
    metrics.write(1, {"loss": 1.0})
    metrics.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_scalars_and_images(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def add_image(self, name, pixels, step, dataformats):
            calls.append((name, pixels.shape, step, dataformats))

        def close(self):
            calls.append("close")

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    metrics = Metrics(tmp_path, 3)
    metrics.write(4, {"loss": 0.5})
    metrics.image(4, "samples", np.zeros((2, 3, 3), np.uint8))
    metrics.close()
    assert calls == [("open", 4), ("loss", 0.5, 4), ("samples", (2, 3, 3), 4, "HWC"), "close"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_reports_speed_and_time_left(stream):
    times = iter([0.0, 10.0, 15.0])
    out = stream()
    progress = Progress(4000, 100, tokens_per_step=8192, stream=out, clock=lambda: next(times))
    progress.report(200, {"loss": np.float32(2.5)})
    progress.report(300, {"loss": 1.25}, 0.1)
    progress.close()
    text = out.getvalue()
    assert "step 200/4000  loss 2.5  10 step/s  81.9k tokens/s  ETA 6:20" in text
    assert "step 300/4000  loss 1.25  20 step/s  164k tokens/s  data wait 2.0%  ETA 3:05" in text
    assert text.count("\n") == (1 if stream is Terminal else 2)
    assert ("\r" in text) == (stream is Terminal)


@pytest.mark.parametrize(("peak", "shown"), [(0.0, "20 TFLOP/s"), (40e12, "MFU 50.0%")])
def test_progress_shows_the_work_done(peak, shown):
    times = iter([0.0, 10.0])
    out = io.StringIO()
    progress = Progress(4000, 100, flops_per_step=2e12, peak_flops=peak, stream=out, clock=lambda: next(times))
    progress.report(200, {"loss": 1.0})
    assert f"10 step/s  {shown}  ETA" in out.getvalue()
