"""The folder of one run, and what a run that goes on there must have in common with the one that began."""

import json
from pathlib import Path
from typing import Any

from mmdiff import config
from mmdiff.document import DataError

# fields that a resumed run may change: how often it reports, how it samples, what it runs on, where its first parameters lie
REPORTS = ("log_every", "checkpoint_every", "keep", "keep_every", "sample_every", "validate_every", "watchdog")
FREE = {f"training.{name}" for name in (*REPORTS, "init")} | {"front_end.encoder", "front_end.init", "tokenizer.words"}
FREE_GROUPS = ("sampling.", "mesh.")


def check_workdir(cfg: config.Config, workdir: Path) -> None:
    """Refuse to go on with another configuration than the workdir's.

    Raises:
      ConfigError: names the first field that differs.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return
    old = config.Config.from_json(path.read_text())
    before, after = flat(json.loads(old.to_json())), flat(json.loads(cfg.to_json()))
    for name, value in after.items():
        if name in FREE or name.startswith(FREE_GROUPS) or before.get(name) == value:
            continue
        raise config.ConfigError(
            f"{workdir} was started with {name}={before.get(name)!r}, not {value!r}; use another --workdir, or the old value."
        )


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def check_same(saved: dict, now: dict, workdir: Path) -> None:
    """Refuse to go on with another vocabulary or other data than the checkpoint's."""
    for what, remedy in (("vocabulary", "restore the run's vocabulary.model"), ("data", "use the data it was started with")):
        if saved[what] != now[what]:
            raise DataError(f"{workdir}: the {what} has changed since the checkpoint ({saved[what]} -> {now[what]}); {remedy}.")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    if path.is_file() and path.read_bytes() == data:
        return
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
