"""U-Net, U-ViT and DiT through everything a transformer goes through: training, checkpoints, drawing, measuring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmdiff
from mmdiff import config
from mmdiff.data.batches import Batches
from mmdiff.data.sources import open_source, open_vocabulary
from mmdiff.document import IMG, Document
from mmdiff.evaluation.evaluate import evaluate
from mmdiff.models.network import Network
from mmdiff.training import state as train_state
from mmdiff.training.loop import train
from mmdiff.training.loss import loss_sums
from mmdiff.training.metrics import read_metrics
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.step import make_train_step

SHAPES = {
    "unet": {"width": 8, "depth": 1, "channels": (1, 1), "head_width": 8},
    "uvit": {"width": 48, "depth": 2, "head_width": 16},
    "dit": {"width": 48, "depth": 1, "head_width": 16},
}


def tiny_config(kind: str) -> config.Config:
    return config.Config(
        name=kind,
        model=config.Model(network=kind, patch=8, lossless=kind == "unet", **SHAPES[kind]),
        layout=config.Layout(row_length=18, markers=False),
        data=config.Data(source="shapes", size=8, generator_image_size=24, max_objects=1, vocabulary="bytes"),
        optimizer=config.Optimizer(learning_rate=3e-3, warmup=2, decay="constant"),
        training=config.Training(
            steps=20, batch_size=2, log_every=1, checkpoint_every=20, validate_every=20, validation_rows=2, sample_every=0
        ),
        sampling=config.Sampling(steps=2),
    )


@pytest.mark.parametrize("kind", ["uvit", "dit"])  # the third: below
def test_the_loss_of_a_repeated_batch_falls(kind):
    cfg = tiny_config(kind)
    source = open_source(cfg, "train")
    rows = Batches(source, open_vocabulary(cfg, source), cfg).batch(0)
    network = Network.of(cfg, 300)
    tx, _ = make_optimizer(cfg.optimizer, 100)
    state = train_state.create(jax.jit(network.init)(jax.random.key(0)), tx, 0)
    eps = jax.random.normal(jax.random.key(1), rows.patches.shape)
    loss = jax.jit(functools.partial(loss_sums, network, cfg.diffusion))
    at_middle = lambda: loss(state.params, rows, jnp.where(rows.noised, 0.5, 0.0), eps).image
    before, step = at_middle(), jax.jit(make_train_step(network, cfg, tx))
    for _ in range(20):
        state, metrics = step(state, rows)
    assert metrics["text_loss"] == 0 and metrics["skips"] == 0
    assert at_middle() < 0.5 * before


def test_a_run_is_measured_saved_loaded_and_draws(tmp_path, capsys):
    """One network is enough: all lie behind the same interface (models.rivals), this one with the most parameters."""
    train(tiny_config("unet"), tmp_path / "run")
    assert "network/down/24_0/residual/conv_in/kernel" in capsys.readouterr().err  # the parameter table
    model = mmdiff.load(tmp_path / "run")
    losses, held_out = ([r for r in read_metrics(tmp_path / "run") if name in r] for name in ("loss", "x_error"))
    assert losses[-1]["step"] == 20 and losses[-1]["loss"] < 0.5 * losses[0]["loss"] and len(held_out) == 1
    prompt = Document(IMG)
    first, second = (d.images[0].pixels for d in model.generate([prompt, prompt], seed=3))
    assert first.shape == (24, 24, 3) and not np.array_equal(first, second)
    assert np.array_equal(second, model.generate([prompt, prompt], seed=3)[1].images[0].pixels)
    with pytest.raises(config.ConfigError, match=r"an image of 16x16: .* can only take, images of 24x24"):
        model.generate([prompt], image_size=(16, 16))
    assert evaluate(model, ["x_error"]) == {"x_error": held_out[-1]["x_error"]}
    with pytest.raises(config.ConfigError, match="16x16"):
        model.score([Document(mmdiff.Image(np.zeros((16, 16, 3), np.uint8)))])
