"""The ablations that come with the project: every arm is a network that can be made, and asks something of its own."""

from pathlib import Path

import jax
import pytest

from mmdiff.models.network import Network
from mmdiff.sweeps.sweep import load_sweep

FILES = sorted((Path(__file__).parents[1] / "experiments" / "ablations").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_arm_can_be_made_and_no_two_are_the_same(path):
    sweep = load_sweep(path)
    assert len({cfg.fingerprint() for cfg in sweep.arms.values()}) == len(sweep.arms) > 1
    for name, cfg in sweep.arms.items():
        shapes = jax.eval_shape(Network.of(cfg, 269).init, jax.random.key(0))
        assert jax.tree.leaves(shapes), name
        if cfg.data.source == "documents":  # images of 32 x 32 fill the rows
            grid = (32 // cfg.model.patch) ** 2 + cfg.layout.time_token
            assert cfg.layout.row_length % grid == 0, name
