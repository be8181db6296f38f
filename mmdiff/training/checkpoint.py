"""Checkpoints that are checked when they are read. The one module that knows orbax.

A folder holds one directory per step, each with the items `params`, `ema` and `rest` (all other leaves of the state)
and `meta`, a JSON object: what the caller passed, and

    format, step, versions, leaves {path: [dtype, shape, fingerprint]}, digest (SHA-256 of all of the above)

Storage does not notice a flipped bit; the fingerprints (mmdiff/training/state.py) do.

Damage (bits, truncation, a missing item) is answered by the newest older checkpoint that is whole, loudly. A whole
checkpoint of a different model is no damage: that is an error, and nothing older is tried.
"""

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

import mmdiff
from mmdiff.document import DataError
from mmdiff.training.state import fingerprint, named_leaves

FORMAT = 1

logging.set_verbosity(logging.ERROR)  # orbax narrates every save


class CheckpointError(DataError):
    """A checkpoint that cannot be read or used; one line."""


class SaveError(Exception):
    """A checkpoint could not be written; one line that says which one is still good."""


class _Damaged(Exception):
    """What is wrong with one checkpoint."""


class Checkpoints:
    """The checkpoints of one training run: the newest `keep`, and those of whole multiples of `keep_every` steps (0: none).
    Saves are asynchronous and atomic.

    In a run of several processes every method is called by all of them.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, keep_every: int = 0):
        self._folder = _absolute(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> bool:
        """Start writing `state` (any pytree with `params` and `ema`) and `meta` (JSON values); False if it is there.

        Returns once the arrays are copied, so that the caller may donate them.

        Raises:
          CheckpointError: `step` is not the state's, or a newer checkpoint exists. SaveError: this or the last write failed.
        """
        if step in self.steps():
            return False
        if int(getattr(state, "step", step)) != step:
            raise CheckpointError(f"checkpoint {step} would hold the state of step {int(state.step)}")
        if self.steps() and self.steps()[-1] > step:
            raise CheckpointError(f"checkpoint {step} not written: {self._folder} has a newer one, {self.steps()[-1]}")
        leaves = named_leaves(state)
        items = {name: ocp.args.StandardSave(item) for name, item in _items(leaves).items()}
        try:
            args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(_sealed(meta, step, leaves)))
            return self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(f"checkpoint {step}", error) from error

    def wait(self) -> None:
        """Return when the last save is complete. Raises SaveError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed("the last checkpoint", error) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _failed(self, what: str, error: Exception) -> SaveError:
        whole = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())
        kept = f"checkpoint {whole[-1]} is whole, and the same command resumes from it" if whole else "there is none before it"
        return SaveError(f"{what} could not be written to {self._folder} ({_line(error)}); {kept}. Is the disk full?")

    def latest_valid(self, like: Any, *, strict: bool = False) -> tuple[Any, dict[str, Any]] | None:
        """State and meta of the newest checkpoint that is whole, or None if there is none at all.

        Args:
          like: pytree of arrays, or of ShapeDtypeStructs with shardings: the structure to return, placed alike.
          strict: a damaged checkpoint is an error instead.
        Raises:
          CheckpointError: the checkpoint belongs to another model; `strict` and damaged; or every one is damaged.
        """
        self.wait()
        wanted = named_leaves(like)

        def read(step):
            meta = _read_meta(self._manager, step)
            _compare(step, wanted, meta["leaves"])
            return _read_leaves(self._manager, step, meta["leaves"], wanted), meta

        found = _newest_whole(read, self.steps(), self._folder, strict)
        if found is None:
            return None
        (leaves, meta), damaged = found
        for step in damaged:  # else saving that step again would be refused
            self._set_aside(step)
        return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values())), meta

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._folder / f"{step}.damaged"
            if aside.exists():
                aside.rmtree()
            (self._folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()


def restore_params(
    folder: str | Path, *, ema: bool = True, strict: bool = False, step: int | None = None
) -> tuple[dict, dict[str, Any]]:
    """Parameters (or their moving average) and meta of the newest checkpoint that is whole, or of the one of `step`;
    changes nothing on disk.

    Returns:
      a nested dict of arrays on this process's first device, and the meta the checkpoint was saved with.
    Raises:
      CheckpointError: no checkpoint there; every one is damaged; `strict` and the newest is damaged; or `step` is not there.
    """
    place = _absolute(folder)
    manager = None
    if place.exists():
        manager = ocp.CheckpointManager(place, options=ocp.CheckpointManagerOptions(read_only=True, create=False))
    if manager is None or not manager.all_steps():
        raise CheckpointError(f"no checkpoint in {folder}; train first, or pass the folder of a run")
    item, steps = "ema" if ema else "params", sorted(manager.all_steps())
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, steps))}")

    def read(step):
        meta = _read_meta(manager, step)
        leaves = {path: entry for path, entry in meta["leaves"].items() if _place(path)[0] == item}
        wanted = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (dtype, shape, _) in leaves.items()}
        return _read_leaves(manager, step, leaves, wanted), meta

    found = _newest_whole(read, steps if step is None else [step], folder, strict)
    manager.close()
    (leaves, meta), _ = found
    return _items(leaves)[item], meta


