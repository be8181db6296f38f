"""SIGKILL at random moments: a resumed run equals one that never was killed (of one process: tests/training/test_resume.py)."""

import os
import random
import signal
import time

import numpy as np
import pytest

from mmdiff.training.metrics import read_metrics

from .conftest import EVERY, STEPS, lines, losses, wait_for_lines

KILLS = int(os.environ.get("MMDIFF_TEST_KILLS", "2"))  # 10 or more on a quiet evening, when one process is tried, too
PROCESSES = [1, 2] if "MMDIFF_TEST_KILLS" in os.environ else [2]


def test_killed_and_resumed_by_one_process(whole, start, tmp_path):
    """Another number of processes: another order of sums, so equal to 1e-5 and not to the bit."""
    workdir = tmp_path / "run"
    after = kill_after_a_random_step(start, workdir)
    codes, errors = start(workdir, 1).wait()
    assert codes == [0], (after, errors)
    ours, theirs = (np.asarray([r["loss"] for r in read_metrics(w)]) for w in (workdir, whole))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("processes", PROCESSES)
def test_random_kills_one_after_another_change_nothing(processes, start, tmp_path):
    """Each at a random moment, which may be in the middle of an asynchronous save; the losses are equal to the bit."""
    options = ("--training.steps", str(40 * KILLS), "--training.checkpoint_every", "7")
    codes, errors = start(tmp_path / "whole", processes, *options).wait()
    assert codes == [0] * processes, errors
    workdir, moments = tmp_path / "run", []
    for _ in range(KILLS):
        done = lines(workdir)
        group = start(workdir, processes, *options)
        wait_for_lines(workdir, min(done + random.SystemRandom().randint(1, 20), 40 * KILLS - 10))
        time.sleep(random.SystemRandom().uniform(0, 0.05))
        group.signal(signal.SIGKILL)
        codes, errors = group.wait()
        assert codes == [-signal.SIGKILL] * processes, (moments, errors)
        moments.append(lines(workdir))
    codes, errors = start(workdir, processes, *options).wait()
    assert codes == [0] * processes, (moments, errors)
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
