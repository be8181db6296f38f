"""The architecture without its parameters.

Everywhere outside mmdiff/models and mmdiff/nn a model is a pair: a `Network`, hashable, and its parameters, a plain nested
dict. `Network.bind` makes a module of the two, for use inside jit:

    hidden(tokens, is_patch, z, u, cell, position, mask)     -> [b, t, d]; also context= and, with model.step_input, step=
    predict(hidden, cell)                                    -> [b, t, p], the prediction (x, eps or v) at patches
    text_nats(hidden, targets), text_logits(hidden)          only with a vocabulary
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mmdiff import config
from mmdiff.adapters.base import TOWER
from mmdiff.models.rivals import Rival
from mmdiff.models.transfusion import Transfusion, compute_type, gates, head, is_layers, unrolled
from mmdiff.parallel.sharding import Axes, Placement
from mmdiff.pretrained.tower import named, numbered


@dataclasses.dataclass(frozen=True)
class Network:
    """See above. `mesh`: mmdiff/parallel/sharding.py."""

    cfg: config.Model
    vocabulary_size: int
    """0: images alone."""
    mesh: Mesh | None = None
    grid: tuple[int, int] | None = None
    """Rows and columns of patches of every image, for networks that take whole images."""
    images: str = "denoised"
    """layout.images."""
    front: config.FrontEnd = dataclasses.field(default_factory=config.FrontEnd)
    size: tuple[int, int] | None = None
    """Height and width of every image, for front ends."""

    @classmethod
    def of(cls, cfg: config.Config, vocabulary_size: int, mesh: Mesh | None = None) -> "Network":
        """The network of an experiment. Raises ConfigError for an image tokenizer, which is no network of documents."""
        config.require(
            cfg.model.network not in config.TOKENIZERS,
            f"model.network={cfg.model.network!r} is an image tokenizer: use mmdiff train and mmdiff evaluate with it.",
        )
        grid = None
        if cfg.model.network != "transfusion" and cfg.fixed_size is not None:
            height, width = cfg.fixed_size
            grid = height // cfg.model.patch, width // cfg.model.patch
        size = cfg.fixed_size if cfg.front_end.kind != "none" else None
        words = vocabulary_size if cfg.layout.markers else 0
        return cls(cfg.model, words, mesh, grid, cfg.layout.images, cfg.front_end, size)

    def check_size(self, height: int, width: int) -> None:
        """Raises ConfigError for an image that a network for images of one size cannot take."""
        if self.grid is not None:
            own = self.grid[0] * self.cfg.patch, self.grid[1] * self.cfg.patch
            config.require(
                (height, width) == own,
                f"an image of {height}x{width}: model.network={self.cfg.network!r} was trained on, and can only take, images "
                f"of {own[0]}x{own[1]}; resize it, or change image_size.",
            )

    @property
    def patch_values(self) -> int:
        """Channel values of pixels at one position of a row."""
        return 3 * self.cfg.patch**2 if self.size is None else self.front.values(*self.size, self.cfg.patch)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parts of the parameters that are never trained."""
        return (TOWER,) if self.size is not None and self.front.frozen else ()

    @property
    def cached_layers(self) -> int:
        """Layers whose keys and values sampling keeps."""
        return self.cfg.depth + gates(self.cfg, self.front) if self.cfg.network == "transfusion" else 0

    @property
    def place(self) -> Placement:
        return Placement(self.mesh)

    @property
    def head(self) -> tuple[int, int, int]:
        """Heads, key width and value width of a cache entry."""
        return head(self.cfg)

    @property
    def cache_axes(self) -> tuple[Axes, Axes]:
        """Names of the axes of cached keys and values [b, h, s, .]."""
        if self.cfg.block == "gau":
            return ("rows", None, None, None), ("rows", None, None, "expansion")
        return ("rows", "heads", None, None), ("rows", "heads", None, None)

    @property
    def compute_type(self):
        return compute_type(self.cfg, self.place)

    @property
    def unrolled(self) -> bool:
        return self.cfg.network == "transfusion" and unrolled(self.cfg, self.place)

    def _module(self, key=0) -> Any:
        if self.cfg.network != "transfusion":
            return Rival(self.cfg, self.grid, nnx.Rngs(params=key), self.place)
        front = None if self.size is None else (self.front, self.size)
        return Transfusion(self.cfg, self.vocabulary_size, nnx.Rngs(params=key), self.place, self.images, front)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters: a plain nested dict of float32 arrays."""
        return named(nnx.to_pure_dict(nnx.state(self._module(key))))

    @functools.lru_cache  # noqa: B019  networks are few
    def axes(self) -> dict[str, Any]:
        """The names of every parameter's axes: a tuple where `init` has an array."""
        variables = nnx.state(nnx.eval_shape(self._module))

        def of(path, variable):  # modules of mmdiff/pretrained name none
            axes = variable.get_metadata().get("axes", ())
            return (*[None] * (variable.ndim - len(axes)), *axes)

        return named(nnx.to_pure_dict(nnx.map_state(of, variables)))

    def stored(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters, or anything of their structure, told to XLA to lie as stored parameters do; call it inside jit."""

        def constrain(leaf, axes):
            return tuple(self.place(a, *axes[1:]) for a in leaf) if is_layers(leaf) else self.place(leaf, *axes)

        axes = {name: self.axes()[name] for name in params}  # gradients lack what is frozen
        return jax.tree.map(constrain, params, axes, is_leaf=is_layers)

    def separate(self, params: dict[str, Any]) -> dict[str, Any]:
        """The same parameters with a tuple of per-layer arrays for each stacked one; `restack` undoes it.

        Sampling takes them so: a program that reads few positions would spend half its time cutting up stacked arrays.
        """
        if "blocks" not in params:
            return params
        split = lambda leaf: leaf if is_layers(leaf) else tuple(leaf[i] for i in range(self.cfg.depth))
        layers = jax.tree.map(split, params["blocks"], is_leaf=is_layers)
        return params | {"blocks": layers}

    def restack(self, params: dict[str, Any]) -> dict[str, Any]:
        """Tuples of per-layer arrays as stacked ones; also for anything of the parameters' structure, as gradients."""
        if "blocks" not in params:
            return params
        stack = lambda leaf: jnp.stack(leaf) if is_layers(leaf) else leaf
        return params | {"blocks": jax.tree.map(stack, params["blocks"], is_leaf=is_layers)}

    def bind(self, params: dict[str, Any]) -> Any:
        """The module with these parameters."""
        return nnx.merge(nnx.graphdef(nnx.eval_shape(self._module)), numbered(params))
