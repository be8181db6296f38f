"""Two real processes: the same losses as one, the same decisions in both, and survival of signals."""

import re
import shutil
import signal

import numpy as np
import pytest

from mmdiff.training.metrics import read_metrics

from .conftest import EVERY, STEPS, checkpoints, losses, wait_for_lines


def test_two_processes_train_as_one(whole, start, tmp_path):
    codes, errors = start(tmp_path / "run", 1).wait()
    assert codes == [0], errors
    one, two = (np.asarray([r["loss"] for r in read_metrics(w)]) for w in (tmp_path / "run", whole))
    assert len(two) == STEPS and len(set(two)) == STEPS
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_a_sigterm_to_one_process_stops_both_at_the_same_step(whole, start, tmp_path):
    """To the first one here, to the other one in the test below."""
    workdir = tmp_path / "run"
    group = start(workdir, 2)
    wait_for_lines(workdir, 2)
    group.signal(signal.SIGTERM, 0)
    codes, errors = group.wait()
    assert codes == [75, 75], errors
    step = int(re.search(r"stopped by SIGTERM; step (\d+) is saved in ", errors[0])[1])
    assert checkpoints(workdir)[-1] == step >= 2
    codes, errors = start(workdir, 2).wait()
    assert codes == [0, 0] and f"at step {step}\n" in errors[0]
    assert losses(workdir) == losses(whole)


def test_a_sigterm_is_heeded_everywhere(whole, start, tmp_path):
    """One run, stopped three times."""
    workdir = tmp_path / "run"
    for event, options, step in (
        ("term-in-compilation", (), 0),
        ("term-in-evaluation", ("--training.validate_every", "3"), 3),
        ("term-in-sampling", ("--training.sample_every", "6"), 6),
    ):
        codes, errors = start(workdir, 2, *options, events={1: event}).wait()
        assert codes == [75, 75], (event, errors)
        assert f"stopped by SIGTERM; step {step} is saved in " in errors[0]
        assert checkpoints(workdir)[-1] == step
    codes, errors = start(workdir, 2).wait()
    assert codes == [0, 0], errors
    assert losses(workdir) == losses(whole)


def test_a_run_moves_from_mesh_to_mesh(whole, start, tmp_path):
    """Eight devices cut in three ways, one after the other, and as many processes as it likes."""
    workdir = tmp_path / "run"
    mesh = lambda *sizes: [x for name, n in zip(("data", "fsdp", "tensor"), sizes, strict=True) for x in (f"--mesh.{name}", n)]
    stop = {0: "term-in-evaluation"}
    for count, devices, sizes, until in ((1, 8, (2, 2, 2), 4), (2, 4, (1, 4, 2), 8), (1, 8, (1, 1, 8), 12)):
        last = until == STEPS
        options = [*mesh(*sizes), "--training.validate_every", 0 if last else until]
        codes, errors = start(workdir, count, *options, events=None if last else stop, devices=devices).wait()
        assert codes == [0 if last else 75] * count, errors
        assert checkpoints(workdir)[-1] == until
    ours, theirs = (np.asarray([r["loss"] for r in read_metrics(w) if "loss" in r]) for w in (workdir, whole))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("configuration", {"each": {1: ["--optimizer.warmup", "3"]}}),
        ("code", {"events": {1: "other-code"}}),
    ],
)
def test_processes_that_differ_do_not_start(start, tmp_path, what, how):
    codes, errors = start(tmp_path / "run", 2, **how).wait()
    assert codes == [65, 65], errors
    for error in errors:
        assert re.search(rf"the processes of this run differ in {what}: \w+ in process 0; \w+ in process 1\.", error)
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_hang_ends_with_the_stacks_of_all_threads(start, tmp_path):
    codes, errors = start(tmp_path / "run", 1, "--training.watchdog", "0.2", events={0: "hang"}).wait()
    assert codes == [1]
    assert "Timeout" in errors[0] and "in never" in errors[0] and "_batches" in errors[0]


def test_a_damaged_checkpoint_is_passed_over_by_both(whole, start, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    data = [p for p in (workdir / "checkpoints" / str(STEPS)).rglob("*") if p.is_file() and p.parent.name == "d"]
    for path in data:
        path.write_bytes(path.read_bytes()[:-100])
    assert data
    codes, errors = start(workdir, 2).wait()
    assert codes == [0, 0], errors
    assert re.search(rf"checkpoint {STEPS} is damaged \(.*\); using {STEPS - EVERY}\n", errors[0])
    assert losses(workdir) == losses(whole)
