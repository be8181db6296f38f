"""What a V2L tokenizer takes from pretrained networks, as one file: words, their embeddings, and the tower that sees images.

    local    one embedding for each piece of the language model's vocabulary, in its order           float32 [v, e]
    global   one for each word, pair and triple of pieces that was found to describe images          float32 [g, e]
    tower    the vision half of the network of images and texts that made the embeddings

The file is a safetensors file; strings and sizes stand in its header. Made by expand.py, read when a tokenizer's training
starts, which takes all of it but the strings into the tokenizer's own parameters.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.document import DataError
from mmdiff.pretrained.clip import CLIP
from mmdiff.pretrained.tower import sizes_of

TOWER = "tower/"


PARTS = {"vision": "vision", "vision_out": "out"}  # of a CLIP, as mmdiff.pretrained.tower.Tower calls them


@dataclasses.dataclass(frozen=True)
class Words:
    """See above."""

    local_words: tuple[str, ...]
    global_words: tuple[str, ...]
    local: np.ndarray
    global_: np.ndarray
    tower: config.Tower
    tower_params: dict[str, np.ndarray]
    """Of mmdiff.pretrained.tower.Tower by path, as in vision/encoder/layers/0/q/kernel."""

    @classmethod
    def of(
        cls, local_words, local: np.ndarray, global_words, global_: np.ndarray, model: CLIP, sizes: dict[str, Any]
    ) -> "Words":
        """With the vision half of `model`, whose config.json is `sizes`."""
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        own = {"/".join(map(str, path)): np.asarray(leaf[...], np.float32) for path, leaf in flat}
        split = [(path.partition("/"), leaf) for path, leaf in own.items()]
        kept = {f"{PARTS[part]}/{rest}": leaf for (part, _, rest), leaf in split if part in PARTS}
        return cls(tuple(local_words), tuple(global_words), local, global_, sizes_of(sizes, "config.json of the towers"), kept)

    def arrays(self) -> dict[str, Any]:
        """The untrained part of a tokenizer's parameters: float32, nested dicts."""
        found: dict[str, Any] = {"local": self.local, "global": self.global_, "tower": {}}
        for path, leaf in self.tower_params.items():
            *parents, last = path.split("/")
            inside = found["tower"]
            for parent in parents:
                inside = inside.setdefault(parent, {})
            inside[last] = leaf
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), found)

    def save(self, path: str | Path) -> None:
        from safetensors.numpy import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {
            "local": json.dumps(self.local_words),
            "global": json.dumps(self.global_words),
            "tower": json.dumps(dataclasses.asdict(self.tower)),
        }
        leaves = {"local": self.local, "global": self.global_} | {TOWER + name: a for name, a in self.tower_params.items()}
        part = path.with_name(path.name + ".part")  # replaced in one move: a kill leaves the old file or the new one
        save_file({name: np.ascontiguousarray(leaf, np.float32) for name, leaf in leaves.items()}, part, metadata=told)
        part.replace(path)


def read_words(path: str | Path) -> Words:
    """What `Words.save` wrote.

    Raises:
      DataError: nothing of the kind is there.
    """
    import safetensors

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of words; experiments/frozen_lm/words.py makes one.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            told = file.metadata() or {}
            leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        local, global_ = (tuple(json.loads(told[name])) for name in ("local", "global"))
        tower = config.Tower(**json.loads(told["tower"]))
        kept = {name.removeprefix(TOWER): leaf for name, leaf in leaves.items() if name.startswith(TOWER)}
        return Words(local, global_, leaves["local"], leaves["global"], tower, kept)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no file of words ({error}); make it anew with experiments/frozen_lm/words.py.") from error
