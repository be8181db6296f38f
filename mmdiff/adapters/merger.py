"""LaVIT's features before they are quantised, for reading: a front end of the patches that its selector keeps, merged.

    k = keep(selector(f));   v = merger(f, k) W where k = 1, in order, and a learned blank behind the last of them

f are the tower's features. Tower and selector are the tokenizer's and stay as they are; the merger is a copy of its own, which
learns with the model, as LaVIT's does (mmdiff/tokenizers/lavit.py says what it computes). What is likelier kept than not is
kept, of more than K the likeliest K; with as many positions as patches none is lost. An image always has K positions, the last
of them blanks: LaVIT's have as many as are kept.

Source: Jin et al., LaVIT, arXiv 2309.04669. Letters: n images, t patches of the tower, f its width, k positions of an image, d
the model's width.
"""

from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff import config
from mmdiff.adapters.base import Adapter
from mmdiff.adapters.layers import linear
from mmdiff.config import FrontEnd
from mmdiff.config_files import run_config
from mmdiff.nn.layers import parameter
from mmdiff.parallel.sharding import Placement
from mmdiff.pretrained.encoder import VisionTower
from mmdiff.pretrained.tower import vision_config
from mmdiff.tokenizers.lavit import Merger, Selector, at_least_one, kept


class SelectingTower(VisionTower):
    """A vision tower of CLIP's form with a tokenizer's selector."""

    def __init__(self, sizes: config.Tower, rngs: nnx.Rngs):
        super().__init__(vision_config(sizes), rngs, patch_bias=False, first_norm=True)
        self.selector = Selector(sizes.width, rngs)

    def keep(self, features: jax.Array, most: int) -> jax.Array:
        """0 or 1 for each patch, float32 [n, t], of features [n, 1 + t, f]; at most `most` of an image, the likeliest."""
        choice = self.selector(features[:, 1:].astype(jnp.float32))
        rank = jnp.argsort(jnp.argsort(-choice[..., 0], axis=-1), axis=-1)
        return at_least_one(kept(choice, None), choice) * (rank < most)


class MergerAdapter(Adapter):
    def __init__(self, tower: config.Tower, outputs: int, tokens: int, depth: int, rngs: nnx.Rngs, place: Placement):
        self.tokens = tokens
        self.merger = Merger(tower.width, depth, tower.heads, rngs)
        self.out = linear(tower.width, outputs, rngs, place)
        self.blank = parameter(jax.random.normal(rngs.params(), (outputs,)) * 0.02, (None,))

    @classmethod
    def of(cls, front: FrontEnd, width: int, rngs: nnx.Rngs, place: Placement) -> Self:
        return cls(front.tower, width, front.tokens, front.depth, rngs, place)

    @staticmethod
    def tower(front: FrontEnd, rngs: nnx.Rngs) -> SelectingTower:
        return SelectingTower(front.tower, rngs)

    def see(self, features: jax.Array, tower: Any) -> jax.Array:
        """Features [n, 1 + t, f] of a `SelectingTower` to [n, k, d]."""
        packed = self.merger.packed(features[:, 1:], tower.keep(features, self.tokens), self.tokens)
        x = self.out(packed.x.astype(features.dtype))
        return jnp.where(packed.filled[..., None], x, self.blank[...].astype(x.dtype))

    @staticmethod
    def trained(front: FrontEnd, width: int, tower: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Merger and selector of a tokenizer, which must have been trained on this tower."""
        from mmdiff.training.checkpoint import restore_params

        run = run_config(front.init)
        config.require(
            run.model.network == "lavit" and run.tokenizer.causal and run.tokenizer.keep < 1,
            f"front_end.init={front.init!r} is no LaVIT tokenizer that selects (model.network='lavit', tokenizer.keep below 1 "
            "and tokenizer.causal=True): name the run of one.",
        )
        config.require(
            run.tokenizer.depth == front.depth,
            f"front_end.depth={front.depth}, and the merger in {front.init} has {run.tokenizer.depth} layers: set it to that.",
        )
        params = jax.tree.map(np.asarray, restore_params(Path(front.init) / "checkpoints")[0])
        seen, own = jax.tree.leaves(params["tower"]["vision"]), jax.tree.leaves(tower)
        config.require(
            len(seen) == len(own) and all(np.array_equal(a, b) for a, b in zip(seen, own, strict=True)),
            f"front_end.encoder={front.encoder!r} is not the encoder that {front.init} was trained on: name that.",
        )
        return tower | {"selector": params["selector"]}, {"merger": params["merger"]}


ADAPTER = MergerAdapter
