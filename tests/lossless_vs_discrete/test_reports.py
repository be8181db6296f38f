"""What becomes of results: scripts that go on, joint training on equal terms, pictures, the report."""

import json
import os
import runpy
import subprocess

import pytest
from matplotlib.figure import Figure

from . import FOLDER


@pytest.mark.parametrize("script", ["all.sh", "systems.sh"])
def test_scripts_run_commands_that_there_are(tmp_path, script):
    """With something else in place of mmdiff and python, which writes down what it is asked for."""
    here = tmp_path / "experiments" / FOLDER.name
    here.mkdir(parents=True)
    for name in (script, "lanes.sh"):
        (here / name).write_bytes((FOLDER / name).read_bytes())
    for name in ("mmdiff", "python"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $@" >> {tmp_path}/calls\n')
        (tmp_path / name).chmod(0o755)

    def run():
        environment = os.environ | {"BIN": str(tmp_path), "WORDS": "words", "FACES": "faces"}
        done = subprocess.run(["bash", here / script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("all in 0 minutes"), done.stderr
        return (tmp_path / "calls").read_text().splitlines()

    calls = run()
    assert len(calls) > 10 and run() == calls  # the second time all of it is done
    for call in calls:
        program, *words = call.split()
        file, _, name = words[0 if program == "python" else 1].partition(":")
        text = (FOLDER.parents[1] / file).read_text()
        assert program == "python" or name in runpy.run_path(str(FOLDER.parents[1] / file))
        options = [word for word in words if word.startswith("--")]
        assert words[-1] != "--arms" and (program != "python" or all(f'"{option}"' in text for option in options)), call


def test_arms_are_compared_on_equal_terms(ran):
    joint = ran("joint.py")
    file = joint["HERE"] / "systems.py"
    claims, arms = joint["systems"](file)
    assert claims.startswith("Claims, before any was run") and len(claims.splitlines()) == 1
    settings = {arm: joint["settings"](file, arm, 1, 32) for arm in arms}
    one = settings["raw"]
    for arm, cfg in settings.items():
        assert (cfg.training.seed, cfg.training.steps, cfg.training.checkpoint_every, cfg.training.keep_every) == (1, 32, 2, 2)
        assert (cfg.model.width, cfg.model.depth, cfg.optimizer) == (one.model.width, one.model.depth, one.optimizer), arm
        assert cfg.layout.row_length == one.layout.row_length and cfg.data.generator == one.data.generator
    assert {cfg.layout.images for cfg in settings.values()} == {
        "denoised",
        "read",
        "next_code",
        "masked_code",
        "next_embedding",
    }
    low, high = joint["interval"]([0.5, 0.7, 0.6], [0.01] * 3)
    assert 0.5 < low < 0.56 and 0.64 < high < 0.7
    assert joint["interval"]([0.5], [0.0]) == (0.5, 0.5)
    cost = {"parameters": 10, "positions": 5.0, "flops": 1e9, "flops_with_tokenizer": 2e9}
    records = [
        {"arm": "raw", "seed": seed, "share": share, "metrics": {"image_accuracy": share * (1 + seed), "code_bits": 1.0}} | cost
        for seed in range(2)
        for share in joint["SHARES"]
    ]
    found = joint["summary"](records, "image_accuracy")
    assert found["raw", 0.5][0] == 0.75 and ("read", 1.0) not in found
    assert "| raw | 10 | 1e+09 | 2e+09 |" in joint["table"](records) and "1.500 (" in joint["table"](records)
    floor = joint["unseen"](settings["raw"].data, 100)
    assert (
        all(0.2 < floor[name] < 0.35 for name in ("caption_accuracy", "image_accuracy"))
        and 0.4 < floor["question_accuracy"] < 0.6
    )
    page = joint["page"](records, claims, joint["beside"](settings["raw"].data, 100))
    assert page.count("<svg") == 6 and f"question_accuracy {floor['question_accuracy']:.3f}" in page


def test_the_picture_shows_the_results_that_are_there(ran, tmp_path):
    plots = ran("plots.py")
    cell = {"arm": "VQ 256", "capacity": 8.0, "entropy": 12, "recovered": [0.05, 0.07], "bound": 0.0625}
    rate = {
        "words": {
            "tokenizers": [{"name": "vq", "nominal": 640.0, "entropy": 500.0, "psnr": 20.0}],
            "codecs": [{"name": "PNG", "bits": 9000.0, "header": 500, "psnr": float("inf")}]
            + [{"name": f"JPEG {q}", "bits": 5000.0 + q, "header": 4000, "psnr": 25.0 + q} for q in (5, 10)],
        }
    }
    shares = {"a": 0.9, "b": 0.2}
    right = [{"front_end": name, "reader": "own", "seed": 0, "right": {"odd": shares[name]}} for name in shares]
    drawn = {"image_accuracy": 0.5, "image_accuracy_stderr": 0.01}
    run = [{"arm": "raw", "seed": seed, "share": 1.0, "flops": 2e12, "metrics": drawn} for seed in (0, 1)]

    def panel(draw, found):
        axes = Figure().subplots()
        draw(axes, found)
        return axes

    line = panel(plots["cliff"], [cell]).lines[0]
    assert list(line.get_xdata()) == [4.0] and list(line.get_ydata()) == [pytest.approx(0.06)]
    assert [bar.get_width() for bar in panel(plots["ledger"], rate).patches] == [640.0, 500.0, 8500.0]  # without the header
    assert [list(line.get_xdata()) for line in panel(plots["rate"], rate).lines[::2]] == [[1005.0, 1010.0], [500.0, 640.0]]
    assert [bar.get_height() for bar in panel(plots["readers"], right).patches] == [0.9, 0.2]
    curve = plots["curves"]("systems.py", "image_accuracy")
    assert list(panel(curve, [*run, run[0] | {"arm": "lavit_fixed"}]).lines[0].get_ydata()) == [0.5]
    assert len(panel(curve, [run[0] | {"arm": "lavit_fixed"}]).lines) == 0  # of another file
    (tmp_path / "rate.json").write_text(json.dumps(rate))
    plots["draw"](tmp_path, tmp_path / "all.png")  # most files are missing
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_the_report_says_what_is_lost_won_and_open(ran, tmp_path):
    report = ran("report.py")
    near, far = [(0.50, 0.01), (0.52, 0.01), (0.51, 0.01)], [(0.80, 0.01), (0.82, 0.01), (0.81, 0.01)]
    low, high = report["gain"](far, near, 1)
    assert 0.27 < low < 0.3 < high < 0.33 and report["gain"](far, near, -1)[1] < 0
    assert report["gain"](near, near, 1)[0] < 0 < report["gain"](near, near, 1)[1]
    right = [
        {"front_end": name, "reader": reader, "seed": seed, "count": 300, "right": {"odd": share, "same": 0.9}}
        for name, reader, share in (("raw patches", "own", 0.95), ("vq", "own", 0.3), ("vq", "fixed", 0.99))
        for seed in range(3)
    ]
    shared = {"count": 200, "steps": 800, "parameters": 10, "positions": 5.0, "flops": 1e9, "flops_with_tokenizer": 2e9}
    drawn = {"raw": 0.8, "vq_ar": 0.9, "masked": 0.8, "emu": 0.8}
    runs = [
        shared | {"arm": arm, "seed": seed, "share": 1.0, "metrics": {"image_accuracy": value, "image_accuracy_stderr": 0.01}}
        for arm, value in drawn.items()
        for seed in range(3)
    ]
    found = [*report["of_readers"](right), *report["of_joint"](runs)]
    verdicts = {(c.experiment, c.measure, c.what): c.verdict for c in found}
    assert verdicts == {
        ("E4, what readers of its own read right", "odd", "vq"): "loses",
        ("E4, what readers of its own read right", "same", "vq"): "open",
        ("E5 and E6, at the end", "attributes drawn as asked", "vq_ar"): "wins",
        ("E5 and E6, at the end", "attributes drawn as asked", "masked"): "open",
        ("E5 and E6, at the end", "attributes drawn as asked", "emu"): "open",
    }
    few = [row for row in runs if row["seed"] < 2]  # too few to say how far seeds lie apart
    assert {c.verdict for c in report["of_joint"](few)} == {"open"}
    rates = {"shapes": {"tokenizers": [{"name": "vq", "nominal": 640.0, "entropy": 500.0}]}}
    clocks = [row | {"front_end": "vq_64", "right": {"clock": 0.3 + 0.1 * row["seed"]}} for row in right[3:6]]
    table = report["arms"](runs, rates, [*right, *clocks]).splitlines()
    assert table[2].startswith("| raw | 24,576 |  |  |  |  |  | 0.800 (0.")
    assert table[3].startswith("| vq_ar | 640, 500 |  |  | 0.400 (0.300 to 0.500) |  |  | 0.900 (0.")
    assert table[5].startswith("| emu | 8 vectors |  |  |  |  |  | 0.800 (0.")
    told = {"share": 0.33, "correlation": 0.7, "of_cells_with_bits": 0.6, "of_plain_cells": 0.1, "shares": [0.1, 0.5, 0.3]}
    told |= {"chances": told["shares"], "correlation_of_chances": 0.8}
    kept = [{"seed": 0, "steps": steps, "trained": told, "untrained": told, "entropies": [3, 8, 5]} for steps in (2, 4, 4)]
    restored = [{"name": "inpainting colour / faithful / vote", "accuracy": 0.998}]
    for name, records in (("readers", right), ("joint", runs), ("selector", kept), ("frozen_lm", restored)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    page = report["page"](tmp_path)
    assert "<p>DOES NOT HOLD: not so before training</p>" in page and "0.330, 0.330" in page
    counts = "of 3 comparisons 0 lost, 1 won, 2 open; of the 2 of codes alone 0 lost, 1 won, 1 open"
    assert counts in page and "cliff/results.jsonl" in page
    assert page.count("▲ 0.900<br>") == 1 and page.count("▼ 0.300<br>") == 1
    table = report["from_markdown"]("**words**\n\n| | bits | PSNR |\n| --- | --- | --- |\n| png | | inf |")
    assert table.startswith("<h3>words</h3>") and '<td data-name="bits"></td><td data-name="PSNR">inf</td>' in table