def _newest_whole(read, steps, folder, strict):
    """(`read` of the newest step it accepts, the damaged steps after it), or None without steps."""
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        result = None
        try:
            result = read(step)
        except _Damaged as error:
            damaged[step] = str(error)
        if jax.process_count() > 1 and not np.all(multihost_utils.process_allgather(np.array([result is not None]))):
            result = None  # all processes must go back to the same step
            damaged.setdefault(step, "another process could not read it")
        if result is not None:
            for bad, reason in damaged.items():
                print(f"checkpoint {bad} is damaged ({reason}); using {step}", file=sys.stderr, flush=True)
            return result, list(damaged)
        if strict:
            raise CheckpointError(f"checkpoint {step} in {folder} is damaged ({damaged[step]})")
    if damaged:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(f"every checkpoint in {folder} is damaged ({reasons}); remove the folder to start anew")
    return None


def _read_meta(manager, step: int) -> dict[str, Any]:
    try:
        meta = dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
        digest = meta.pop("digest")
    except Exception as error:
        raise _Damaged(f"meta: {_line(error)}") from error
    if digest != _digest(meta):
        raise _Damaged("meta: digest differs")
    if meta["format"] > FORMAT:
        raise CheckpointError(f"checkpoint {step} has format {meta['format']}, newer than this version's {FORMAT}")
    return meta


def _read_leaves(manager, step: int, leaves: dict[str, list], wanted: dict[str, Any]) -> dict[str, jax.Array]:
    """The arrays of `wanted` {path: array or ShapeDtypeStruct}, verified against `leaves`, in the order of `wanted`."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for path, leaf in wanted.items()
    }
    args = {name: ocp.args.StandardRestore(item) for name, item in _items(like).items()}
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # the machine is too small for it; the checkpoint may well be whole
        raise _Damaged(_line(error)) from error
    found, arrays = named_leaves({name: restored[name] for name in args}), {}
    for path in wanted:
        arrays[path] = found["/".join(_place(path))]
        if fingerprint(arrays[path]) != leaves[path][2]:
            raise _Damaged(f"leaf {path}: fingerprint differs")
    return arrays


def _compare(step: int, wanted: dict[str, Any], leaves: dict[str, list]) -> None:
    """Raise CheckpointError, naming a leaf, unless the checkpoint's leaves are those wanted."""
    remedy = "it was saved with another configuration; use that one, or another workdir"
    for path, leaf in wanted.items():
        if path not in leaves:
            raise CheckpointError(f"checkpoint {step} has no leaf {path}: {remedy}")
        dtype, shape, _ = leaves[path]
        if (dtype, list(shape)) != (str(leaf.dtype), list(leaf.shape)):
            raise CheckpointError(
                f"checkpoint {step}, leaf {path}: {dtype} {list(shape)} there, {leaf.dtype} {list(leaf.shape)} here: {remedy}"
            )
    if extra := [path for path in leaves if path not in wanted]:
        raise CheckpointError(f"checkpoint {step} has a leaf {extra[0]} that is not here: {remedy}")


def _sealed(meta: dict[str, Any], step: int, leaves: dict[str, Any]) -> dict[str, Any]:
    entries = {path: [str(leaf.dtype), list(leaf.shape), fingerprint(leaf)] for path, leaf in leaves.items()}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")} | {"mmdiff": mmdiff.__version__}
    record = json.loads(json.dumps(meta)) | {"format": FORMAT, "step": step, "versions": versions, "leaves": entries}
    return record | {"digest": _digest(record)}


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _place(path: str) -> tuple[str, str]:
    """The item a leaf is stored in, and its path there."""
    head, _, tail = path.partition("/")
    return (head, tail) if head in ("params", "ema") else ("rest", path)


def _items(leaves: dict[str, Any]) -> dict[str, dict]:
    """{item: nested dict} of {path: leaf}."""
    items: dict[str, dict] = {}
    for path, leaf in leaves.items():
        item, inside = _place(path)
        *above, name = inside.split("/")
        node = items.setdefault(item, {})
        for key in above:
            node = node.setdefault(key, {})
        node[name] = leaf
    return items


def _absolute(folder: str | Path) -> epath.Path:
    return epath.Path(folder) if "://" in str(folder) else epath.Path(Path(folder).absolute())


def _line(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
