"""Runs of two or more real processes on the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdiff.training.metrics import read_metrics

WORKER = Path(__file__).with_name("worker.py")
STEPS, EVERY = 12, 4

EXPERIMENT = f"""
from mmdiff.config import Config, Data, Layout, Mesh, Model, Optimizer, Sampling, Training

def config():
    return Config(
        model=Model(width=48, depth=1, patch=8, key_width=16, lossless=False),
        layout=Layout(row_length=96, max_grid=4),
        data=Data(
            source="shapes", size=40, generator_image_size=24, max_objects=1, vocabulary="bytes", generator=(("draw", 1.0),)
        ),
        optimizer=Optimizer(warmup=2),
        training=Training(
            steps={STEPS}, batch_size=4, log_every=1, checkpoint_every={EVERY}, validate_every=0, validation_rows=8,
            sample_every=0,
        ),
        sampling=Sampling(steps=1, max_tokens=2),
        mesh=Mesh(data=1, fsdp=-1),
    )
"""


class Group:
    """Processes of one run."""

    def __init__(self, processes):
        self.processes = processes

    def wait(self, seconds: float = 250) -> tuple[list[int], list[str]]:
        """Exit codes and what went to stderr."""
        limit = time.monotonic() + seconds
        try:
            errors = [p.communicate(timeout=max(1, limit - time.monotonic()))[1] for p in self.processes]
        finally:
            self.signal(signal.SIGKILL)
        return [p.returncode for p in self.processes], errors

    def signal(self, number: int, which: int | None = None) -> None:
        for process in self.processes if which is None else [self.processes[which]]:
            if process.poll() is None:
                process.send_signal(number)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """`start(workdir, count, *options)` starts the processes of a run of `mmdiff train`.

    events: {process: event}, see worker.py. each: {process: more options}. devices: simulated, of each process.
    """
    folder = tmp_path_factory.mktemp("multiprocess")
    experiment = folder / "tiny.py"
    experiment.write_text(EXPERIMENT)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(workdir, count: int, *options, events=None, each=None, devices: int = 1) -> Group:
        address, processes = f"127.0.0.1:{free_port()}", []
        for index in range(count):
            peers = ["--coordinator", address, "--processes", str(count), "--process", str(index)] if count > 1 else []
            own = (each or {}).get(index, [])
            event = (events or {}).get(index, "none")
            command = [sys.executable, WORKER, event, "train", experiment, "--workdir", workdir, *options, *own, *peers]
            pipe = subprocess.PIPE
            own_environment = environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
            processes.append(
                subprocess.Popen(list(map(str, command)), env=own_environment, stdout=pipe, stderr=pipe, text=True)
            )
        return Group(processes)

    return start


@pytest.fixture(scope="session")
def whole(tmp_path_factory, start):
    """The workdir of a run of two processes that was never interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    codes, errors = start(workdir, 2).wait()
    assert codes == [0, 0], errors
    return workdir


def losses(workdir):
    """(step, losses as hexadecimal floats) of every line, in order."""
    names = ("loss", "text_loss", "image_loss", "grad_norm")
    return [(r["step"], *(float(r[name]).hex() for name in names)) for r in read_metrics(workdir) if "loss" in r]


def checkpoints(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def lines(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(workdir, count: int) -> None:
    limit = time.monotonic() + 200
    while time.monotonic() < limit and lines(workdir) < count:
        time.sleep(0.001)
