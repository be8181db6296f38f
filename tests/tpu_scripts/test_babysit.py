"""babysit.sh: which end of a job leads to what. Everything below it (create, setup, run, status) is the real thing."""

import pytest

from .conftest import git

TRAIN = ["--", "mmdiff", "train", "a b.py", "--workdir", "/mnt/runs/one"]
MADE = ["ABSENT", "ACTIVE"]  # create.sh asks twice, and from then on the TPU stays


def babysit(cloud, *arguments, code=0, **environment):
    return cloud.run("babysit.sh", "--spot", *arguments, *TRAIN, code=code, **environment)


def counts(cloud):
    """How often the TPU was asked for, given back, and the trainer started."""
    return len(cloud.calls("create")), len(cloud.calls("delete")), len(cloud.trained())


def test_success_stops_it(cloud):
    cloud.write("states", *MADE)
    cloud.write("codes.0", 0, 1)  # a second start would end otherwise
    assert "done" in babysit(cloud).stderr
    assert counts(cloud) == (1, 0, 1)
    assert cloud.trained()[0]["argv"] == TRAIN[2:]


@pytest.mark.parametrize("end", [2, 65, 70])
def test_what_cannot_succeed_is_not_repeated(cloud, end):
    cloud.write("states", *MADE)
    cloud.write("codes.0", end, 0)  # a second start would succeed
    babysit(cloud, code=end)
    assert counts(cloud) == (1, 0, 1)


def test_preempted_after_a_save_runs_again_uncounted(cloud):
    cloud.write("states", *MADE)
    cloud.write("codes.0", 75, 0)
    said = babysit(cloud, "--crashes", "1", BACKOFF_SECONDS="60").stderr  # one crash would end it, after no minute's pause
    assert counts(cloud) == (1, 0, 2)
    assert "crash" not in said


def test_crashes_in_a_row_end_it_with_their_code_after_pauses_that_double(cloud):
    cloud.write("states", *MADE)
    cloud.write("codes.0", 1, 139, 1, 0)  # a fourth start would succeed
    cloud.program("sleep", 'echo "$1" >>"$FAKE/slept"')
    said = babysit(cloud, code=1, BACKOFF_SECONDS="7").stderr
    assert counts(cloud) == (1, 0, 3)
    assert "crash with code 139, number 2 within 60 minutes" in said
    assert [seconds for seconds in cloud.read("slept").split() if seconds.isdigit() and seconds != "0"] == ["7", "14"]


def test_crashes_far_apart_do_not(cloud):
    cloud.write("states", *MADE)
    cloud.write("codes.0", 1, 1, 0)
    cloud.write("clock", 1000)  # a clock on which an hour passes between two crashes
    cloud.program("date", 'read -r now <"$FAKE/clock"; echo $((now + 3600)) >"$FAKE/clock"; echo "$now"')
    babysit(cloud, "--crashes", "2")
    assert counts(cloud) == (1, 0, 3)


def test_preemption_makes_the_tpu_again_and_resumes_the_same_run(cloud):
    # asked by create (twice), before the start, while running; then by create: deletes, asks, waits; before the start
    cloud.write("states", *MADE, "ACTIVE", "SUSPENDED@trainer.0", "SUSPENDED", "ABSENT", "PROVISIONING", "ACTIVE")
    cloud.write("codes.0", "hang", 0)
    said = babysit(cloud, "--crashes", "1").stderr  # preemption does not count
    assert counts(cloud)[:2] == (2, 1)
    assert "name is SUSPENDED: deleting this request of yours" in said
    assert [call["argv"] for call in cloud.trained()][-1:] == [TRAIN[2:]]
    assert cloud.trained()[-1]["commit"] == git(cloud.repository, "rev-parse", "HEAD")
    assert cloud.read("uv").count("pip install") == 2  # the new TPU knew nothing
    assert "done" in said


def test_preemption_during_setup_is_no_crash(cloud):
    cloud.write("states", *MADE, "ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "ABSENT", "ACTIVE")
    cloud.write("deaf", 4)  # three attempts of setup, then stop
    said = babysit(cloud, "--crashes", "1").stderr
    assert counts(cloud) == (2, 1, 1)
    assert "crash" not in said


def test_setup_that_fails_on_a_tpu_that_stays_is_a_crash(cloud):
    cloud.write("states", *MADE)
    cloud.write("deaf", 1000)
    assert "number 2 within" in babysit(cloud, "--crashes", "2", code=1).stderr
    assert counts(cloud) == (1, 0, 0)


def test_a_tpu_that_somebody_deleted_is_not_made_again(cloud):
    cloud.write("states", *MADE, "ACTIVE", "ACTIVE", "ABSENT")
    cloud.write("codes.0", "hang", 0)
    assert "deleted by somebody" in babysit(cloud, code=1).stderr
    assert counts(cloud)[:2] == (1, 0)


def test_hosts_that_outlive_a_failed_one_are_stopped(cloud):
    cloud.write("workers", 2)
    cloud.write("states", *MADE)
    cloud.write("codes.0", 65)
    cloud.write("codes.1", "hang")
    assert "stopping them" in babysit(cloud, code=65).stderr
    assert counts(cloud) == (1, 0, 1)


def test_it_watches_a_job_that_runs_already(cloud):
    cloud.ready()
    cloud.write("codes.0", "hang", 0)
    cloud.start(*TRAIN)
    cloud.wait("job running")
    # the job is stopped from outside once the babysitter has seen it running; it then runs it again itself
    cloud.program(
        "sleep",
        '[ -e "$FAKE/stopped" ] || { touch "$FAKE/stopped"; kill "$(cat "$FAKE"/hosts/0/mmdiff-jobs/latest/job.pid)"; }',
    )
    assert "watching it" in babysit(cloud).stderr
    assert counts(cloud) == (0, 0, 2)


@pytest.mark.parametrize("workdir", ["runs/one", "gs://bucket/run", ""])
def test_a_workdir_that_would_be_lost_is_refused(cloud, workdir):
    error = cloud.run("babysit.sh", "--spot", "--", "mmdiff", "train", "e.py", "--workdir", workdir, code=2).stderr
    assert "absolute path" in error and cloud.calls() == []


@pytest.mark.parametrize("workdir", [["--workdir=/mnt/runs/one"], ["--workdir", "/shared/run"]])
def test_a_workdir_that_lasts_is_taken(cloud, workdir):
    cloud.run("babysit.sh", "--spot", "--dry-run", "--", "mmdiff", "train", "e.py", *workdir)
