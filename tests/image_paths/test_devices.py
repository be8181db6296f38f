"""One device and eight give the same losses, parameters and drawings on codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def results():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, Path(__file__).parent / "on_eight_devices.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_meshes_agree(results):
    one, many = results["masked_code"]["1x1x1"], results["masked_code"]["2x2x2"]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(many["params"], one["params"], rtol=1e-5, atol=1e-4)
    assert one["losses"][0] != one["losses"][-1]
    assert many["pixels"] == one["pixels"] and one["pixels"][0] != one["pixels"][1]
