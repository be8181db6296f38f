"""A run that is killed and resumed equals one that never was: its losses are the same floats, bit for bit.

Real runs of the real command, killed by real signals.
"""

import random
import re
import shutil
import signal
import time

import pytest

from mmdiff.training.metrics import read_metrics

STEPS, EVERY = 24, 4

EXPERIMENT = f"""
from mmdiff.config import Config, Data, Layout, Model, Optimizer, Training

def config():
    return Config(
        model=Model(width=48, depth=1, patch=8, key_width=16, lossless=False),
        layout=Layout(row_length=96, max_grid=4),
        data=Data(
            source="shapes", size=40, generator_image_size=24, max_objects=1, vocabulary="bytes", generator=(("draw", 1.0),)
        ),
        optimizer=Optimizer(warmup=2),
        training=Training(
            steps={STEPS}, batch_size=2, log_every=1, checkpoint_every={EVERY}, validate_every=0, sample_every=0
        ),
    )
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory, mmdiff_command):
    """`command(workdir, *options)` runs `mmdiff train` on a tiny experiment."""
    path = tmp_path_factory.mktemp("experiment") / "tiny.py"
    path.write_text(EXPERIMENT)
    return lambda workdir, *options, **how: mmdiff_command("train", path, "--workdir", workdir, *options, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    """The workdir of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = command(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def losses(workdir):
    """(step, losses as hexadecimal floats) of every line, in order."""
    names = ("loss", "text_loss", "image_loss", "grad_norm")
    return [(record["step"], *(float(record[name]).hex() for name in names)) for record in read_metrics(workdir)]


def lines(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def saving(workdir) -> bool:
    """Whether a checkpoint is being written at this moment."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def interrupt(process, number: int, when) -> tuple[int, str]:
    """Send a signal as soon as `when()` holds; returns (exit code, stderr)."""
    limit = time.monotonic() + 200
    while not when() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    if process.poll() is None:
        process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    return process.returncode, errors


def test_every_step_of_the_whole_run_is_logged(whole):
    assert [step for step, *_ in losses(whole)] == list(range(1, STEPS + 1))
    assert len({loss for _, loss, *_ in losses(whole)}) == STEPS


def test_killed_at_any_moment_and_resumed_it_is_the_same_run(whole, command, tmp_path):
    workdir = tmp_path / "run"
    after = random.SystemRandom().randint(1, STEPS - 4)  # truly random: every run of the tests tries another moment
    code, _ = interrupt(command(workdir, start=True), signal.SIGKILL, lambda: lines(workdir) >= after)
    assert code == -signal.SIGKILL, f"not killed after {after} steps"
    assert losses(workdir) == losses(whole)[: lines(workdir)]
    done = command(workdir)
    assert done.returncode == 0, f"killed after {after} steps: {done.stderr}"
    assert losses(workdir) == losses(whole), f"killed after {after} steps"


def test_killed_while_a_checkpoint_is_written(whole, command, tmp_path):
    workdir = tmp_path / "run"
    code, _ = interrupt(
        command(workdir, start=True), signal.SIGKILL, lambda: len(checkpoints(workdir)) >= 1 and saving(workdir)
    )
    assert code == -signal.SIGKILL
    kept = checkpoints(workdir)
    done = command(workdir)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"resuming .* at step ({'|'.join(map(str, kept))})\n", done.stderr)
    assert losses(workdir) == losses(whole)


def test_sigterm_saves_and_exits_with_75(whole, command, tmp_path):
    workdir = tmp_path / "run"
    code, errors = interrupt(command(workdir, start=True), signal.SIGTERM, lambda: lines(workdir) >= 5)
    assert code == 75 and "Traceback" not in errors
    saved = int(re.search(r"stopped by SIGTERM; step (\d+) is saved in ", errors)[1])
    assert checkpoints(workdir)[-1] == saved >= 5
    done = command(workdir)
    assert done.returncode == 0 and f"at step {saved}\n" in done.stderr
    assert losses(workdir) == losses(whole)


def test_another_configuration_is_refused_in_one_line(whole, command):
    done = command(whole, "--training.seed", "1")
    assert done.returncode == 65 and not done.stdout
    assert re.fullmatch(r"mmdiff train: .* was started with training\.seed=0, not 1; use another --workdir.*\n", done.stderr)


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(whole, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    newest = workdir / "checkpoints" / str(STEPS)
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)
    strict = command(workdir, "--strict")
    assert strict.returncode == 65 and f"checkpoint {STEPS}" in strict.stderr and "Traceback" not in strict.stderr
    done = command(workdir)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"checkpoint {STEPS} is damaged \(.*\); using {STEPS - EVERY}\n", done.stderr)
    assert f"at step {STEPS - EVERY}\n" in done.stderr
    assert losses(workdir) == losses(whole)
