"""tpu_scripts/pod_check.py on two processes: says what is well, and finds what is not."""

import os
import subprocess
import sys
from pathlib import Path

from .conftest import free_port

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "pod_check.py"


def run(storage, count=2):
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    processes = []
    for index in range(count):
        peers = ["--coordinator", address, "--processes", str(count), "--process", str(index)]
        where = ["--storage", str(storage if isinstance(storage, Path) else storage[index])]
        command = [sys.executable, str(SCRIPT), *where, *peers]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    out = [p.communicate(timeout=200) for p in processes]
    return [p.returncode for p in processes], out


def test_a_sound_pod(tmp_path):
    codes, out = run(tmp_path / "shared")
    assert codes == [0, 0], out
    told = out[0][0]
    assert "hosts              2, 4 devices" in told and "10 (should be 10)" in told and "is shared" in told
    assert not list((tmp_path / "shared").iterdir())


def test_storage_that_is_not_shared_is_found(tmp_path):
    codes, out = run([tmp_path / "one", tmp_path / "two"])
    assert codes == [1, 1], out
    assert "FAILED" in out[0][0] and "files of hosts 1 are not seen" in out[0][0]


def test_dry_run_names_the_checks():
    done = subprocess.run([sys.executable, SCRIPT, "--dry-run"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.splitlines() == ["software", "sum over devices", "clocks"]
