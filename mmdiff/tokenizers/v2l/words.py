"""What a V2L tokenizer takes from pretrained networks, as one file: words, their embeddings, and the tower that sees images.

    local    one embedding for each piece of the language model's vocabulary, in its order           float32 [v, e]
    global   one for each word, pair and triple of pieces that was found to describe images          float32 [g, e]
    tower    the vision half of the network of images and texts that made the embeddings

The file is a safetensors file; strings and sizes stand in its header. Made by expand.py, read when a tokenizer's training
starts, which takes all of it but the strings into the tokenizer's own parameters.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from safetensors.numpy import save_file

from mmdiff import config
from mmdiff.document import DataError
from mmdiff.pretrained.clip import CLIP, unit
from mmdiff.pretrained.encoder import VisionTower, normalised

TOWER = "tower/"


class Seeing(nnx.Module):
    """The vision half of CLIP."""

    def __init__(self, tower: config.Tower, width: int, rngs: nnx.Rngs):
        sizes = {
            "image_size": tower.side,
            "patch_size": tower.patch,
            "hidden_size": tower.width,
            "intermediate_size": tower.hidden,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.heads,
            "hidden_act": tower.activation,
        }
        self.vision = VisionTower(sizes, "quick_gelu", 1e-5, rngs, patch_bias=False, first_norm=True)
        self.vision_out = nnx.Linear(tower.width, width, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Float [n, h, w, 3] in [-1, 1] to vectors of length 1, [n, e]."""
        images = normalised((images + 1) * 127.5, self.vision.side)
        return unit(self.vision_out(self.vision.norm(self.vision(images)[:, 0])))


def seeing(tower: config.Tower, width: int, params: Mapping[str, Any]) -> Seeing:
    """With parameters as `Words.arrays` has them."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Seeing(tower, width, nnx.Rngs(0))))
    return nnx.merge(graph, _numbered(params))


def _numbered(tree: Any) -> Any:
    """Names of layers, which are strings in checkpoints and numbers in modules."""
    if not isinstance(tree, Mapping):
        return tree
    return {int(name) if str(name).isdigit() else name: _numbered(part) for name, part in tree.items()}


def tower_of(sizes: Mapping[str, Any]) -> config.Tower:
    """Of a CLIP's config.json.

    Raises:
      ConfigError: a tower of another form.
    """
    vision = sizes["vision_config"]
    epsilon = vision.get("layer_norm_eps", 1e-5)
    config.require(epsilon == 1e-5, f"vision_config: layer_norm_eps={epsilon}; only CLIP's 1e-05 is known here.")
    return config.Tower(
        side=vision["image_size"],
        patch=vision["patch_size"],
        width=vision["hidden_size"],
        hidden=vision["intermediate_size"],
        depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        activation=vision.get("hidden_act", "quick_gelu"),
    )


@dataclasses.dataclass(frozen=True)
class Words:
    """See above."""

    local_words: tuple[str, ...]
    global_words: tuple[str, ...]
    local: np.ndarray
    global_: np.ndarray
    tower: config.Tower
    tower_params: dict[str, np.ndarray]
    """By path, as in vision/encoder/layers/0/q/kernel."""

    @classmethod
    def of(
        cls, local_words, local: np.ndarray, global_words, global_: np.ndarray, model: CLIP, sizes: Mapping[str, Any]
    ) -> "Words":
        """With the vision half of `model`, whose config.json is `sizes`."""
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        own = {"/".join(map(str, path)): np.asarray(leaf[...], np.float32) for path, leaf in flat}
        kept = {path: leaf for path, leaf in own.items() if path.split("/")[0] in ("vision", "vision_out")}
        return cls(tuple(local_words), tuple(global_words), local, global_, tower_of(sizes), kept)

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
