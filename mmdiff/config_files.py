"""Reading configurations: from plain JSON values, from JSON files, and from the `config()` of an experiment file."""

import dataclasses
import runpy
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmdiff import config
from mmdiff.document import DataError

Made = TypeVar("Made")


def field_names(kind: type, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields of a configuration dataclass."""
    names = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            names += field_names(typing.cast(type, field.type), f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def replaced(cfg: config.Config, changes: Mapping[str, Any]) -> config.Config:
    """`cfg` with some fields changed, by their dotted names, all at once.

    Raises:
      ConfigError: unknown field (with a suggestion), wrong type, or values that do not go together.
    """
    values = dataclasses.asdict(cfg)
    for name, value in changes.items():
        *groups, field = name.split(".")
        inside = values
        for group in groups:
            inside = inside.get(group, {})
        if not isinstance(inside, dict) or field not in inside or isinstance(inside[field], dict):
            raise config.ConfigError(f"unknown field '{name}'{config.suggest(name, field_names(config.Config))}")
        inside[field] = value
    return from_dict(config.Config, values)


def from_dict(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Build a configuration dataclass from plain JSON values."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise config.ConfigError(
                f"unknown field '{prefix}{name}'{config.suggest(prefix + name, [prefix + n for n in fields])}"
            )
        annotation = fields[name].type
        if dataclasses.is_dataclass(annotation):
            value = from_dict(typing.cast(type, annotation), value, f"{prefix}{name}.")
        else:
            value = _tupled(value)
            _check_type(value, annotation, prefix + name)
        arguments[name] = value
    return kind(**arguments)


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, (list, tuple)) else value


def _check_type(value: Any, annotation: Any, name: str) -> None:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        choices = typing.get_args(annotation)
        config.require(value in choices, f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
        return
    if isinstance(annotation, types.UnionType):
        allowed = tuple(typing.get_origin(a) or a for a in typing.get_args(annotation))
    elif annotation is float:
        allowed = (float, int)
    else:
        allowed = (origin or annotation,)
    good = isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed)
    config.require(good, f"{name}={value!r} has the wrong type: expected {getattr(annotation, '__name__', annotation)}.")


def load_experiment(path: str | Path) -> config.Config:
    """The Config that `config()` of an experiment file returns, or with FILE.py:FUNCTION another function of it.

    A FILE.json is read as the configuration itself, as a workdir's config.json.

    Raises:
      config.ConfigError: no such file or function, or an invalid configuration.
    """
    if str(path).endswith(".json"):
        return _read_json(Path(path))
    file, colon, function = str(path).rpartition(":")
    path, function = (Path(file), function) if colon and file.endswith(".py") else (Path(path), "config")
    return run_function(path, function, config.Config)


def _read_json(path: Path) -> config.Config:
    if not path.is_file():
        raise config.ConfigError(f"no configuration file {str(path)!r}")
    try:
        return config.Config.from_json(path.read_text())
    except (ValueError, AttributeError) as error:  # no JSON, or JSON that is no object
        raise config.ConfigError(f"{path}: not a configuration: {error}") from error
    except config.ConfigError as error:
        raise config.ConfigError(f"{path}: {error}") from error


def run_config(workdir: str | Path) -> config.Config:
    """The configuration of a run.

    Raises:
      DataError: not the folder of a run.
    """
    file = Path(workdir) / "config.json"
    if not file.is_file():
        raise DataError(f"{workdir} holds no run: config.json not found. Train one: mmdiff train ... --workdir {workdir}")
    return config.Config.from_json(file.read_text())


def run_function(path: Path, function: str, kind: type[Made]) -> Made:
    """What `function()` of a Python file returns, which must be a `kind`.

    Raises:
      config.ConfigError: no such file or function, or another thing returned.
    """
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        what = "experiment" if kind is config.Config else kind.__name__.lower()
        raise config.ConfigError(f"no {what} file {str(path)!r}{config.suggest(str(path), known)}")
    try:
        namespace = runpy.run_path(str(path))
    except SyntaxError as error:
        raise config.ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
    except TypeError as error:  # an unknown keyword of a configuration dataclass
        raise config.ConfigError(f"{path}: {error}") from error
    if not callable(namespace.get(function)):
        known = [name for name, value in namespace.items() if callable(value) and not isinstance(value, type)]
        hint = config.suggest(function, known)
        raise config.ConfigError(f"{path} has no function `{function}() -> {kind.__name__}`{hint}.")
    try:
        made = namespace[function]()
    except TypeError as error:
        raise config.ConfigError(f"{path}: {error}") from error
    wanted = f"{kind.__module__}.{kind.__qualname__}"
    config.require(isinstance(made, kind), f"{path}: {function}() returned {type(made).__name__}, not {wanted}.")
    return made
