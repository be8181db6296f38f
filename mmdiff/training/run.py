"""A run's parts, built once from its configuration: data, network, optimiser, state. The loop puts them to work."""

import dataclasses
import sys
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from mmdiff import config
from mmdiff.data.batches import Batches
from mmdiff.data.sources import Source, open_source, open_vocabulary
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.models.network import Network
from mmdiff.parallel.distributed import is_first
from mmdiff.training import state as train_state
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.state import TrainState

VOCABULARY_FILE = "vocabulary.model"


@dataclasses.dataclass(frozen=True)
class Run:
    cfg: config.Config
    vocabulary: Vocabulary
    train: Batches
    validation: Batches | None
    network: Network
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh

    def new_state(self) -> TrainState:
        """The state before the first step; a function of the seed."""
        params = self.network.init(jax.random.fold_in(jax.random.key(self.cfg.training.seed), 1))
        return train_state.create(params, self.tx, self.cfg.training.seed)

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
    vocabulary = find_vocabulary(cfg, source, workdir)
    for line in [*cfg.model.warnings(), *vocabulary.warnings()] if is_first() else []:
        print(f"warning: {line}", file=sys.stderr)
    held_out = open_source(cfg, "validation")
    validation = Batches(held_out, vocabulary, cfg, learn=False) if len(held_out) else None
    tx, schedule = make_optimizer(cfg.optimizer, cfg.training.steps)
    train = Batches(source, vocabulary, cfg)
    return Run(cfg, vocabulary, train, validation, Network.of(cfg, vocabulary.size, mesh), tx, schedule, mesh)


def find_vocabulary(cfg: config.Config, source: Source, workdir: Path) -> Vocabulary:
    """The run's own vocabulary once it has one, else the one that `data.vocabulary` names."""
    saved = workdir / VOCABULARY_FILE
    return Vocabulary.load(saved, cfg.layout.max_grid) if saved.is_file() else open_vocabulary(cfg, source)
