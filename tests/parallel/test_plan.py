"""`mmdiff plan`: operations against counts by hand, simulated devices, and real TPU topologies without a TPU."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mmdiff import config, config_files
from mmdiff.cli.plan import text
from mmdiff.parallel import plan
from mmdiff.training.flops import counted_flops, training_flops

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(ROOT.glob("experiments/transfusion_*.py"))
SMALL = (
    "--model.width=256",
    "--model.depth=2",
    "--layout.row_length=256",
    "--training.batch_size=8",
    "--data.vocabulary_size=300",
    "--model.patch=8",
    "--data.image_size",
    "32",
    "32",
)


def run(*arguments, **variables):
    command = [sys.executable, "-m", "mmdiff", "plan", *map(str, arguments)]
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | variables
    environment |= {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1"}  # nobody will run the program; half a minute for two
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT, env=environment)


def test_operations_are_counted_through_loops():
    x = jnp.ones((4, 8))
    w = jnp.ones((5, 8, 8))
    once = 2 * 4 * 8 * 8

    def scanned(w, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    def branching(w, x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0])

    assert counted_flops(scanned, w, x) == 5 * once
    assert counted_flops(jax.jit(scanned), w, x) == 5 * once
    assert counted_flops(jax.grad(lambda w, x: scanned(w, x).sum()), w, x) == (5 + 2 * 5) * once
    assert counted_flops(jax.grad(lambda w, x: jax.checkpoint(scanned)(w, x).sum()), w, x) > (5 + 2 * 5) * once
    assert counted_flops(branching, w, x) == 2 * once


@pytest.mark.parametrize("form", ["config", "attention"])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_counted_operations_agree_with_the_count_by_hand(path, form):
    cfg = config_files.load_experiment(f"{path}:{form}")
    found = plan._operations(cfg, plan.vocabulary_size(cfg, None))
    assert found["flops_per_step"] == pytest.approx(found["flops_per_step_by_hand"], rel=0.02)
    # everything but the head and the losses is recomputed: a fourth pass beside the three
    assert 1.2 < found["executed_flops_per_step"] / found["flops_per_step"] < 1.34


def test_the_two_forms_of_an_experiment_cost_about_the_same():
    for path in EXPERIMENTS:
        gau, attention = (training_flops(config_files.load_experiment(f"{path}:{f}"), 32000) for f in ("config", "attention"))
        assert 0.8 < gau / attention < 1.6


@pytest.fixture(scope="module")
def simulated():
    done = run(EXPERIMENTS[0], "--devices", 4, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_simulated_devices(simulated):
    assert simulated["devices"] == 4 and simulated["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert simulated["fits"] is None and simulated["hbm_capacity_bytes"] is None  # nobody knows a CPU's
    assert simulated["rows_per_device"] == 2
    state = 4 * 4 * simulated["parameters"]  # parameters, moving average, two moments
    assert state / 4 < simulated["argument_bytes"] < 1.3 * state / 4
    assert set(simulated["collective_bytes"]) >= {"all-gather", "all-reduce"}
    assert simulated["sampling"]["peak_hbm_bytes"] > 0


def test_the_report_for_people_names_every_figure(simulated):
    told = text(simulated)
    for word in ("parameters", "memory per device", "operations per step", "by hand", "sent per device", "drawing images"):
        assert word in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "0"), "--devices '0' is not a positive number"),
        ((), "give --topology NAME or --devices N"),
        (("--devices", "2", "--model.widht", "3"), "unknown field 'model.widht'; did you mean 'model.width'?"),
    ],
)
def test_usage_errors_are_one_line(arguments, message):
    done = run(EXPERIMENTS[0], *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_mesh_that_does_not_fit_is_one_line():
    done = run(EXPERIMENTS[0], "--devices", 4, "--mesh.fsdp", 3)
    assert done.returncode == 65 and "mesh.fsdp=3" in done.stderr and "Traceback" not in done.stderr


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@needs_libtpu
def test_a_tpu_topology_without_a_tpu():
    done = run(EXPERIMENTS[0], "--topology", "v5e:2x2", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] is True and report["device_kind"].startswith("TPU v5 lite") and report["chips"] == 4
    assert report["peak_hbm_bytes"] < report["hbm_capacity_bytes"] == 16 * 2**30
    assert 0 < report["mfu_bound"] < 1 and report["roofline_step_seconds"] > 0
    assert report["loops_of_unknown_length"] == 0


@needs_libtpu
def test_what_does_not_fit_says_so_and_what_would():
    big = ("--model.width=2048", "--model.depth=2", "--model.remat", "none", "--training.batch_size=64", "--mesh.fsdp=4")
    done = run(
        EXPERIMENTS[0], "--topology", "v5e:2x2", *big, "--data.vocabulary_size=300", "--layout.row_length=8192", "--json"
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] is False
    assert "--model.remat full" in report["remedy"]["options"]
    assert report["remedy"]["peak_hbm_bytes"] < report["hbm_capacity_bytes"]


@needs_libtpu
def test_an_unknown_topology_is_one_line():
    done = run(EXPERIMENTS[0], "--topology", "v5e:3x7")
    assert done.returncode == 65 and "--topology v5e:3x7:" in done.stderr and "Traceback" not in done.stderr


def test_changes_build_on_each_other_and_end():
    cfg = dataclasses.replace(config_files.load_experiment(EXPERIMENTS[0]), training=config.Training(batch_size=8))
    options = [option for option, _ in plan._changes(cfg, 4)]
    assert options == ["--mesh.data 1 --mesh.fsdp -1 --mesh.tensor 1", *(f"--training.accumulate {n}" for n in (2, 4, 8))]
