"""A run's parts, built once from its configuration: data, network, optimiser, state. The loop puts them to work."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from mmdiff import config
from mmdiff.adapters.base import TOWER
from mmdiff.adapters.folders import front_end_parameters
from mmdiff.data.batches import Batches
from mmdiff.data.sources import Source, open_source, open_vocabulary
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.models.network import Network
from mmdiff.parallel.distributed import is_first
from mmdiff.tokenizers.model import Tokenizer, load_tokenizer
from mmdiff.tokenizers.network import UNTRAINED, TokenizerNetwork
from mmdiff.tokenizers.training import trained_alone
from mmdiff.training import state as train_state
from mmdiff.training.checkpoint import restore_params
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.state import TrainState

VOCABULARY_FILE = "vocabulary.model"
TOKENIZER_FILE = "tokenizer.npz"


@dataclasses.dataclass(frozen=True)
class Run:
    cfg: config.Config
    vocabulary: Vocabulary
    train: Batches
    validation: Batches | None
    network: Network | TokenizerNetwork
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    tokenizer: Tokenizer | None = None
    """Of the codes that stand for images, with layout.codes."""

    def new_state(self) -> TrainState:
        """The state before the first step; a function of the seed."""
        params = self.network.init(jax.random.fold_in(jax.random.key(self.cfg.training.seed), 1))
        return self._created(params)

    def _created(self, params: dict[str, Any]) -> TrainState:
        frozen = self.network.frozen if isinstance(self.network, Network) else ()
        return train_state.create(params, self.tx, self.cfg.training.seed, frozen)

    def first_state(self) -> TrainState:
        """`new_state` on the mesh, its parameters those of `training.init` as far as that has them; those of a frozen encoder,
        of words or of a front end come along, or from their files.

        Raises:
          ConfigError: the other run's parameters do not fit. DataError: it is no run, or a folder does not hold what it should.
        """
        where = jax.tree.map(lambda a: a.sharding, self.abstract_state())
        init = self.cfg.training.init
        given = restore_params(Path(init) / "checkpoints")[0] if init else {}
        if isinstance(self.network, TokenizerNetwork):
            given = self.network.inherited(given)
            if not {*self.network.frozen, UNTRAINED} & given.keys():
                given = self.network.given() | given
        elif TOWER not in given:
            given = front_end_parameters(self.cfg.front_end, self.cfg.model.width) | given
        if not given:
            return jax.jit(self.new_state, out_shardings=where)()

        def started(given) -> TrainState:
            return self._created(merged(self.new_state().params, given, init))

        return jax.jit(started, out_shardings=where)(jax.tree.map(np.asarray, given))

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        state = jax.eval_shape(self.new_state)
        where = train_state.shardings(state, self.network.axes(), self.mesh)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)


def build(cfg: config.Config, workdir: Path, mesh: Mesh) -> Run:
    """Open the data and make everything a run on `mesh` needs.

    Raises:
      ConfigError, DataError: with the one line to show.
    """
    source = open_source(cfg, "train")
    vocabulary, tokenizer = find_vocabulary(cfg, source, workdir), None
    if cfg.layout.codes:
        tokenizer = find_tokenizer(cfg, workdir)
        vocabulary = vocabulary.with_codes(tokenizer.codes)
    for line in [*cfg.model.warnings(), *vocabulary.warnings()] if is_first() else []:
        print(f"warning: {line}", file=sys.stderr)
    held_out = open_source(cfg, "validation")
    validation = Batches(held_out, vocabulary, cfg, learn=False, tokenizer=tokenizer) if len(held_out) else None
    tx, schedule = make_optimizer(cfg.optimizer, cfg.training.steps)
    train = Batches(source, vocabulary, cfg, tokenizer=tokenizer)
    network = make_network(cfg, vocabulary.size, mesh)
    if isinstance(network, TokenizerNetwork):
        tx = trained_alone(tx, network)
    return Run(cfg, vocabulary, train, validation, network, tx, schedule, mesh, tokenizer)


def make_network(cfg: config.Config, vocabulary_size: int, mesh: Mesh | None = None) -> Network | TokenizerNetwork:
    """The network of a configuration."""
    if cfg.model.network in config.TOKENIZERS:
        return TokenizerNetwork.of(cfg, mesh, vocabulary_size)
    return Network.of(cfg, vocabulary_size, mesh)


def find_vocabulary(cfg: config.Config, source: Source, workdir: Path) -> Vocabulary:
    """The run's own vocabulary once it has one, else that of `training.init`, else the one that `data.vocabulary` names."""
    for folder in (workdir, Path(cfg.training.init)) if cfg.training.init else (workdir,):
        if (folder / VOCABULARY_FILE).is_file():
            return Vocabulary.load(folder / VOCABULARY_FILE, cfg.layout.max_grid)
    return open_vocabulary(cfg, source)


def find_tokenizer(cfg: config.Config, workdir: Path) -> Tokenizer:
    """The run's own tokenizer once it has one, else that of `training.init`, else the one that `data.tokenizer` names.

    Raises:
      ConfigError: its codes do not fit the model. DataError: it cannot be read.
    """
    for folder in (workdir, Path(cfg.training.init)) if cfg.training.init else (workdir,):
        if (folder / TOKENIZER_FILE).is_file():
            return Tokenizer.from_bytes((folder / TOKENIZER_FILE).read_bytes(), str(folder / TOKENIZER_FILE))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    side = tokenizer.cfg.model.patch
    config.require(
        side == cfg.model.patch,
        f"model.patch={cfg.model.patch}, and a code of {cfg.data.tokenizer} stands for {side}x{side} pixels: set it to {side}.",
    )
    most = tokenizer.grid[1]
    config.require(
        not tokenizer.dynamic or cfg.layout.max_grid >= most,
        f"layout.max_grid={cfg.layout.max_grid}: an image may have {most} codes of {cfg.data.tokenizer}, which stand in one "
        f"row; set it to {most}.",
    )
    config.require(
        tokenizer.codes > 0, f"{cfg.data.tokenizer} has no codes (tokenizer.quantizer='none'): take a tokenizer that has some."
    )
    return tokenizer


def merged(fresh: dict[str, Any], given: dict[str, Any], source: str) -> dict[str, Any]:
    """`given` parameters in the structure of `fresh` ones; a leaf that was not given stays fresh.

    Raises:
      ConfigError: a leaf of `given` has another shape here, or no place.
    """
    own, others = train_state.named_leaves(fresh), train_state.named_leaves(given)
    for path, leaf in others.items():
        there, here = tuple(leaf.shape), tuple(own[path].shape) if path in own else None
        if there != here:
            told = "has no place" if here is None else f"has shape {here}"
            raise config.ConfigError(
                f"training.init={source!r}: its parameter {path}, of shape {there}, {told} in this model; use its own "
                "configuration (mmdiff train --init without an experiment file), or leave training.init out."
            )
    return jax.tree.unflatten(jax.tree.structure(fresh), [others.get(path, leaf) for path, leaf in own.items()])
