"""SIGKILL at random moments: a run that is resumed equals one that never was killed."""

import os
import random
import signal
import time

import numpy as np
import pytest

from mmdiff.training.metrics import read_metrics

from .conftest import EVERY, STEPS, lines, losses, wait_for_lines

KILLS = int(os.environ.get("MMDIFF_TEST_KILLS", "3"))  # 10 or more on a quiet evening


def test_killed_at_a_random_moment_and_resumed_by_two(whole, start, tmp_path):
    workdir = tmp_path / "run"
    after = kill_after_a_random_step(start, workdir)
    codes, errors = start(workdir, 2).wait()
    assert codes == [0, 0], (after, errors)
    assert losses(workdir) == losses(whole), f"killed after {after} steps"


def test_killed_and_resumed_by_one_process(whole, start, tmp_path):
    """Another number of processes: another order of sums, so equal to 1e-5 and not to the bit."""
    workdir = tmp_path / "run"
    after = kill_after_a_random_step(start, workdir)
    codes, errors = start(workdir, 1).wait()
    assert codes == [0], (after, errors)
    ours, theirs = (np.asarray([r["loss"] for r in read_metrics(w)]) for w in (workdir, whole))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_random_kills_one_after_another_change_nothing(start, tmp_path, count):
    """Each at a random moment, which may be in the middle of an asynchronous save; the losses are equal to the bit."""
    options = ("--training.steps", str(40 * KILLS), "--training.checkpoint_every", "7")
    codes, errors = start(tmp_path / "whole", count, *options).wait()
    assert codes == [0] * count, errors
    workdir, moments = tmp_path / "run", []
    for _ in range(KILLS):
        done = lines(workdir)
        group = start(workdir, count, *options)
        wait_for_lines(workdir, min(done + random.SystemRandom().randint(1, 20), 40 * KILLS - 10))
        time.sleep(random.SystemRandom().uniform(0, 0.05))
        group.signal(signal.SIGKILL)
        codes, errors = group.wait()
        assert codes == [-signal.SIGKILL] * count, (moments, errors)
        moments.append(lines(workdir))
    codes, errors = start(workdir, count, *options).wait()
    assert codes == [0] * count, (moments, errors)
    assert losses(workdir) == losses(tmp_path / "whole"), f"killed after {moments} steps"
    assert len(losses(workdir)) == 40 * KILLS


def kill_after_a_random_step(start, workdir) -> int:
    after = random.SystemRandom().randint(EVERY, STEPS - 2)  # truly random: every run of the tests tries another moment
    group = start(workdir, 2)
    wait_for_lines(workdir, after)
    group.signal(signal.SIGKILL)
    codes, errors = group.wait()
    assert codes == [-signal.SIGKILL] * 2, errors
    return after
