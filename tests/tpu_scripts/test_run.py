"""setup, sync, run, status, logs, stop: on hosts that are folders, with the scripts that real hosts would run."""

import os
import subprocess

import pytest

from .conftest import Cloud, commit, git, make_repository

TRAIN = ["--", "mmdiff", "train", "a b.py", "--workdir", "/mnt/runs/one", "--note", 'it\'s "$HOME"  *; exit 9\nnew line']


def host(cloud, number=0):
    return cloud.fake / "hosts" / str(number)


def last(text):
    return text.splitlines()[-1]


def test_setup_reaches_each_host_once_before_all_of_them(cloud):
    cloud.write("deaf", 2)  # new hosts do not answer at once
    cloud.ready(workers=2)
    workers = [argument for call in cloud.calls("ssh") for argument in call if argument.startswith("--worker")]
    assert workers == ["--worker=0"] * 3 + ["--worker=1"] + ["--worker=all"] * 2
    assert [(host(cloud, n) / ".mmdiff_worker").read_text() for n in (0, 1)] == ["0\n", "1\n"]


def test_setup_installs_once_and_again_when_the_requirements_change(tmp_path):
    cloud = Cloud(tmp_path, make_repository(tmp_path / "repository"))
    cloud.ready()
    installed = ["venv --quiet --python 3.12 .venv", "pip install --quiet --python .venv/bin/python --editable .[tpu]"]
    assert cloud.read("uv").splitlines() == installed
    cloud.run("setup.sh")
    assert cloud.read("uv").splitlines() == installed
    (cloud.repository / "tpu_scripts" / "constraints.txt").write_text("jax==0.10.2\n")
    commit(cloud.repository)
    cloud.run("setup.sh")
    assert cloud.read("uv").splitlines()[2:] == [
        installed[1].replace("--editable", "--constraints tpu_scripts/constraints.txt --editable")
    ]


def test_sync_sends_the_commit_and_removes_what_is_no_longer_in_it(tmp_path):
    cloud = Cloud(tmp_path, make_repository(tmp_path / "repository"))
    module = cloud.repository / "old module.py"
    module.write_text("")
    first = commit(cloud.repository)
    cloud.run("sync.sh")
    code = host(cloud) / "mmdiff"
    (code / "runs").mkdir()
    (code / "runs" / "mine").write_text("")
    assert (code / "old module.py").exists() and (code / "COMMIT").read_text() == f"{first}\n"

    module.unlink()
    (cloud.repository / "setup.py").write_text("# changed\n")
    assert "--dirty" in cloud.run("sync.sh", code=2).stderr
    cloud.run("sync.sh", "--dirty")
    assert (code / "COMMIT").read_text() == f"{first}-dirty\n"
    assert (code / "setup.py").read_text() == "# changed\n"
    assert not (code / "old module.py").exists() and (code / "runs" / "mine").exists()
    assert git(cloud.repository, "stash", "list") == ""  # the working tree is as it was
    assert (cloud.repository / "setup.py").read_text() == "# changed\n"

    cloud.run("sync.sh", "--commit", first)
    assert (code / "COMMIT").read_text() == f"{first}\n" and (code / "old module.py").exists()


def test_a_command_arrives_word_for_word(cloud):
    cloud.ready(workers=2)
    cloud.run("run.sh", "--xla", "overlap,vmem", *TRAIN)
    cloud.wait("job exit 0")
    for number in (0, 1):
        (call,) = cloud.trained(number)
        assert call["argv"] == TRAIN[2:]
        assert call["commit"] == git(cloud.repository, "rev-parse", "HEAD")
        assert "--xla_tpu_scoped_vmem_limit_kib=98304" in call["LIBTPU_INIT_ARGS"].split()
    log = (host(cloud) / "mmdiff-jobs" / "latest" / "job.log").read_text()
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in log and log.endswith("a step\n")


def test_without_a_set_no_flags_are_passed(cloud):
    cloud.ready()
    cloud.run("run.sh", *TRAIN)
    cloud.wait("job exit 0")
    assert cloud.trained()[0]["LIBTPU_INIT_ARGS"] == ""


@pytest.mark.parametrize(
    "codes, worst",
    [
        ((0, 0, 0), 0),
        ((0, 75, 0), 75),
        ((75, 1, 75), 1),
        ((134, 139, 1), 1),
        ((1, 70, 75), 70),
        ((137, 65, 70), 65),
        ((65, 2, 1), 2),
    ],
)
def test_the_worst_code_decides(cloud, codes, worst):
    script = f"HELP=; source {cloud.repository}/tpu_scripts/common.sh; worst_code {' '.join(map(str, codes))}"
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout == f"{worst}\n"


