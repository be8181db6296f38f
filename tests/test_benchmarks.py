"""The benchmarks' own machinery: fair turns, honest judges, the stated limits. The peer itself is not needed here."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

pytest.importorskip("sklearn")
import common  # noqa: E402
import digits  # noqa: E402
import digits_data  # noqa: E402
import few_steps  # noqa: E402
import vs_transfusion_pytorch as versus  # noqa: E402

from mmdiff import Document, Image  # noqa: E402


@pytest.mark.parametrize(
    ("script", "options", "keys"),
    [
        ("input_rate.py", ("--images", "24", "--steps", "4"), {"decode", "prefetch", "cores"}),
        ("attention_memory.py", ("--lengths", "256"), None),
        (
            "throughput.py",
            ("--experiment", "experiments/faces_32.py", "--batches", "2", "--evaluations", "1", "--rounds", "1"),
            {"found", "device"},
        ),
    ],
)
def test_scripts_of_one_command_print_one_json_object(script, options, keys):
    done = subprocess.run([sys.executable, FOLDER / script, *options, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert keys is None or keys <= set(report)


FAKE_WORKER = """
import sys, time
from common import serve, timing_handlers

def spin():
    until = time.process_time() + float(sys.argv[1])
    while time.process_time() < until:
        pass

def broken():
    raise ValueError("no such thing")

print("this line is no answer", flush=True)
serve(timing_handlers({"spin": lambda: (spin, {"path": "loop"}), "broken": broken}, {"versions": {}, "threads": 1})
      | {"leave": lambda: sys.exit(3)})
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE_WORKER)
    workers = []

    def start(name: str, seconds: float) -> common.Worker:
        workers.append(common.Worker(name, sys.executable, script, str(seconds)))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_workers_are_measured_in_turn_and_rest_in_between(fake):
    workers = [fake("slow", 0.2), fake("fast", 0.05)]
    for worker in workers:
        assert worker.ask("warm", task="spin", calls=1)["note"] == {"path": "loop"}
    rounds = list(common.rounds_in_turn(workers, "spin", {"slow": 1, "fast": 4}, rounds=3))
    result = common.compare(rounds, ours="fast", peer="slow")
    assert result["cpu_seconds_ratio"] == pytest.approx(4, rel=0.2)
    assert result["speedup_lowest"] <= result["speedup"] <= result["speedup_highest"]
    assert max(worker.idle_cpu_seconds for worker in workers) < 0.05


def test_who_goes_first_rotates():
    asked = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def ask(self, do, task, calls):
            asked.append(self.name)
            return {"wall_seconds": 1.0, "cpu_seconds": 1.0}

    list(common.rounds_in_turn([Recorder(n) for n in "abc"], "task", {n: 1 for n in "abc"}, rounds=3))
    assert "".join(asked) == "abcbcacab"


def test_a_worker_in_trouble_says_why(fake):
    worker = fake("mine", 0.0)
    with pytest.raises(common.BenchmarkError, match=r"'mine' cannot warm: ValueError: no such thing"):
        worker.ask("warm", task="broken", calls=1)
    assert worker.ask("warm", task="spin", calls=1)["seconds"] >= 0  # and goes on
    with pytest.raises(common.BenchmarkError, match=r"'mine' ended with exit code 3"):
        worker.ask("leave")


def test_speedup_is_the_median_of_the_ratios_per_round():
    seconds = [(2.0, 1.0), (9.0, 3.0), (40.0, 10.0)]  # a machine that gets slower and slower
    rounds = [
        {"peer": {"wall_seconds": p, "cpu_seconds": p}, "ours": {"wall_seconds": o, "cpu_seconds": o}} for p, o in seconds
    ]
    assert common.compare(rounds, "ours", "peer") == {
        "speedup": 3.0,
        "speedup_lowest": 2.0,
        "speedup_highest": 4.0,
        "cpu_seconds_ratio": 3.0,
    }


def test_summary_names_ratios_in_words():
    side = lambda seconds: {"wall_seconds": seconds, "cpu_seconds": seconds, "cores_used_by_others": 0.0}
    result = {
        "rounds": [{versus.PEER: side(3.0), "gau": side(1.0), "attention": side(2.0)}],
        "notes": {name: {"path": "a way"} for name in versus.SIDES},
        "first_call_seconds": dict.fromkeys(versus.SIDES, 5.0),
    }
    memory = {
        versus.PEER: {"peak_megabytes": 900.0, "imported_megabytes": 300.0},
        "gau": {"peak_megabytes": 300.0, "imported_megabytes": 100.0},
        "attention": {"peak_megabytes": 450.0, "imported_megabytes": 150.0},
    }
    figures = versus.summarise(dict.fromkeys(versus.TASKS, result), memory)
    for task in versus.TASKS:
        assert (figures[f"{task}_speedup_gau"], figures[f"{task}_speedup_attention"]) == (3.0, 1.5)
    assert figures["few_steps_2_gau_over_16_evaluations_of_transfusion_pytorch"] == 3.0
    assert figures["few_steps_2_attention_over_16_evaluations_of_attention"] == 1.0
    assert figures["peak_memory_ratio_gau"] == 3.0 and figures["peak_memory_above_imports_ratio_attention"] == 2.0
    assert "3.00 times as fast" in versus.table(figures, list(versus.TASKS))


