"""A sweep that is killed and started again ends with the figures of one that never was. Real runs, killed by SIGKILL.

MMDIFF_TEST_KILLS=N kills the sweep N times, not once, at random moments one after another.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from mmdiff.config import Config
from mmdiff.sweeps.children import Children
from mmdiff.sweeps.conduct import measured_apart
from mmdiff.sweeps.plan import Unmeasured
from mmdiff.sweeps.results import read_results
from mmdiff.sweeps.table import final_table, markdown
from tests.sweeps.conftest import tiny_config

KILLS = int(os.environ.get("MMDIFF_TEST_KILLS", "1"))
STEPS = 12

SWEEP = """
from mmdiff.sweeps.sweep import Sweep
from tests.sweeps.conftest import tiny_config

def sweep():
    return Sweep(question="Does depth help?", arms={"one": tiny_config(), "two": tiny_config(depth=2)}, baseline_seeds=1)
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, mmdiff_command):
    """`sweep(workdir, *options)` runs `mmdiff sweep` on a tiny file."""
    path = tmp_path_factory.mktemp("sweep") / "tiny.py"
    path.write_text(SWEEP)
    budget = f"{STEPS}steps-per-arm"
    root = str(Path(__file__).parents[2])

    def run(workdir, *options, **how):
        return mmdiff_command("sweep", path, "--budget", budget, "--workdir", workdir, *options, PYTHONPATH=root, **how)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sweep):
    """The workdir of a sweep that was never interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "sweep"
    done = sweep(workdir)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "2 of 2 runs finished" in done.stdout
    return workdir


def quality(workdir) -> str:
    """The final table without what depends on the machine's speed."""
    return markdown(final_table(read_results(workdir), costs=False))


def last_steps(workdir) -> int:
    """Validations that the runs of a sweep have written, over all arms."""
    return sum(path.read_bytes().count(b"x_error_10") for path in workdir.glob("arms/*/seed-*/metrics.jsonl"))


def curves(workdir):
    return [[(run.run.name, run.curve) for run in arm.runs] for arm in read_results(workdir).arms]


def test_a_whole_sweep_has_what_a_report_needs(whole):
    assert last_steps(whole) == 2 * STEPS
    assert "± -" in quality(whole) and "?" in quality(whole)
    assert all(arm.average("step_seconds") > 0 and arm.average("seconds") > 0 for arm in read_results(whole).arms)
    plan = json.loads((whole / "sweep.json").read_text())
    assert plan["command"].startswith("mmdiff sweep ") and plan["environment"]["jax"] and plan["code"][0]["fingerprint"]


def test_killed_at_any_moment_and_started_again_it_is_the_same_sweep(whole, sweep, tmp_path):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    shutil.copy(whole / "sweep.json", workdir)  # measured already, and never again
    after = sorted(random.SystemRandom().sample(range(1, 2 * STEPS - 2), KILLS))  # truly random: always other moments
    for moment in after:
        process = sweep(workdir, start=True, group=True)
        limit = time.monotonic() + 200
        while last_steps(workdir) < moment and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.001)
        assert process.poll() is None, f"not killed after {moment} validations: {process.communicate()}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert "-" in quality(workdir).splitlines()[-1], f"nothing was left to do after {moment} validations"
    done = sweep(workdir)
    assert done.returncode == 0, f"killed after {after} validations: {done.stderr}{done.stdout}"
    assert "measur" not in done.stdout
    assert quality(workdir) == quality(whole), f"killed after {after} validations"
    assert curves(workdir) == curves(whole), f"killed after {after} validations"
    assert (workdir / "sweep.json").read_bytes() == (whole / "sweep.json").read_bytes()
    path = workdir / "arms" / "two" / "seed-0" / "evaluation.json"
    path.write_text(json.dumps({"x_error": json.loads(path.read_text())["x_error"] * 1.01}))
    assert quality(workdir) != quality(whole)  # the comparison can fail


def test_a_configuration_that_cannot_be_measured_is_one_line(tmp_path):
    cfg = json.loads(tiny_config().to_json())
    cfg["data"] |= {"source": "documents", "path": str(tmp_path / "nowhere"), "generator": []}
    with Children() as children, pytest.raises(Unmeasured, match=r"nowhere/documents\.jsonl not found"):
        measured_apart(Config.from_json(json.dumps(cfg)), children, "lost", ["x_error"])
