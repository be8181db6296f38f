"""A cloud in a folder: the scripts run as they are, against a fake gcloud, uv and trainer (fakes/)."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes"
SETTINGS = {
    "TPU_PROJECT": "project",
    "TPU_ZONE": "zone",
    "TPU_NAME": "name",
    "TPU_TYPE": "v6e-16",
    "TPU_OWNER": "Ann.Bee",
    "GKE_CLUSTER": "cluster",
    "POLL_SECONDS": "0",
    "RETRY_SECONDS": "0",
    "BACKOFF_SECONDS": "0",
    "GRACE_SECONDS": "0",
}
OWNER = "ann_bee"  # the label that TPU_OWNER becomes


def git(folder, *arguments):
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(folder) -> str:
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=a")
    return git(folder, "rev-parse", "HEAD")


def make_repository(folder: Path) -> Path:
    shutil.copytree(ROOT / "tpu_scripts", folder / "tpu_scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "setup.py").write_text("# stands for the project\n")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    return make_repository(tmp_path_factory.mktemp("repository"))


class Cloud:
    def __init__(self, folder: Path, repository: Path):
        self.folder, self.repository, self.fake = folder, repository, folder / "fake"
        (self.fake / "hosts").mkdir(parents=True)
        (folder / "bin").mkdir()
        self.write("owner", OWNER)
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(folder),
            "FAKE": str(self.fake),
            "CLOUDSDK_CONFIG": str(folder / "no-gcloud"),  # should the real one ever be reached, it knows no account
            **SETTINGS,
        }
        for name in ("gcloud", "mmdiff"):
            self.program(name, f'exec {sys.executable} -I -S {FAKES / name}.py "$@"')
        self.program(
            "uv", 'echo "$*" >>"$FAKE/uv"; [ "$1" != venv ] || { mkdir -p .venv/bin; ln -s /bin/true .venv/bin/python; }'
        )

    def program(self, name: str, text: str):
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def write(self, name: str, *lines):
        (self.fake / name).write_text("".join(f"{line}\n" for line in lines))

    def read(self, name: str) -> str:
        path = self.fake / name
        return path.read_text() if path.exists() else ""

    def run(self, script: str, *arguments, code: int = 0, **environment):
        """Run a script to its end, which must be `code`."""
        path = self.repository / "tpu_scripts" / script
        command = [path] if os.access(path, os.X_OK) else ["bash", path]
        ended = subprocess.run(
            [*command, *arguments], env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == code, f"{script} ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended

    def calls(self, *words: str) -> list[list[str]]:
        """The calls of gcloud whose arguments contain all of these words, in order."""
        every = [call.split("\0") for call in self.read("calls").split("\0\0")[:-1]]
        return [call for call in every if set(words) <= set(call)]

    def trained(self, host: int = 0) -> list[dict]:
        """How the trainer was called on a host, in order."""
        return [json.loads(line) for line in self.read(f"trainer.{host}").splitlines()]

    def ready(self, workers: int = 1):
        """A TPU that is there and set up."""
        self.write("states", "ACTIVE")
        self.write("workers", workers)
        self.run("setup.sh")

    def start(self, *command: str, host: int = 0):
        """run.sh, until the trainer has been called."""
        before = len(self.trained(host))
        self.run("run.sh", *command)
        while len(self.trained(host)) == before:
            time.sleep(0.01)

    def wait(self, line: str):
        """Wait until status.sh ends with this line."""
        for _ in range(100):
            status = self.run("status.sh").stdout
            if status.splitlines()[-1] == line:
                return status
        raise AssertionError(f"never '{line}':\n{status}")

    def end(self):
        """End what the hosts still run."""
        for group in self.fake.glob("hosts/*/mmdiff-jobs/*/job.group"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(group.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path, repository):
    cloud = Cloud(tmp_path, repository)
    yield cloud
    cloud.end()
