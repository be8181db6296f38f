"""Reading files of named arrays: safetensors, NumPy's .npz, and the state dictionaries of torch.save, without PyTorch.

A file of torch.save is a pickle in which each tensor is a call of `_rebuild_tensor_v2(storage, offset, size, stride, ...)`;
the storages' bytes stand beside it in a zip archive (<root>/data.pkl, <root>/data/<key>), or behind it in the form from
before version 1.6: three pickles (magic number, version, system), the object, the list of keys, then for each key its
number of elements (int64) and its elements, all little endian.

Nothing in the file is ever run: a pickle may name the few classes below and no other.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdiff.document import DataError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
TYPES = {"Double": "<f8", "Float": "<f4", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Byte": "u1"}
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, StopIteration, pickle.UnpicklingError)


class Tensor(NamedTuple):
    """A tensor whose storage has not been read yet."""

    storage: tuple[str, str]  # key, NumPy's name of the type
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self, elements: bytes) -> np.ndarray:
        """A copy of the elements that it shows."""
        flat = np.frombuffer(elements, self.storage[1])
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if min(self.size, default=1) > 0 and not 0 <= last < len(flat):
            raise ValueError("a tensor reaches beyond its storage")
        steps = [s * flat.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.size, steps).copy()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors or .npz file or of a torch.save'd state dictionary, by name.

    Raises:
      DataError: no such file, or none of these.
    """
    if path.suffix == ".safetensors":
        from mmdiff.pretrained.load import Weights  # tokenizers must load where safetensors is not installed

        weights = Weights(path)
        return {name: weights[name] for name in weights.names}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"weights {path} cannot be read ({error.strerror}).") from error
    try:
        if not zipfile.is_zipfile(io.BytesIO(data)):
            return _read_legacy(io.BytesIO(data))
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if all(name.endswith(".npy") for name in archive.namelist()):
                with np.load(io.BytesIO(data), allow_pickle=False) as file:
                    return {name: file[name] for name in file.files}
            return _read_zip(archive)
    except (*DAMAGED, zipfile.BadZipFile) as error:
        raise DataError(f"weights {path} are no .npz file and no state dictionary of torch.save ({error}).") from error


def _read_zip(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    tensors = _tensors(_Unpickler(archive.open(pickled)).load())
    root = pickled.removesuffix("data.pkl")
    return {name: tensor.array(archive.read(f"{root}data/{tensor.storage[0]}")) for name, tensor in tensors.items()}


def _read_legacy(file: io.BytesIO) -> dict[str, np.ndarray]:
    if _Unpickler(file).load() != LEGACY_MAGIC:
        raise ValueError("unknown format")
    _Unpickler(file).load()  # version
    _Unpickler(file).load()  # system
    tensors = _tensors(_Unpickler(file).load())
    types = {tensor.storage[0]: np.dtype(tensor.storage[1]) for tensor in tensors.values()}
    storages = {}
    for key in _Unpickler(file).load():
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        storages[key] = file.read(count * types[key].itemsize)
    return {name: tensor.array(storages[tensor.storage[0]]) for name, tensor in tensors.items()}


def _tensors(loaded: Any) -> dict[str, Tensor]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError("it holds something else than named tensors")
    return loaded


class _Unpickler(pickle.Unpickler):
    """Makes dictionaries of `Tensor`; refuses every class but those of a state dictionary."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: Tensor(storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name.removesuffix("Storage") in TYPES:
            return TYPES[name.removesuffix("Storage")]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, identity: Any) -> tuple[str, str]:
        _, kind, key, *_ = identity
        return key, kind
