"""Reports from workdirs made by hand: the numbers, what is marked, and that the page needs nothing but itself."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import PIL.Image
import pytest
import scipy.stats

from mmdiff.cli.main import main
from mmdiff.sweeps.charts import Series, line_chart, linear_ticks, spread
from mmdiff.sweeps.plan import Unmeasured
from mmdiff.sweeps.results import mean_and_interval, read_results, within_noise
from mmdiff.sweeps.table import cautions, final_table, findings, markdown, short
from tests.sweeps.conftest import fake_run, measured, plan_for, tiny_config, tiny_sweep

OTHER = {"version": "1", "fingerprint": "g"}
VALUES = {"base": [0.10, 0.12, 0.11], "far": [0.20, 0.22], "near": [0.14, 0.15], "lost": []}


def fails(name, cfg):
    if name == "lost":
        raise Unmeasured("data/<mine> not found")
    return measured(name, cfg)


@pytest.fixture
def workdir(tmp_path):
    """A finished sweep of four arms, one of which could not be measured."""
    arms = {name: tiny_config(name) for name in VALUES}
    plan_for(tmp_path, tiny_sweep(arms=arms, baseline_seeds=3, seeds=2), measure=fails)
    for arm, values in VALUES.items():
        for seed, value in enumerate(values):
            folder = tmp_path / "arms" / arm / f"seed-{seed}"
            fake_run(folder, [(5, 0.9), (10, 2 * value), (20, value)], {"x_error": value}, 0.25)
            (folder / "samples").mkdir()
            PIL.Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / "samples" / "0000020.png")
    return tmp_path


def rows(workdir, **how):
    header, *body = final_table(read_results(workdir), **how)
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def test_means_and_intervals_agree_with_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 3, 7):
        values = rng.normal(size=n)
        mean, half = mean_and_interval(values)
        low, high = scipy.stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
        np.testing.assert_allclose((mean - half, mean + half), (low, high), rtol=1e-9)
        assert not np.isclose(half, 1.96 * scipy.stats.sem(values), rtol=0.1)  # the normal's would be too narrow
    assert mean_and_interval([0.3]) == (0.3, None)


def test_within_noise_is_a_test_of_level_five_percent():
    """Arms that are the baseline over again are marked 95 times in 100, whatever their number of seeds."""
    rng = np.random.default_rng(1)
    for n in (1, 3):
        marked = np.mean([within_noise(rng.normal(size=n), rng.normal(size=3)) for _ in range(4000)])
        assert 0.94 < marked < 0.96
        assert np.mean([within_noise(rng.normal(9, size=n), rng.normal(size=3)) for _ in range(400)]) < 0.5
    assert within_noise([1.0], [1.0]) is None


def test_the_table_has_the_numbers(workdir):
    table = rows(workdir)
    assert table["base"]["x_error ↓"] == "0.1100 ± 0.025" and table["base"]["ratio"] == "1"
    assert table["far"]["x_error ↓"] == "0.2100 ± 0.13" and table["far"]["ratio"] == "1.909"
    assert table["near"]["ratio"] == "1.318 ≈" and table["near"]["seeds"] == "2"
    expected = {"steps": "20", "parameters": "1.00 k", "FLOPs per step": "1.00 M", "step time": "250 ms", "total time": "0:13"}
    assert {name: table["far"][name] for name in expected} == expected
    assert set(table["lost"].values()) == {"lost", "0 of 2", "-"}
    assert list(rows(workdir, costs=False)["far"]) == ["arm", "seeds", "x_error ↓", "ratio"]


def test_one_seed_has_no_interval_and_one_baseline_seed_no_noise(tmp_path):
    plan_for(tmp_path, tiny_sweep(baseline_seeds=1))
    for arm, value in (("one", 0.1), ("two", 0.2)):
        fake_run(tmp_path / "arms" / arm / "seed-0", [(20, value)], {"x_error": value})
    assert rows(tmp_path)["two"]["x_error ↓"] == "0.2000 ± -" and rows(tmp_path)["two"]["ratio"] == "2.000 ?"
    assert "may be chance" in findings(read_results(tmp_path))[1]


def test_a_value_that_is_no_number_is_never_averaged_away(workdir):
    (workdir / "arms" / "far" / "seed-1" / "evaluation.json").write_text('{"x_error": null}')
    assert rows(workdir)["far"]["x_error ↓"] == "not finite" and rows(workdir)["far"]["ratio"] == "-"


def test_findings_say_which_way_and_whether_it_is_chance(workdir):
    told = findings(read_results(workdir))
    assert told[0] == "x_error (lower is better) of base, the baseline: 0.1100."
    assert told[1] == "far: 0.2100, 91% worse; more than chance, by how far seeds of base lie apart."
    assert told[2] == "near: 0.1450, 32% worse; may be chance, by how far seeds of base lie apart." and len(told) == 3
    for arm in ("base", "far"):  # the same numbers of a metric of which more is better
        for path in (workdir / "arms" / arm).glob("*/evaluation.json"):
            path.write_text(path.read_text().replace("x_error", "image_accuracy"))
    assert "91% better" in findings(read_results(workdir))[1]


class Loaded(html.parser.HTMLParser):
    """Everything in a page that a browser would fetch or run."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.found += re.findall(r"url\(|@import|https?://", text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "xlink:href") and not (value or "").startswith("data:"):
                self.found.append(value)
            if name.startswith("on"):
                self.found.append(name)


@pytest.mark.parametrize("bad", ['<script src="a.js">', '<img src="a.png">', "<p onclick=x>", "<style>@import 'a'</style>"])
def test_the_check_for_what_a_page_loads_can_fail(bad):
    assert Loaded(bad).found


def test_the_page_holds_everything_itself(workdir, capsys):
    assert main(["report", str(workdir)]) == 0
    page = (workdir / "report.html").read_text()
    loaded = Loaded(page)
    assert not loaded.found
    assert loaded.tags.count("img") == 3 and page.count("data:image/png;base64,") == 3
    assert loaded.tags.count("figure") == 3 and "prefers-color-scheme: dark" in page and "viewport" in page
    assert "data/&lt;mine&gt; not found" in page and "data/<mine>" not in page
    for told in ("Does a second layer help?", "abacus", "seed 0, step 20", "--arms far --budget 20steps-per-arm"):
        assert told in page
    assert "91% worse" in capsys.readouterr().out


def test_the_same_workdir_gives_the_same_bytes(workdir, tmp_path):
    def made(name):
        assert main(["report", str(workdir), "--out", str(tmp_path / name)]) == 0
        return [(tmp_path / name / file).read_bytes() for file in ("report.html", "report.md")]

    first = made("a")
    assert made("b") == first
    run = workdir / "arms" / "far" / "seed-0"
    (run / "evaluation.json").write_text(json.dumps({"x_error": 0.2001}))
    assert made("c") != first


def test_what_makes_arms_hard_to_compare_is_told(workdir):
    """The plan says 100 ms for a step; every run took 250."""
    assert [what for what, _ in cautions(read_results(workdir))] == ["base", "far", "near"]
    main(["report", str(workdir)])
    assert "far: a step took 250 ms, and 100 ms when the plan was made" in (workdir / "report.md").read_text()
    for path in workdir.rglob("goodput.json"):
        path.write_text('{"now": {"step": 2.1}}')
    assert not cautions(read_results(workdir))
    plan_for(
        workdir, tiny_sweep(arms={n: tiny_config(n) for n in VALUES}, baseline_seeds=3, seeds=2), measure=fails, code=OTHER
    )
    assert [what for what, _ in cautions(read_results(workdir))] == ["code"]


def test_the_markdown_table_can_be_pasted(workdir):
    main(["report", str(workdir)])
    text = (workdir / "report.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(VALUES) and len({line.count("|") for line in lines}) == 1
    assert text.startswith("# Does a second layer help?\n") and "- lost: data/<mine> not found" in text
    assert markdown([["a|b"], ["c"]]) == "| a\\|b |\n| --- |\n| c |"


def test_an_unfinished_sweep_says_what_is_missing(tmp_path):
    plan_for(tmp_path, tiny_sweep(seeds=2), arms=["one", "two"])
    arms = tmp_path / "arms"
    fake_run(arms / "one" / "seed-0", [(5, 0.9), (20, 0.1)], {"x_error": 0.1})
    fake_run(arms / "one" / "seed-1", [(5, 0.8)])
    fake_run(arms / "two" / "seed-0", [(5, 0.8)], failed={"code": 70, "reason": "diverged"})
    results = read_results(tmp_path)
    assert results.missing == [("one seed-1", "step 5 of 20"), ("two seed-1", "not started")]
    assert results.failed == [("two seed-0", "exit code 70: diverged")]
    assert rows(tmp_path)["one"]["seeds"] == "1 of 2" and rows(tmp_path)["two"]["x_error ↓"] == "-"
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "one seed-1: step 5 of 20" in page and "two seed-0: exit code 70: diverged" in page and "<svg" in page


def test_a_sweep_of_which_nothing_ran_has_a_report(tmp_path):
    plan_for(tmp_path, tiny_sweep())
    assert main(["report", str(tmp_path)]) == 0
    assert rows(tmp_path)["two"]["x_error ↓"] == "-"
    assert "not started" in (tmp_path / "report.md").read_text()


def test_no_sweep_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 65
    said = capsys.readouterr().err
    assert "sweep.json not found" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
    assert main(["report", str(tmp_path), "--otu", "x"]) == 2


def test_charts_stay_inside_and_labels_apart():
    arms = [Series(f"arm{i}", i, [(10.0, 1.0), (200.0, 0.1 + i * 1e-4)], []) for i in range(6)]
    svg = line_chart(arms, "training step", "validation x_error")
    assert "(log scale)" in svg and svg.count('class="mean"') == 6
    heights = [float(y) for y in re.findall(r'class="name" style="[^"]*" x="[^"]*" y="([^"]*)"', svg)]
    assert min(np.diff(sorted(heights))) >= 13.9
    numbers = [float(v) for v in re.findall(r"[ML](\d+\.\d) ", svg)]
    assert numbers and min(numbers) >= 0 and max(numbers) <= 440
    assert line_chart([dataclasses.replace(arms[0], mean=[])], "x", "y") == ""
    assert "polite" not in line_chart([Series("<polite>", 0, [(1.0, 1.0)], [])], "x", "y").replace("&lt;polite&gt;", "")
    assert spread([5, 5, 6], 10, 0, 20) == [0, 10, 20] and linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert [short(n) for n in (7, 1234, 2.1e6, 2.5e10)] == ["7.00", "1.23 k", "2.10 M", "25.0 G"]
