"""Compiler flags, GPUs here and under Slurm, and TPUs under GKE."""

import os
import signal
import subprocess
import sys
import time

import pytest

from .conftest import ROOT

TRAIN = ["--", "mmdiff", "train", "a b.py", "--workdir", "/shared/it's"]
TABLE = [
    line.split()
    for line in (ROOT / "tpu_scripts" / "xla_flags.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
FLAGS = {name: sorted({flag for *_, variable, flag in TABLE if variable == name}) for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")}


def test_flags_are_looked_up(cloud):
    assert cloud.run("xla_flags.sh", "v6e", "none").stdout == ""
    assert cloud.run("xla_flags.sh", "v6e", "vmem").stdout == "LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304\n"
    both = cloud.run("xla_flags.sh", "v6e", "slices,vmem").stdout
    assert both.startswith("LIBTPU_INIT_ARGS=--") and both.count("--") == 3
    assert "no set 'vmem' for 'v4'" in cloud.run("xla_flags.sh", "v4", "vmem", code=2).stderr


def test_the_table_puts_every_flag_where_it_is_read():
    for generations, _, variable, flag in TABLE:
        assert set(generations.split(",")) <= {"v4", "v5e", "v5p", "v6e", "tpu7x", "h100"}
        assert variable == ("XLA_FLAGS" if generations == "h100" else "LIBTPU_INIT_ARGS")
        assert flag.startswith("--xla_") and "=" in flag


def knows(program: str, **environment) -> bool:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "PATH": os.environ["PATH"],
    }
    return subprocess.run([sys.executable, "-c", program], env=settings | environment, capture_output=True).returncode == 0


def test_the_installed_compiler_knows_the_gpu_flags():
    program = "import jax; jax.devices()"
    assert knows(program, XLA_FLAGS=" ".join(FLAGS["XLA_FLAGS"]))
    assert not knows(program, XLA_FLAGS="--xla_gpu_enable_async_collectives=true")  # gone: such a flag ends the process


def test_the_installed_compiler_knows_the_tpu_flags():
    pytest.importorskip("libtpu")
    program = "from jax.experimental import topologies; topologies.get_topology_desc('v6e:2x2', 'tpu')"
    assert knows(program, LIBTPU_INIT_ARGS=" ".join(FLAGS["LIBTPU_INIT_ARGS"]))
    assert not knows(program, LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true")


def test_local_gpus(cloud):
    cloud.write("codes.0", 75)
    cloud.run("gpu_local.sh", "--gpus", "0,1", "--xla", "deterministic", *TRAIN, code=75, XLA_FLAGS="--xla_mine=1")
    assert cloud.trained() == [
        {
            "argv": TRAIN[2:],
            "commit": "",
            "LIBTPU_INIT_ARGS": "",
            "XLA_FLAGS": "--xla_mine=1 --xla_gpu_deterministic_ops=true",
            "CUDA_VISIBLE_DEVICES": "0,1",
        }
    ]


@pytest.fixture
def slurm(cloud, tmp_path):
    """A job of two processes, submitted from a copy of the project."""
    submitted = tmp_path / "project"
    submitted.mkdir()
    os.symlink(ROOT / "tpu_scripts", submitted / "tpu_scripts")
    cloud.environment |= {"SLURM_SUBMIT_DIR": str(submitted), "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    cloud.program(
        "srun",
        'echo "$*" >>"$FAKE/srun"; while [[ $1 == --* ]]; do shift; done; for i in 0 1; do SLURM_PROCID=$i "$@" & done; wait',
    )
    cloud.program("scontrol", 'echo "$*" >>"$FAKE/scontrol"')
    return cloud


def test_slurm_runs_one_process_per_gpu_and_ends_with_them(slurm):
    slurm.run("slurm_gpu.sbatch", "--xla", "overlap", *TRAIN)
    for process in (0, 1):
        (call,) = slurm.trained(process)
        assert call["argv"] == TRAIN[2:] and "--xla_gpu_enable_latency_hiding_scheduler=true" in call["XLA_FLAGS"]
    assert slurm.read("scontrol") == ""


def test_slurm_puts_a_preempted_job_back(slurm):
    slurm.write("codes.0", 75)
    slurm.write("codes.1", 75)
    slurm.run("slurm_gpu.sbatch", *TRAIN, code=75)
    assert slurm.read("scontrol") == "requeue 7\n"


@pytest.mark.parametrize("codes, worst", [((75, 1), 1), ((65, 137), 65), ((0, 70), 70)])
def test_slurm_does_not_put_a_failed_job_back(slurm, codes, worst):
    for process, code in enumerate(codes):
        slurm.write(f"codes.{process}", code)
    slurm.run("slurm_gpu.sbatch", *TRAIN, code=worst)
    assert slurm.read("scontrol") == ""


def test_a_signal_to_all_processes_leaves_time_to_save(cloud):
    """Slurm sends SIGTERM to the whole step: the recorder must outlive the trainer, to write its code down."""
    cloud.write("codes.0", "hang")
    prefix = cloud.folder / "job"
    recorder = subprocess.Popen(
        [ROOT / "tpu_scripts" / "worker" / "record.sh", prefix, *TRAIN[1:]], env=cloud.environment, start_new_session=True
    )
    while not cloud.trained():
        time.sleep(0.01)
    os.killpg(recorder.pid, signal.SIGTERM)
    assert recorder.wait(timeout=30) == 75
    assert prefix.with_suffix(".exit").read_text() == "75\n"


def test_slurm_warns_in_time_and_may_requeue():
    lines = (ROOT / "tpu_scripts" / "slurm_gpu.sbatch").read_text().splitlines()
    assert {"#SBATCH --signal=TERM@300", "#SBATCH --requeue"} <= set(lines)


def xpk(cloud, *arguments, **options):
    cloud.program("xpk", 'printf "%s\\n" "$@" >"$FAKE/xpk"')
    ended = cloud.run("xpk_launch.sh", *arguments, **options)
    return cloud.read("xpk").splitlines() or ended.stderr


def test_gke(cloud):
    where = ["--cluster=cluster", "--project=project", "--zone=zone"]
    asked = xpk(cloud, "--image", "i:1", "--spot", "--slices", "2", "--xla", "vmem", *TRAIN, TPU_TYPE="tpu7x-2x2x2")
    assert asked == [
        "workload",
        "create",
        "--workload=name",
        *where,
        "--tpu-type=tpu7x-2x2x2",
        "--num-slices=2",
        "--docker-image=i:1",
        "--spot",
        "--max-restarts=20",
        "--restart-on-exit-codes=1,75",
        "--termination-grace-period-seconds=300",
        "--env=LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=65536",
        "--command=mmdiff train a\\ b.py --workdir /shared/it\\'s",
    ]
    assert xpk(cloud, "--list") == ["workload", "list", *where]
    assert xpk(cloud, "--delete") == ["workload", "delete", "--workload=name", *where]


def test_gke_wants_a_cluster_and_an_image(cloud):
    assert "GKE_CLUSTER is not set" in xpk(cloud, "--image", "i", *TRAIN, code=2, GKE_CLUSTER="")
    assert "--image is missing" in xpk(cloud, *TRAIN, code=2)
