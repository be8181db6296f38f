"""The frozen encoder of a semantic tokenizer (mmdiff/pretrained/tower.py): its sizes and weights, from the folder of a CLIP."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.config_files import run_config
from mmdiff.pretrained.clip import load_clip
from mmdiff.pretrained.load import read_config
from mmdiff.pretrained.tower import sizes_of


def read_sizes(folder: str) -> config.Tower:
    """Sizes of the vision half in a CLIP folder.

    Raises:
      DataError: no config.json there, or it describes no CLIP.
    """
    return sizes_of(read_config(folder), Path(folder) / "config.json")


def resolved(cfg: config.Config, workdir: Path) -> config.Config:
    """`cfg` with the sizes of its frozen encoder: those that the run in `workdir` began with, or those of the folder.

    Raises:
      DataError: as of `read_sizes`.
    """
    settings = cfg.tokenizer
    if not settings.encoder or settings.tower.side:
        return cfg
    if (workdir / "config.json").is_file() and (old := run_config(workdir).tokenizer).encoder == settings.encoder:
        tower = old.tower
    else:
        tower = read_sizes(settings.encoder)
    return dataclasses.replace(cfg, tokenizer=dataclasses.replace(settings, tower=tower))


def read_tower(settings: config.Tokenizer) -> dict[str, Any]:
    """The parameters of `Tower`, arrays of the host.

    Raises:
      DataError: the folder holds no such encoder. ConfigError: one of other sizes.
    """
    found = read_sizes(settings.encoder)
    config.require(
        found == settings.tower,
        f"tokenizer.encoder={settings.encoder!r} has sizes {found}, not tokenizer.tower={settings.tower}; leave that out.",
    )
    clip = load_clip(settings.encoder)
    parts = {"vision": clip.vision, "out": clip.vision_out}
    return jax.tree.map(np.asarray, {name: nnx.to_pure_dict(nnx.state(part)) for name, part in parts.items()})
