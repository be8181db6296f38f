r"""Weights of other people's networks, from safetensors files of the user's, in our own modules.

A table of rules says where each name of the file goes, and in which form:

    Rule(r"layers\.(\d+)\.mlp\.fc1\.weight", "layers/{}/up/kernel", transposed)

A `{}` of our path takes the next group that the name catches. A name may have several rules: fused weights are taken apart
by rules that each keep a part. Everything must fit: a name without a rule, a parameter without a name and a shape that
differs are told together, before anything is read. Then one parameter after the other is made where it will live, and a
device that keeps a part of it makes that part alone.

Nothing is unpickled and nothing is fetched.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from mmdiff.document import DataError

Module = TypeVar("Module", bound=nnx.Module)
Form = Callable[[np.ndarray], np.ndarray]
TOLD = 20  # names of each kind in a message


class Rule(NamedTuple):
    theirs: str
    """A regular expression for whole names of the file."""
    ours: str
    """The path of the parameter, as in layers/{}/up/kernel."""
    form: Form = np.asarray
    """Their array to ours: a view of it, if it can be."""


def transposed(a: np.ndarray) -> np.ndarray:
    """PyTorch's linear layer [out, in] to ours [in, out]."""
    return a.T


def convolution(a: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in, h, w] to ours [h, w, in, out]."""
    return a.transpose(2, 3, 1, 0)


def part(number: int, count: int, form: Form = np.asarray) -> Form:
    """Part `number` of `count` equal ones along the first axis, in a form."""
    return lambda a: form(a[number * (len(a) // count) : (number + 1) * (len(a) // count)])


def layer(theirs: str, ours: str, form: Form = transposed) -> list[Rule]:
    """Kernel and bias of a linear layer (form=convolution: of a convolution)."""
    return [Rule(rf"{theirs}\.weight", f"{ours}/kernel", form), Rule(rf"{theirs}\.bias", f"{ours}/bias")]


def norm(theirs: str, ours: str) -> list[Rule]:
    """Scale and bias of a layer, group or RMS norm."""
    return [Rule(rf"{theirs}\.weight", f"{ours}/scale"), Rule(rf"{theirs}\.bias", f"{ours}/bias")]


OURS = [Rule(r"(.*)", "{}")]
"""Of files that `save_module` wrote."""


class Weights:
    """The arrays of one safetensors file, or of all in a folder, by name; read when they are asked for.

    Raises:
      DataError: there is none, one is no safetensors file, or an index is damaged.
    """

    def __init__(self, path: str | Path):
        import safetensors  # the networks must load where it is not installed

        self.path = path = Path(path)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder of safetensors.")
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        for index in sorted(path.glob("*.safetensors.index.json")) if path.is_dir() else ():
            told = _object(index).get("weight_map")
            if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
                raise DataError(f"{index} has no weight_map from names to files; copy it anew from where the weights are from.")
            listed = sorted(set(told.values()))
            if absent := [name for name in listed if not (path / name).is_file()]:
                raise DataError(f"{index}: {len(absent)} of its {len(listed)} files are not there: {', '.join(absent[:TOLD])}.")
            files = [path / name for name in listed]
        if not files:
            raise DataError(
                f"{path} holds no safetensors file; a .bin or .pth must be converted with the library that wrote it."
            )
        self._of: dict[str, Any] = {}
        for file in files:
            try:
                opened = safetensors.safe_open(file, framework="numpy")
            except (OSError, safetensors.SafetensorError) as error:
                raise DataError(f"{file} is no safetensors file ({error}).") from error
            names = opened.keys()
            for name in names:
                if name in self._of:
                    raise DataError(
                        f"{path}: {name!r} is in more than one file, {file.name} the last: name the file that is meant."
                    )
                self._of[name] = opened

    @property
    def names(self) -> list[str]:
        return sorted(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array that is not read for it."""
        return tuple(self._of[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._of[name].get_tensor(name)


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder. Raises DataError without one, or if it is no JSON object."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise DataError(f"{path}: not there; it says the sizes of the network.")
    return _object(path)


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object, but a {type(found).__name__}; copy it anew.")
    return found


def supported(
    cfg: dict[str, Any],
    where: str | Path,
    sizes: Mapping[str, type | UnionType],
    only: Mapping[str, tuple[Any, ...]],
) -> dict[str, Any]:
    """A config.json, which `where` names, as it is.

    Args:
      sizes: what must stand in it, and its type.
      only: what else may stand in it, and with which values (in a list: all of these).
    Raises:
      DataError: it says anything else.
    """
    wrong = [f"{name}={cfg.get(name)!r}" for name, kind in sizes.items() if not isinstance(cfg.get(name), kind)]
    for name, values in only.items():
        told = cfg.get(name, values[0])
        if any(each not in values for each in (told if isinstance(told, list) else [told])):
            wrong.append(f"{name}={told!r} (only {' or '.join(map(repr, values))})")
    if wrong:
        raise DataError(f"{where}: not supported: {'; '.join(wrong)}.")
    return cfg


def assigned(weights: Weights, shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule], ignored: Sequence[str] = ()):
    """For each of our paths the name in the file and its form.

    Args:
      shapes: of our parameters. ignored: regular expressions for names that have no place here and need none.
    Raises:
      DataError: names and parameters do not match, with all that is wrong.
    """
    found: dict[str, tuple[str, Form]] = {}
    unknown, wrong, twice = [], {}, []
    for name in weights.names:
        hits = [(rule, match) for rule in rules if (match := re.fullmatch(rule.theirs, name))]
        if not hits and not any(re.fullmatch(pattern, name) for pattern in ignored):
            unknown.append(name)
        for rule, match in hits:
            ours = rule.ours.format(*match.groups())
            hollow = np.broadcast_to(np.zeros((), np.int8), weights.shape(name))  # has a shape and no memory
            try:
                shape = rule.form(hollow).shape
            except (ValueError, IndexError):
                shape = ()
            if ours not in shapes:
                unknown.append(name)
            elif shape != shapes[ours]:
                wrong[ours] = f"{name} {weights.shape(name)} for {ours} {shapes[ours]}"
            elif ours in found:
                twice.append(f"{found[ours][0]} and {name} for {ours}")
            else:
                found[ours] = name, rule.form
    complaints = {
        "without a place here": list(dict.fromkeys(unknown)),
        "missing": [path for path in shapes if path not in found and path not in wrong],
        "of another shape": list(wrong.values()),
        "for the same place": twice,
    }
    told = [f"{len(names)} {what}: {_list(names)}" for what, names in complaints.items() if names]
    if told:
        raise DataError(f"{weights.path}: the weights do not fit: {'; '.join(told)}.")
    return found


def _list(names: list[str]) -> str:
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def load_module(
    make: Callable[[], Module],
    path: str | Path,
    rules: Sequence[Rule],
    *,
    ignored: Sequence[str] = (),
    dtype: Any = np.float32,
    place: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> Module:
    """A module with the weights of a file or folder.

    Args:
      make: makes one (only its shapes are looked at).
      dtype: of all parameters.
      place: says for the path and shape of each parameter where it lives; None: on the default device.
    Raises:
      DataError: as of `Weights` and `assigned`.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    leaves = {"/".join(map(str, key)): leaf for key, leaf in nnx.to_flat_state(state)}
    weights = Weights(path)
    chosen = assigned(weights, {name: tuple(leaf.shape) for name, leaf in leaves.items()}, rules, ignored)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def made(ours: str, shape: tuple[int, ...]) -> jax.Array:
        name, form = chosen[ours]
        cut = lambda index: np.array(form(weights[name])[index], dtype, order="C")
        return jax.make_array_from_callback(shape, place(ours, shape) if place else here, cut)

    filled = [(key, leaf.replace(made("/".join(map(str, key)), leaf.shape))) for key, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def load_folder(
    make: Callable[[dict[str, Any], nnx.Rngs], Module],
    folder: str | Path,
    rules: Sequence[Rule],
    check: Callable[[dict[str, Any], Path], dict[str, Any]],
    **options,
) -> Module:
    """The same with the sizes of the folder's config.json, which `make` takes; also of what `save_module` wrote.

    Args:
      check: takes what config.json holds and its path, and returns what `make` is to be given.
    Raises:
      DataError: as of `load_module`, `read_config` and `check`.
    """
    cfg = check(read_config(folder), Path(folder) / "config.json")
    rules = OURS if cfg.get("format") == "mmdiff" else rules
    return load_module(lambda: make(cfg, nnx.Rngs(0)), folder, rules, **options)


def save_module(module: nnx.Module, folder: str | Path, cfg: Mapping[str, Any]) -> None:
    """Write a module and the config.json of its sizes to a folder, with our names: for stand-ins trained here, which the
    same functions load as the real thing."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {"/".join(map(str, key)): np.asarray(leaf[...]) for key, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    part = folder / "model.safetensors.part"  # replaced in one move: a kill leaves the old file or the new one
    save_file(leaves, part)
    (folder / "config.json").write_text(json.dumps({"format": "mmdiff", **cfg}, indent=1) + "\n")
    part.replace(folder / "model.safetensors")
