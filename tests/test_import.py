"""What an import pulls in: the package is light, and its core works where the data and checkpoint libraries are absent."""

import subprocess
import sys

import pytest

HEAVY = ("tensorflow", "tensorflow_datasets", "grain", "clu", "orbax", "jax", "flax", "optax", "tyro", "sentencepiece", "PIL")
OPTIONAL = ("tensorflow", "tensorflow_datasets", "grain", "clu", "array_record", "orbax", "tensorboardX", "tyro")
CORE = (
    "mmdiff.models.transfusion",
    "mmdiff.diffusion.grids",
    "mmdiff.diffusion.guidance",
    "mmdiff.diffusion.loss",
    "mmdiff.diffusion.prediction",
    "mmdiff.diffusion.schedule",
    "mmdiff.diffusion.solvers",
    "mmdiff.diffusion.times",
    "mmdiff.sampling.generate",
    "mmdiff.training.step",
    "mmdiff.image_paths.base",
    "mmdiff.data.batches",
    "mmdiff.parallel.mesh",
)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def blocked(names) -> str:
    return f"import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def test_import_mmdiff_loads_nothing_heavy():
    done = python(f"import sys, mmdiff; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_command_line_answers_without_loading_jax():
    done = python("import sys; from mmdiff.cli.main import main; main(['--help']); print('jax' in sys.modules)")
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_core_imports_without_data_and_checkpoint_libraries():
    done = python(blocked(OPTIONAL) + "import importlib\n" + f"for name in {CORE!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "module"), [("orbax", "mmdiff.training.checkpoint"), ("flax", "mmdiff.models.transfusion")])
def test_blocking_a_library_really_blocks_it(name, module):
    done = python(blocked([name]) + f"import {module}")
    assert done.returncode != 0 and name in done.stderr
