"""Shared by all tests: JAX set up for close comparisons, and tiny networks none of whose outputs is zero.

Tests run on one device; those that need several start a process of their own (tests/training/test_devices.py).
"""

import dataclasses
import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # runs started by a test share the device with it
# Tests mostly wait for the compiler, which is three times faster when it need not optimise, and twice that without MLIR's
# fusions. A flag that XLA does not know ends the process, hence the version. The run's own flags win.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # commands keep their programs nowhere

import jax  # reads the variables above
import numpy as np
import pytest
from absl import flags

from mmdiff import config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.document import Image
from mmdiff.layout import ImagePiece, ImagePlan, Rows, TextPiece, lay_out, pack, patchify, stack
from mmdiff.models.network import Network

jax.config.update("jax_default_matmul_precision", "highest")
flags.FLAGS.mark_as_parsed()  # absl's users complain when a test runner owns the command line

PATCH = 2
MANY_MAPS = 20_000
LONGEST = ("multiprocess", "sweeps", "parallel", "training")  # folders whose tests come first, so that no worker ends with them


def pytest_collection_modifyitems(items):
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.parent.name, len(LONGEST)))


@pytest.fixture(autouse=True, scope="module")
def programs_forgotten():
    """Compiled programs are parts of memory mapped each by itself. A process may have 65,530 such maps (vm.max_map_count), and
    where it has them all the compiler crashes, which happened to a worker after a thousand tests."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


class Digits(Vocabulary):
    """Ten text pieces: a random network of so few words soon asks for images and ends documents."""

    def __init__(self, max_grid: int = 4):
        super().__init__(None, max_grid)
        self._piece_bytes = [b"%d" % i for i in range(10)]

    def encode(self, text: str) -> list[int]:
        return [self.text_range[0] + int(character) for character in text]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A small network with random parameters, and shorthands to make rows for it."""

    cfg: config.Config
    network: Network
    params: Any
    vocabulary: Vocabulary

    def pieces(self, *parts, seed: int = 0):
        """Strings of digits become texts; (rows, cols) become images of random pixels."""
        return [
            TextPiece(np.asarray(self.vocabulary.encode(part), np.int32))
            if isinstance(part, str)
            else ImagePiece(patchify(picture(*part, seed=seed + index).pixels, PATCH), *part)
            for index, part in enumerate(parts)
        ]

    def lay(self, pieces, plans=None, *, layout: config.Layout | None = None, end: bool = True) -> Rows:
        """One document; by default every image has a clean copy and a noised block."""
        layout = layout or self.cfg.layout
        images = [p for p in pieces if isinstance(p, ImagePiece)]
        plans = [ImagePlan(True, layout.noised_copies)] * len(images) if plans is None else plans
        return lay_out(
            pieces, plans, self.vocabulary, layout, patch_values=3 * PATCH**2, positions=self.cfg.model.positions, end=end
        )[0]

    def batch(self, *rows: list[Rows], length: int = 64) -> Rows:
        """A batch; each argument is the list of documents of one row."""
        return stack([pack(documents, length) for documents in rows])

    def noise(self, rows: Rows, seed: int = 0):
        """(z, u): patches noised at one random time per noised block, clean ones at time 0."""
        rng = np.random.default_rng(seed)
        u = np.take_along_axis(rng.uniform(0.2, 0.8, rows.noised.shape), rows.block_start, axis=-1)
        u = np.where(rows.noised, u, 0).astype(np.float32)
        x = rows.patches / np.float32(127.5) - 1
        eps = rng.standard_normal(x.shape).astype(np.float32)
        return np.where(rows.is_patch[..., None], (1 - u[..., None]) * x + u[..., None] * eps, 0), u

    def forward(self, rows: Rows, z, u):
        """Text logits and patch predictions of a batch."""
        return forward(self.network, self.params, rows, z, u)


@functools.partial(jax.jit, static_argnames="network")
def forward(network: Network, params, rows: Rows, z, u):
    model = network.bind(params)
    hidden = model.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask)
    return model.text_logits(hidden) if network.vocabulary_size else None, model.predict(hidden, rows.cell)


def picture(grid_rows: int, grid_cols: int, seed: int = 0) -> Image:
    """An image of random pixels, sized in patches."""
    shape = (PATCH * grid_rows, PATCH * grid_cols, 3)
    return Image(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def perturbed(params, size: float, seed: int = 1):
    """Parameters plus noise, so that no head is zero and no scale is one."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([p + size * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


def make_tiny(markers: bool = True, **model) -> Tiny:
    shape = {"width": 48, "depth": 2, "key_width": 16, "head_width": 16, "compute": "float32"}
    cfg = config.Config(
        model=config.Model(**shape | model, patch=PATCH),
        layout=config.Layout(row_length=64, max_grid=4, markers=markers, time_token=model.get("time") == "token"),
        sampling=config.Sampling(steps=4, max_tokens=8),
    )
    vocabulary = Digits()
    network = Network.of(cfg, vocabulary.size)
    return Tiny(cfg, network, perturbed(network.init(jax.random.key(0)), 0.15), vocabulary)


@pytest.fixture(scope="session")
def tiny_gau() -> Tiny:
    return make_tiny(block="gau")


@pytest.fixture(scope="session")
def tiny_attention() -> Tiny:
    return make_tiny(block="attention")


@pytest.fixture(scope="session", params=["gau", "attention"])
def tiny(request) -> Tiny:
    """Each kind of block in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="session")
def new_tiny():
    """Makes other tiny networks: `new_tiny(qk_norm=True)`."""
    return make_tiny


@pytest.fixture(scope="session")
def new_picture():
    return picture


@pytest.fixture(scope="session")
def mmdiff_command(tmp_path_factory):
    """Runs `python -m mmdiff ...` and waits; `start=True` returns the running process instead, `group=True` makes
    it the first of a process group.

    The processes share compiled programs, so that only the first one waits for the compiler.
    """
    cache = tmp_path_factory.mktemp("compiled")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(*arguments, start: bool = False, group: bool = False, **variables):
        command = [sys.executable, "-m", "mmdiff", *map(str, arguments)]
        options = {"env": environment | variables, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options["start_new_session"] = group
        return subprocess.Popen(command, **options) if start else subprocess.run(command, timeout=300, **options)

    return run
