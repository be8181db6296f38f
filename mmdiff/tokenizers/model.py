"""The public face of a trained tokenizer: images to codes and back.

tokenizer = mmdiff.load_tokenizer("runs/tokenizer")
ids = tokenizer.encode(images)              int32 [n, l]
tokenizer.decode(ids)                       uint8 [n, h, w, 3]
"""

import functools
import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmdiff import config
from mmdiff.config_files import run_config
from mmdiff.document import DataError
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.training.state import named_leaves

GROUP = 64  # images in one call of the network
CONFIG = "config.json"


class Tokenizer:
    """A trained tokenizer."""

    def __init__(self, cfg: config.Config, params: dict[str, Any], mesh: Mesh | None = None):
        self.cfg, self.params = cfg, params
        self.network = TokenizerNetwork.of(cfg, mesh)
        bind = self.network.bind
        scaled = lambda images: images.astype(jnp.float32) / 127.5 - 1
        levels = lambda x: jnp.clip(jnp.rint((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

        def encode(params, images):
            model = bind(params)
            return model.quantise(model.encode(scaled(images))).ids

        def decode(params, ids):
            model = bind(params)
            return levels(model.decode(model.codes(ids)))

        def reconstruct(params, images):
            model = bind(params)
            return levels(model.decode(model.quantise(model.encode(scaled(images))).codes))

        self._encode, self._decode, self._reconstruct = map(jax.jit, (encode, decode, reconstruct))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of configuration and parameters: equal fingerprints, equal codes."""
        digest = hashlib.sha256(self.cfg.fingerprint().encode())
        for name, leaf in named_leaves(self.params).items():
            digest.update(name.encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    def to_bytes(self) -> bytes:
        """The tokenizer as one file, which `from_bytes` reads: for the runs of models that depend on it."""
        file = io.BytesIO()
        leaves: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in named_leaves(self.params).items()}
        np.savez(file, **leaves | {CONFIG: np.asarray(self.cfg.to_json())})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Tokenizer":
        """Raises DataError, naming `where`, for what `to_bytes` has not written."""
        try:
            with np.load(io.BytesIO(data)) as file:
                cfg = config.Config.from_json(str(file[CONFIG]))
                leaves = {name: file[name] for name in file.files if name != CONFIG}
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{where} is no tokenizer, or a damaged one; copy it from another run of this model.") from error
        params: dict[str, Any] = {}
        for name, leaf in leaves.items():
            *parents, last = name.split("/")
            folder = params
            for parent in parents:
                folder = folder.setdefault(parent, {})
            folder[last] = leaf
        return cls(cfg, params)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images that it takes."""
        rows, cols = self.network.grid
        return rows * self.cfg.model.patch, cols * self.cfg.model.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns in which the codes of an image stand: those of its patches, or one row of latents. Words about the
        whole image stand above its patches if they fill rows of their own, else all is one row."""
        (rows, cols), words = self.network.grid, self.network.global_tokens
        if self.network.tokenizer.latents or words % cols:
            return 1, self.network.length
        return rows + words // cols, cols

    @property
    def codes(self) -> int:
        """How many codes there are; 0 of a continuous one."""
        return self.network.quantizer.size

    @property
    def bits(self) -> float:
        """Nominal bits of an image."""
        return self.network.bits

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Ids int32 [n, l] of images uint8 [h, w, 3].

        Raises:
          DataError: an image of another size. ConfigError: a continuous tokenizer has no ids.
        """
        config.require(self.codes > 0, "tokenizer.quantizer='none' has no ids; use reconstruct, or another quantizer.")
        return self._grouped(self._encode, self._checked(images))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Images uint8 [n, h, w, 3] of ids int [n, l].

        Raises:
          DataError: ids of another length, or that do not exist.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.shape[1] != self.network.length or (ids.size and not 0 <= ids.min() <= ids.max() < self.codes):
            raise DataError(
                f"ids {ids.shape}: this tokenizer decodes int [n, {self.network.length}] from 0 to {self.codes - 1}."
            )
        return self._grouped(self._decode, ids.astype(np.int32))

    def reconstruct(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """What the codes keep of images: uint8 [n, h, w, 3].

        Raises:
          DataError: an image of another size.
        """
        return self._grouped(self._reconstruct, self._checked(images))

    def _checked(self, images: Sequence[np.ndarray]) -> np.ndarray:
        for image in images:
            if image.shape != (*self.size, 3) or image.dtype != np.uint8:
                raise DataError(
                    f"an image {image.dtype} {image.shape}: this tokenizer takes uint8 {(*self.size, 3)}; resize it."
                )
        return np.stack(list(images)) if len(images) else np.zeros((0, *self.size, 3), np.uint8)

    def _grouped(self, run, values: np.ndarray) -> np.ndarray:
        if not len(values):
            like = jax.eval_shape(run, self.params, jax.ShapeDtypeStruct((1, *values.shape[1:]), values.dtype))
            return np.zeros((0, *like.shape[1:]), like.dtype)
        size = min(GROUP, 1 << (len(values) - 1).bit_length())  # few shapes, few programs
        filled = np.concatenate([values, np.repeat(values[:1], -len(values) % size, axis=0)])
        made = [np.asarray(run(self.params, filled[i : i + size])) for i in range(0, len(filled), size)]
        return np.concatenate(made)[: len(values)]


def holds_tokenizer(workdir: str | Path) -> bool:
    """Whether this is the folder of a tokenizer's run."""
    return (Path(workdir) / "config.json").is_file() and run_config(workdir).model.network in config.AUTOENCODERS


def load_tokenizer(workdir: str | Path, *, step: int | None = None) -> Tokenizer:
    """The tokenizer of a run: its newest valid checkpoint, averaged parameters.

    Raises:
      DataError: no run, no valid checkpoint, or the run of a model of documents.
    """
    from mmdiff.training.checkpoint import restore_params

    workdir = Path(workdir)
    cfg = run_config(workdir)
    if cfg.model.network not in config.AUTOENCODERS:
        raise DataError(f"{workdir} holds a model of documents, no tokenizer (model.network={cfg.model.network!r}).")
    return Tokenizer(cfg, restore_params(workdir / "checkpoints", step=step)[0])
