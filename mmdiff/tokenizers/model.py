"""The public face of a trained tokenizer: images to codes and back.

tokenizer = mmdiff.load_tokenizer("runs/tokenizer")
ids = tokenizer.encode(images)              int32 [n, l], or of a dynamic tokenizer a list of n arrays int32 [k]
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

        def encode(params, key, images):
            seen = bind(params).seen(scaled(images), key)
            return seen.ids, seen.lengths

        def decode(params, key, ids):
            lengths = (ids >= 0).sum(-1)
            return levels(bind(params).drawn(jnp.maximum(ids, 0), lengths))

        def reconstruct(params, key, images):
            return levels(bind(params).seen(scaled(images), key).made)

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
        """Rows and columns in which the codes of an image stand: those of its patches, or one row; of a dynamic tokenizer,
        that of the most codes."""
        return self.network.code_grid

    @property
    def dynamic(self) -> bool:
        """Whether images have different numbers of codes, which then stand in one row."""
        return self.network.dynamic

    @property
    def codes(self) -> int:
        """How many codes there are; 0 of a continuous one."""
        return self.network.quantizer.size

    @property
    def bits(self) -> float:
        """Nominal bits of an image; of a dynamic tokenizer, of one with the most codes."""
        return self.network.bits

    def levels(self, values: int) -> np.ndarray:
        """The numbers of every code as pixels would be given, uint8 [codes, values]: the largest of all is 255, the negative of
        it 0; what a code lacks to so many numbers is 128.

        Raises:
          ConfigError: a code has more numbers.
        """
        network = self.network
        ids, bound = jnp.arange(self.codes), network.bind(self.params)
        table = np.asarray(network.quantizer.decode(bound.params, bound.codebook, ids), np.float32)
        config.require(
            table.shape[1] <= values,
            f"a code has {table.shape[1]} numbers, and a position of a row carries {values} (3 model.patch^2): with "
            "layout.images='next_vector' take a tokenizer of narrower codes, or a larger model.patch.",
        )
        scaled = np.rint(127.5 * (1 + table / max(np.abs(table).max(), 1e-9))).astype(np.uint8)
        return np.pad(scaled, ((0, 0), (0, values - scaled.shape[1])), constant_values=128)

    def encode(self, images: Sequence[np.ndarray], *, seed: int | None = None) -> Any:
        """Ids of images uint8 [h, w, 3]: int32 [n, l], or of a dynamic tokenizer a list of n arrays int32 [k].

        Args:
          seed: another one, other draws, with a tokenizer that draws at random what it keeps of an image (lavit, if it is not
            deterministic). Without it an image always has the same codes.
        Raises:
          DataError: an image of another size. ConfigError: a continuous tokenizer has no ids; nothing is drawn at random.
        """
        config.require(self.codes > 0, "tokenizer.quantizer='none' has no ids; use reconstruct, or another quantizer.")
        settings = self.cfg.tokenizer
        random = self.dynamic and not settings.deterministic and settings.keep < 1
        config.require(seed is None or random, f"seed={seed}: this tokenizer draws nothing at random; leave it out.")
        ids, lengths = self._grouped(self._encode, self._checked(images), seed or 0)
        return ids if not self.dynamic else [row[:length] for row, length in zip(ids, lengths, strict=True)]

    def decode(self, ids: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Images uint8 [n, h, w, 3] of ids int [n, l]; of a dynamic tokenizer also of n arrays [k] of any lengths.

        Raises:
          DataError: ids that are no integers, that do not exist, or as many as an image cannot have.
        """
        most = self.network.length
        least = 1 if self.dynamic else most
        counts = f"{least} to {most}" if self.dynamic else f"{most}"
        told = f"this tokenizer decodes {counts} for each image, from 0 to {self.codes - 1}."
        try:
            rows = [np.asarray(row) for row in ids]
        except (TypeError, ValueError) as error:
            raise DataError(f"ids are no rows of integers ({error}): {told}") from error
        for number, row in enumerate(rows):
            if row.ndim != 1 or not least <= len(row) <= most:
                found = f"of shape {row.shape}"
            elif row.dtype.kind not in "iu":
                found = f"of type {row.dtype}, no integers"
            elif not 0 <= row.min() <= row.max() < self.codes:
                found = f"from {row.min()} to {row.max()}"
            else:
                continue
            raise DataError(f"ids[{number}] {found}: {told}")
        filled = np.full((len(rows), most), -1, np.int32)
        for row, given in zip(filled, rows, strict=True):
            row[: len(given)] = given
        return self._grouped(self._decode, filled)

    def reconstruct(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """What the codes keep of images: uint8 [n, h, w, 3].

        Raises:
          DataError: an image of another size.
        """
        if self.codes:  # by the same programs, so that it is what the codes decode to, to the bit
            return self.decode(self.encode(images))
        return self._grouped(self._reconstruct, self._checked(images))

    def _checked(self, images: Sequence[np.ndarray]) -> np.ndarray:
        for image in images:
            if image.shape != (*self.size, 3) or image.dtype != np.uint8:
                raise DataError(
                    f"an image {image.dtype} {image.shape}: this tokenizer takes uint8 {(*self.size, 3)}; resize it."
                )
        return np.stack(list(images)) if len(images) else np.zeros((0, *self.size, 3), np.uint8)

    def _grouped(self, run, values: np.ndarray, seed: int = 0) -> Any:
        key = jax.random.key(seed)
        if not len(values):
            like = jax.eval_shape(run, self.params, key, jax.ShapeDtypeStruct((1, *values.shape[1:]), values.dtype))
            return jax.tree.map(lambda a: np.zeros((0, *a.shape[1:]), a.dtype), like)
        size = min(GROUP, 1 << (len(values) - 1).bit_length())  # few shapes, few programs
        filled = np.concatenate([values, np.repeat(values[:1], -len(values) % size, axis=0)])
        made = [run(self.params, key, filled[i : i + size]) for i in range(0, len(filled), size)]
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(values)], *made)


def holds_tokenizer(workdir: str | Path) -> bool:
    """Whether this is the folder of a tokenizer's run."""
    return (Path(workdir) / "config.json").is_file() and run_config(workdir).model.network in config.TOKENIZERS


def load_tokenizer(workdir: str | Path, *, step: int | None = None) -> Tokenizer:
    """The tokenizer of a run: its newest valid checkpoint, averaged parameters.

    Raises:
      DataError: no run, no valid checkpoint, or the run of a model of documents.
    """
    from mmdiff.training.checkpoint import restore_params

    workdir = Path(workdir)
    cfg = run_config(workdir)
    if cfg.model.network not in config.TOKENIZERS:
        raise DataError(f"{workdir} holds a model of documents, no tokenizer (model.network={cfg.model.network!r}).")
    if cfg.model.network == "seed" and cfg.tokenizer.stage == 1:
        raise DataError(f"{workdir} holds the first stage of SEED, which has no codes yet: train the second on it.")
    return Tokenizer(cfg, restore_params(workdir / "checkpoints", step=step)[0])