def test_status_tells_each_host_and_the_job(cloud):
    cloud.ready(workers=3)
    assert last(cloud.run("status.sh").stdout) == "job none"
    cloud.write("codes.0", "hang")
    cloud.write("codes.1", 75)
    cloud.write("codes.2", 1)
    cloud.start(*TRAIN)
    status = cloud.wait("job failing 1").splitlines()
    assert status[0] == "tpu name ACTIVE"
    assert [line.split()[3:] for line in status[1:-1]] == [["running"], ["exit", "75"], ["exit", "1"]]
    cloud.run("stop.sh")
    cloud.wait("job exit 1")


def test_status_of_a_tpu_that_is_not_there(cloud):
    cloud.write("states", "SUSPENDED")
    assert cloud.run("status.sh").stdout == "tpu name SUSPENDED\njob unknown\n"


def test_a_host_that_missed_the_start_makes_the_job_unknown(cloud):
    cloud.ready(workers=2)
    cloud.run("run.sh", *TRAIN)
    cloud.wait("job exit 0")
    cloud.write("workers", 1)
    cloud.run("run.sh", *TRAIN)  # reaches host 0 only
    cloud.write("workers", 2)
    cloud.wait("job unknown")


def test_a_job_that_vanished_counts_as_killed(cloud):
    cloud.ready()
    cloud.write("codes.0", "hang")
    cloud.start(*TRAIN)
    cloud.wait("job running")
    cloud.end()  # as a restart of the host would: without a word
    status = cloud.wait("job exit 137")
    assert status.splitlines()[1].endswith(" lost")


def test_one_job_at_a_time_and_no_new_code_under_it(cloud):
    cloud.ready()
    cloud.write("codes.0", "hang", 0)
    cloud.start(*TRAIN)
    cloud.wait("job running")
    assert "a job runs already" in cloud.run("run.sh", *TRAIN, code=1).stderr
    assert "a job runs here" in cloud.run("sync.sh", code=1).stderr
    cloud.run("stop.sh")
    cloud.wait("job exit 75")
    cloud.run("sync.sh")
    cloud.run("run.sh", *TRAIN)
    cloud.wait("job exit 0")


def test_stop_waits_for_the_save_and_kills_only_when_told(cloud):
    cloud.ready()
    assert "no job runs" in cloud.run("stop.sh").stdout
    cloud.write("codes.0", "stubborn")
    cloud.start(*TRAIN)
    assert "stop.sh --kill" in cloud.run("stop.sh", "--wait", "0", code=1).stderr
    assert last(cloud.run("status.sh").stdout) == "job running"
    cloud.run("stop.sh", "--wait", "0", "--kill")
    cloud.wait("job exit 137")


def test_what_an_ended_job_left_behind_does_not_block_the_next(cloud):
    cloud.ready()
    cloud.run("run.sh", "--", "bash", "-c", "sleep 60 & exit 1")
    cloud.wait("job exit 1")
    cloud.run("run.sh", *TRAIN)
    cloud.wait("job exit 0")


def test_logs(cloud):
    cloud.ready(workers=2)
    cloud.run("run.sh", *TRAIN)
    cloud.wait("job exit 0")
    assert last(cloud.run("logs.sh").stdout) == "a step"
    assert cloud.run("logs.sh", "--worker", "all", "--lines", "1").stdout == "[0] a step\n[1] a step\n"
    cloud.run("logs.sh", "--save", str(cloud.folder / "logs"))
    assert sorted(os.listdir(cloud.folder / "logs")) == ["worker-0.log", "worker-1.log"]


def test_profile_is_a_run_with_profile(cloud):
    cloud.ready()
    cloud.run("profile.sh", "--steps", "20:25", *TRAIN)
    cloud.wait("job exit 0")
    assert cloud.trained()[0]["argv"] == [*TRAIN[2:], "--profile", "20:25"]
    told = cloud.run("profile.sh", "--dry-run", "--fetch", str(cloud.folder / "trace"), "--workdir", "/mnt/runs/one").stdout
    assert "/mnt/runs/one/profile" in told and "--worker=0" in told
    assert "20:25" in cloud.run("profile.sh", *TRAIN, code=2).stderr
