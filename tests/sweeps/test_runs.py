"""How the runs of a sweep are worked through: what is recorded, what stops it, what a restart does. The trainer pretends."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from mmdiff.sweeps import children
from mmdiff.sweeps.children import available_cores
from tests.sweeps.conftest import named, tiny_sweep, with_metrics


def read(path):
    return json.loads(path.read_text())


def trained(folder) -> int:
    """How often the run in `folder` was started."""
    return (folder / "trained").read_text().count("\n") if (folder / "trained").exists() else 0


def test_every_run_is_trained_and_evaluated_once(conduct, tmp_path):
    sweep = with_metrics(tiny_sweep(), "x_error", "image_accuracy")
    code, said = conduct(sweep)
    assert code == 0
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines] == ["1/3 one seed-0", "2/3 two seed-0", "3/3 one seed-1"]
    assert "x_error 0.6" in lines[2] and "20 steps" in lines[2] and "ETA" in lines[0]
    arms = tmp_path / "arms"
    assert read(arms / "one" / "seed-1" / "evaluation.json") == {"x_error": 0.6, "asked": 1.0, "image_accuracy": 0.25}
    assert read(arms / "two" / "config.json")["training"]["steps"] == 10
    assert "$ mmdiff train " in (arms / "one" / "seed-1" / "log.txt").read_text()
    assert conduct(sweep) == (0, "")
    assert trained(arms / "one" / "seed-0") == 1


def test_failures_are_recorded_and_do_not_stop_the_others(conduct, tmp_path):
    sweep = named(good="good", diverges="diverges", bad="bad", last="good")
    code, said = conduct(sweep)
    assert code == 0
    arms = tmp_path / "arms"
    diverged = read(arms / "diverges" / "seed-0" / "failed.json")
    assert diverged == {"code": 70, "reason": "mmdiff train: step 7: no finite loss for 3 steps in a row"}
    assert read(arms / "bad" / "seed-0" / "failed.json")["code"] == 65
    assert (arms / "last" / "seed-0" / "evaluation.json").exists()
    assert "2/4 diverges seed-0: FAILED with exit code 70: mmdiff train: step 7" in said
    conduct(sweep)  # what diverged would do so again, bad data may have been mended
    assert trained(arms / "diverges" / "seed-0") == 1 and trained(arms / "bad" / "seed-0") == 2


def test_a_crash_is_tried_again(conduct, tmp_path):
    sweep = named(crashes="crashes", good="good")
    assert conduct(sweep)[0] == 1
    folder = tmp_path / "arms" / "crashes" / "seed-0"
    assert read(folder / "failed.json") == {"code": 1, "reason": "RuntimeError: out of luck"}
    assert (tmp_path / "arms" / "good" / "seed-0" / "evaluation.json").exists()
    conduct(sweep)
    assert trained(folder) == 2


def test_strict_stops_at_the_first_failure(conduct, tmp_path):
    code, _ = conduct(named(diverges="diverges", good="good"), strict=True)
    assert code == 70 and not trained(tmp_path / "arms" / "good" / "seed-0")


def test_a_preempted_run_ends_the_sweep(conduct, tmp_path):
    assert conduct(named(preempted="preempted", good="good"))[0] == 75
    assert not trained(tmp_path / "arms" / "good" / "seed-0")
    assert not (tmp_path / "arms" / "preempted" / "seed-0" / "failed.json").exists()


def test_signals_reach_the_runs_which_save_and_go_on_later(conduct, tmp_path):
    """Two at once, so that both are told."""
    sweep, arms = named(a="slow", b="slow", c="good"), tmp_path / "arms"
    for number in (signal.SIGTERM, signal.SIGINT):
        begun = [arms / name / "seed-0" / "begun" for name in "ab"]
        stop = threading.Thread(target=signal_when, args=(begun, number))
        stop.start()
        assert conduct(sweep, jobs=2) == (75, "")
        stop.join()
        saved = [arms / name / "seed-0" / "saved" for name in "ab"]
        assert all(path.exists() for path in saved) and not trained(arms / "c" / "seed-0")
        if number == signal.SIGTERM:
            for path in (*saved, *begun):
                path.unlink()
    code, said = conduct(sweep, jobs=2)
    assert code == 0 and said.count("x_error") == 3


def signal_when(paths, number):
    """Send this process a signal as soon as the files are there."""
    limit = time.monotonic() + 60
    while not all(path.exists() for path in paths) and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(os.getpid(), number)


@pytest.mark.skipif(len(available_cores()) < 2, reason="one core cannot be divided, or the system does not tell its cores")
def test_runs_at_the_same_time_have_cores_of_their_own(monkeypatch, tmp_path):
    told = "import os, sys, time; print(sorted(os.sched_getaffinity(0)), flush=True); time.sleep(float(sys.argv[1]))"
    monkeypatch.setattr(children, "PYTHON", (sys.executable, "-c", told))
    everything = available_cores()
    assert children.core_shares(len(everything) + 1) == [set()]
    with children.Children(jobs=2) as processes:
        log = tmp_path / "log"
        first = processes.start(["0"], tmp_path / "first", log)
        processes.start(["60"], tmp_path / "second", log)
        first.wait()
        processes.start(["0"], tmp_path / "third", log).wait()  # in place of the first
        while not (tmp_path / "second").read_text():
            time.sleep(0.02)
        processes.terminate()
    one, two, three = (set(json.loads((tmp_path / name).read_text())) for name in ("first", "second", "third"))
    assert one == three and not one & two and one | two <= everything and len(one) == len(two) == len(everything) // 2
    assert available_cores() == everything
