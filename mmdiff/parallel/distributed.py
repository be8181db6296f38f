"""Several processes, one program: how they find each other, agree, and share what only one of them knows.

Every process runs the same program over the whole mesh and must take the same decisions in the same order, or all of
them hang. So nothing is decided from one process's disk, clock or signals: what only one knows goes through `from_first`
or `any_process`, and what all must share is compared once at the start (`agree`).
"""

import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import mmdiff
from mmdiff.config import ConfigError
from mmdiff.document import DataError

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Disagreement(DataError):
    """The processes of a run were started differently; one line."""


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes of this run, if there are any; call it before the first use of a device.

    With `coordinator` (HOST:PORT of process 0) all three are needed. Without it the environment tells: on a TPU, under
    Slurm and under Open MPI JAX finds the peers by itself; anywhere else the process is alone.

    Raises:
      ConfigError: only some of the three are given, or they make no sense.
    """
    if coordinator is not None or processes is not None or process is not None:
        if coordinator is None or processes is None or process is None:
            raise ConfigError("--coordinator HOST:PORT, --processes N and --process I go together; give all three.")
        if not 0 <= process < processes:
            raise ConfigError(f"--process {process} must be between 0 and {processes - 1}, with --processes {processes}.")
        if processes > 1:
            jax.distributed.initialize(coordinator, processes, process)
    elif _has_peers():
        jax.distributed.initialize()


def _has_peers() -> bool:
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name) or 1) > 1:
            return True
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    on_tpu = importlib.util.find_spec("libtpu") is not None and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return bool(on_tpu) and "tpu" in wanted  # JAX itself knows whether this TPU has one host or many


def shutdown() -> None:
    """Leave together: a process that goes first would take the others down with it."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all of them must call it, and all wait for each other."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray([flag]))))


def from_first(value: Any) -> Any:
    """Process 0's `value` (anything JSON can hold), in every process."""
    return _gathered(value)[0] if jax.process_count() > 1 else value


def fetch(tree: Any) -> Any:
    """Arrays on devices to numpy arrays, whole ones in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(a):
        if not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated:
            return np.asarray(a)
        return np.asarray(multihost_utils.process_allgather(a, tiled=True))

    return jax.tree.map(whole, tree)


def agree(facts: Mapping[str, str]) -> None:
    """Compare what every process knows.

    Raises:
      Disagreement: names the first fact that differs and who has which value; raised in every process.
    """
    if jax.process_count() == 1:
        return
    everyone = _gathered(dict(facts))
    for name in facts:
        values = [theirs.get(name) for theirs in everyone]
        if len(set(values)) > 1:
            who = {value: [i for i, v in enumerate(values) if v == value] for value in dict.fromkeys(values)}
            told = "; ".join(f"{value} in process {', '.join(map(str, them))}" for value, them in who.items())
            raise Disagreement(f"the processes of this run differ in {name}: {told}. Start all of them alike.")


def environment() -> dict[str, str]:
    """Facts about the software that all processes must share: code and versions."""
    versions = {name: _version(name) for name in LIBRARIES}
    return {"code": code_fingerprint(), "python": platform.python_version()} | versions


@functools.cache
def code_fingerprint() -> str:
    """Hash of the package's source files."""
    root = Path(mmdiff.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _gathered(value: Any) -> list[Any]:
    """Every process's value, in order."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([len(data)])))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(everyone, sizes, strict=True)]
