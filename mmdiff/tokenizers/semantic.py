"""Tokenizers that code what a frozen encoder says of an image, and not its pixels: those are drawn from the decoded codes.

    f, g = tower(image)                 frozen: features of its patches, embedding of the whole (tower.py)
    codes = quantise(what the network makes of f)
    y = decode(codes)                   close to f, or to g
    pixels ~ p(image | y)               a denoiser, trained beside it from stop_gradient(y) (pixel_decoder.py)

Parameters, further to quantizer and codebook: `tower`, which nothing changes, and what each network names. Images of an
autoencoder come back blurred where its codes say too little; here they come back sharp, with details that are made up.

    lavit   a code for each patch that is worth one: as many as the image needs (lavit_network.py)
    seed    a fixed number of codes in an order, the first ones of which say most (seed.py)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmdiff import config
from mmdiff.data.vocabulary import text_start
from mmdiff.layout import Rows
from mmdiff.tokenizers.network import Objective, TokenizerNetwork, named
from mmdiff.tokenizers.tower import read_tower

DIFFUSION, SAMPLING = config.Diffusion(), config.Sampling()  # the usual ones
DRAWING = 7  # key of the one noise from which all pixels are drawn
LAST_TENTH = 0.9  # of the training
Loss = tuple[jax.Array, tuple[dict[str, jax.Array], Any]]  # and what it is made of, and the codebook's next state


@dataclasses.dataclass(frozen=True)
class SemanticNetwork(TokenizerNetwork):
    """What the two have in common."""

    diffusion: config.Diffusion = DIFFUSION
    """Of the pixels."""
    sampling: config.Sampling = SAMPLING
    frozen: ClassVar[tuple[str, ...]] = ("tower",)

    def __post_init__(self):
        if not self.tokenizer.tower.side:
            raise config.ConfigError(
                f"tokenizer.tower says nothing about the encoder {self.tokenizer.encoder!r}: mmdiff train reads its sizes from "
                "the folder; see mmdiff.tokenizers.tower.resolved."
            )

    @property
    def code_grid(self) -> tuple[int, int]:
        return 1, self.length

    def looked(self, params: Any, rows: Rows) -> Any:
        """What the frozen parts say of a batch: all of a step that has no backward pass."""
        return self.bind(params).module.tower(self.images(rows)[0])

    def given(self) -> dict[str, Any]:
        return {"tower": named(read_tower(self.tokenizer))}


def semantic_network(cfg: config.Config, grid: tuple[int, int], mesh: Mesh | None, words: int) -> SemanticNetwork:
    """The one that a configuration names; `words`: size of the vocabulary, for the stage that reads texts."""
    from mmdiff.tokenizers.lavit_network import LavitNetwork
    from mmdiff.tokenizers.seed_network import PairNetwork, SeedNetwork

    common = cfg.model, cfg.tokenizer, grid, mesh, cfg.diffusion, cfg.sampling
    if cfg.model.network == "lavit":
        return LavitNetwork(*common)
    if cfg.tokenizer.stage == 2:
        return SeedNetwork(*common)
    return PairNetwork(*common, words, text_start(cfg.layout.max_grid), cfg.layout.row_length)


def objective_of_images(network: TokenizerNetwork, losses: Callable[..., Loss], cfg: config.Config) -> Objective:
    """That of `losses`, of (params, images [n, h, w, 3], weight [n], key, restart): `restart` says whether dead codes may start
    anew, which none does in the last tenth of the training."""
    last = LAST_TENTH * cfg.training.steps

    def loss_of(params: Any, rows: Rows, key: jax.Array, step: jax.Array):
        images, weight = network.images(rows)
        return losses(params, images, weight, key, step < last)

    return loss_of


def weighted(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of values [n] that count as `weight` [n] says."""
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-9)


def own_keys(images: jax.Array, key: jax.Array) -> jax.Array:
    """A key for each image [n], from `key` and its pixels (float [-1, 1], levels of uint8): an image alone has the key that
    it has among others."""
    levels = jnp.rint((images + 1) * 127.5).astype(jnp.uint32).reshape(len(images), -1)
    odd = 2 * jnp.arange(levels.shape[1], dtype=jnp.uint32) + 1
    mixed = (levels + 1) * odd * jnp.uint32(0x9E3779B1)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))((mixed ^ (mixed >> 15)).sum(-1, dtype=jnp.uint32))