@pytest.mark.parametrize("block", versus.OURS)
def test_speed_tasks_do_the_stated_work(block):
    """Rows are as long as stated, images and exactly 64 tokens come out (the worker itself checks them)."""
    sizes = versus.SIZES | {
        "width": 64,
        "attention_layers": 1,
        "gau_layers": 1,
        "batch": 2,
        "pieces": 2,
        "image_steps": 2,
        "seed": 0,
    }
    with common.Worker(block, sys.executable, FOLDER / "workers" / "mmdiff_speed.py", json.dumps(sizes), block) as worker:
        note = worker.ask("warm", task="train_step", calls=1)["note"]
        assert note["positions_per_row"] == 1 + 32 + 3 + 64
        for task in ("image_batch_1", "few_steps_2", "text_64_tokens_batch_1") if block == "gau" else ():
            assert worker.ask("warm", task=task, calls=1)["seconds"] > 0
        assert worker.ask("time", task="train_step", calls=2)["wall_seconds"] > 0


def test_frechet_distance():
    random = np.random.default_rng(0)
    greys = random.uniform(0, 16, (300, 64))
    assert digits_data.frechet(greys, greys) == pytest.approx(0, abs=1e-6)
    assert digits_data.frechet(greys, greys + 1.6) == pytest.approx(64 * 0.1**2)  # a shift moves the means only
    centred = greys - greys.mean(axis=0)
    spread = np.trace(np.cov(centred / 16, rowvar=False))
    assert digits_data.frechet(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * spread)


def test_anchors_of_the_digits_protocol():
    digits_set = digits_data.load()
    assert (len(digits_set.train), len(digits_set.held_out)) == (1437, 360)
    anchors = digits_data.Judge(digits_set).anchors()
    assert anchors["real_images_frechet_distance"] == pytest.approx(0.234, abs=5e-4)
    assert anchors["classifier_accuracy"] == pytest.approx(0.989, abs=5e-4)


def test_digits_survive_as_pixels():
    grey = np.arange(64) % 17.0
    pixels = digits_data.to_pixels(grey)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 and pixels.max() == 255
    assert np.array_equal(np.rint(digits_data.to_grey(pixels)), grey)


def test_captions_must_be_the_exact_name():
    assert digits_data.caption_accuracy(["zero", "one ", "two"], np.asarray([0, 1, 3])) == pytest.approx(1 / 3)


def test_digits_keeps_to_its_limits():
    cfg, digits_set = digits.config(), digits_data.load()
    learner = digits.Learner(cfg, digits_set)
    assert learner.parameters <= digits.MOST_PARAMETERS
    assert learner.documents_per_step <= digits.DOCUMENTS_PER_STEP * 1.01
    larger = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, batch_size=2 * cfg.training.batch_size))
    with pytest.raises(common.BenchmarkError, match=r"lower training\.batch_size"):
        digits.Learner(larger, digits_set)
    wider = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, width=2 * cfg.model.width))
    with pytest.raises(common.BenchmarkError, match="parameters are more than"):
        digits.Learner(wider, digits_set)


def test_digits_learns_and_is_judged(monkeypatch):
    monkeypatch.setattr(digits, "EVALUATIONS", (2,))
    monkeypatch.setattr(digits, "GUIDANCES", (1.0,))
    monkeypatch.setattr(digits, "RESULT", {"steps": 2, "guidance": 1.0})
    cfg = digits.config(steps=2)
    tiny = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, width=32, depth=1))
    digits_set = digits_data.load()
    few = dataclasses.replace(digits_set, held_out=digits_set.held_out[:60], held_out_labels=digits_set.held_out_labels[:60])
    learner = digits.Learner(tiny, digits_set)
    blocks = digits.learn(learner, None)
    figures, drawn = digits.evaluate(learner.model(), few, digits_data.Judge(few), seed=0)
    figures |= digits.speed(blocks) | {"parameters": learner.parameters, "real_images_frechet_distance": 0.234}
    assert drawn.shape == (200, 64) and drawn.min() >= 0 and drawn.max() <= 16
    assert digits_data.sheet(drawn, rows=3).shape == (3 * 9 * 6, 10 * 9 * 6, 3)
    assert {"caption_accuracy", "class_accuracy", "frechet_distance", "seconds_per_step"} <= set(figures)
    assert "mmdiff" in digits.table(figures)


def test_digits_in_few_steps(monkeypatch):
    monkeypatch.setattr(few_steps, "SETS", 1)
    monkeypatch.setattr(few_steps, "STEPS", (2,))
    monkeypatch.setattr(few_steps, "TUNED", (2,))
    monkeypatch.setattr(few_steps, "FEW_EVALUATIONS", (1,))
    cfg = digits.config(steps=2)
    tiny = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, width=32, depth=1))
    figures = few_steps.run(tiny, 2, ["shortcut", "difference"])
    ordinary, few, _ = figures["models"]
    assert [(rung["grid"], rung["steps"]) for rung in ordinary["drawings"]] == [("uniform_logsnr", 2), ("tuned", 2)]
    assert [(rung["solver"], rung["steps"]) for rung in few["drawings"]] == [("few_step", 1)]
    assert all(0 <= model["caption_accuracy"] <= 1 for model in figures["models"])
    assert "shortcut" in few_steps.table(figures) and set(figures["seconds_per_step"]) == {"ordinary", "shortcut", "difference"}


def test_documents_hold_a_name_and_its_image():
    (document,) = digits_data.documents(np.zeros((1, 64)), np.asarray([7]))
    assert document == Document("seven", Image(np.zeros((8, 8, 3), np.uint8)))


@pytest.mark.parametrize("script", ["vs_transfusion_pytorch.py", "digits.py", "few_steps.py"])
def test_help_has_examples(script):
    done = subprocess.run([sys.executable, str(FOLDER / script), "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout and "--json" in done.stdout
