"""A random model that stands for every run, so that commands need no training."""

import jax
import numpy as np
import pytest

import mmdiff
from mmdiff import config
from mmdiff.cli.main import main
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model


@pytest.fixture(scope="session")
def random_model():
    cfg = config.Config(
        model=config.Model(width=32, depth=1, patch=8, key_width=16, lossless=False),
        layout=config.Layout(row_length=400),
        data=config.Data(source="shapes", max_objects=1),
        sampling=config.Sampling(steps=2, max_tokens=6),
    )
    vocabulary = Vocabulary.bytes()
    params = Network(cfg.model, vocabulary.size).init(jax.random.key(0))
    noise = jax.random.key(1)
    return Model(cfg, jax.tree.map(lambda a: a + 0.1 * jax.random.normal(noise, a.shape), params), vocabulary)


@pytest.fixture
def command(random_model, monkeypatch, capsys):
    """Runs `mmdiff ...` in this process on the random model: (exit code, stdout, stderr)."""
    monkeypatch.setattr(mmdiff, "load", lambda workdir, **_: random_model)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def scene(tmp_path):
    """An image file, 40 x 48."""
    path = tmp_path / "scene.png"
    mmdiff.Image(np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)).save(path)
    return path
