"""Runs behind a front end: the tower is read once, kept, and never changes; what does not fit is told in one line."""

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmdiff
from mmdiff.adapters.base import TOWER
from mmdiff.adapters.folders import front_end_parameters
from mmdiff.config import Config, ConfigError, Data, FrontEnd, Layout, Model, Optimizer, Tower, Training
from mmdiff.document import DataError, Document
from mmdiff.pretrained.load import Weights
from mmdiff.training.checkpoint import restore_params
from mmdiff.training.flops import training_flops
from mmdiff.training.loop import train
from mmdiff.training.state import named_leaves
from tests.adapters.tiny import MANY, configuration, write_tower

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrained"
SCRIPT = Path(__file__).parents[2] / "experiments" / "stand_ins" / "qformer.py"


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    write_tower(folder)
    return folder


def experiment(encoder, **front) -> Config:
    cfg = configuration("mlp", encoder=encoder)
    return dataclasses.replace(
        cfg,
        front_end=dataclasses.replace(cfg.front_end, **front),
        layout=Layout(row_length=192, max_grid=4, images="read"),
        data=Data(source="shapes", generator=(("caption", 1.0),), generator_image_size=24, vocabulary="bytes", size=8),
        optimizer=Optimizer(learning_rate=1e-2, warmup=0, weight_decay=0.1),
        training=Training(steps=2, batch_size=2, log_every=1, checkpoint_every=1, sample_every=0, validate_every=0, keep=2),
    )


def test_a_run_keeps_its_tower_to_the_bit(tower, tmp_path):
    """Under weight decay and a moving average, after the tower's own folder has gone; resumed to the same bits."""
    elsewhere = tmp_path / "moved"
    shutil.copytree(tower, elsewhere)
    given = named_leaves(front_end_parameters(configuration("mlp", encoder=tower).front_end, 32))
    cfg, run = experiment(elsewhere), tmp_path / "run"
    train(cfg, run)
    shutil.rmtree(elsewhere)
    before = {ema: named_leaves(restore_params(run / "checkpoints", ema=ema, step=1)[0]) for ema in (False, True)}
    after = {ema: named_leaves(restore_params(run / "checkpoints", ema=ema)[0]) for ema in (False, True)}
    for ema in (False, True):
        assert {name for name in after[ema] if name.startswith(f"{TOWER}/")} == set(given)
        for name, leaf in after[ema].items():
            same = np.array_equal(leaf, before[ema][name])
            assert same if name in given else not same or not np.any(leaf), name
            if name in given:
                np.testing.assert_array_equal(leaf, given[name])
    model = mmdiff.load(run)
    with pytest.raises(DataError, match=r"only reads them \(layout\.images='read'\)"):
        model.generate([Document("a", mmdiff.IMG)])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: float(line["loss"]).hex() for line in lines if "loss" in line}
    shutil.rmtree(run / "checkpoints" / "2")
    (run / "metrics.jsonl").unlink()
    train(cfg, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: float(line["loss"]).hex() for line in lines if "loss" in line} == {2: losses[2]}


def test_what_a_folder_does_not_hold_is_told(tower, tmp_path):
    def refused(front: FrontEnd, told: str, kind=ConfigError):
        with pytest.raises(kind, match=told) as problem:
            front_end_parameters(front, 32)
        assert "\n" not in str(problem.value)

    front = configuration("mlp", encoder=tower).front_end
    other = dataclasses.replace(front.tower, depth=3)
    refused(dataclasses.replace(front, tower=other), r"front_end\.tower\.depth=3, and .* num_hidden_layers=2: set it to that")
    refused(dataclasses.replace(front, encoder=str(tmp_path / "none")), "config.json: not there", DataError)
    refused(dataclasses.replace(front, encoder=str(GOLDEN / "llama")), "model_type='llama'", DataError)
    refused(dataclasses.replace(front, encoder=str(GOLDEN / "clip"), names="blip2"), "model_type='clip'", DataError)


def test_a_vision_tower_alone_is_enough(tmp_path):
    """Of CLIP, without a text half; also where config.json leaves out what is usual."""
    shutil.copytree(GOLDEN / "clip", tmp_path / "alone")
    cfg = json.loads((GOLDEN / "clip" / "config.json").read_text())["vision_config"]
    del cfg["hidden_act"], cfg["layer_norm_eps"]
    (tmp_path / "alone" / "config.json").write_text(json.dumps(cfg))
    weights = load_file(GOLDEN / "clip" / "model.safetensors")
    kept = {name: array for name, array in weights.items() if name.startswith("vision_model.")}
    save_file(kept, tmp_path / "alone" / "model.safetensors")
    sizes = Tower(side=16, patch=4, width=24, hidden=40, depth=3, heads=4)
    front = configuration("mlp", encoder=tmp_path / "alone", tower=sizes).front_end
    found, whole = (
        named_leaves(front_end_parameters(dataclasses.replace(front, encoder=str(folder)), 32))
        for folder in (tmp_path / "alone", GOLDEN / "clip")
    )
    assert found.keys() == whole.keys() and all(np.array_equal(found[name], whole[name]) for name in whole)


def test_a_qformer_is_trained_by_one_command_and_started_from(tower, tmp_path, monkeypatch, capsys):
    script, folder = runpy.run_path(str(SCRIPT)), tmp_path / "qformer"
    small = {"TOKENS": 3, "WIDTH": 16, "DEPTH": 2, "HEADS": 2, "EXAMPLES": 12, "TESTED": 8, "BATCH": 4, "PIECE": 10}
    script["main"].__globals__.update(small)
    arguments = ["--encoder", tower, "--out", folder, "--steps", 2, "--side", 24]
    monkeypatch.setattr(sys, "argv", ["qformer.py", *map(str, arguments)])
    assert script["main"]() == 0
    assert "8 unseen scenes: retrieval" in capsys.readouterr().out
    front = configuration("mlp", encoder=tower).front_end
    front = dataclasses.replace(front, kind="qformer", init=str(folder), **MANY)
    given = named_leaves(front_end_parameters(front, 32)["image"])
    np.testing.assert_array_equal(given["adapter/former/queries"], Weights(folder)["former/queries"])
    shapes = named_leaves(jax.eval_shape(network_of(front).init, jax.random.key(0))["image"])
    assert {name for name in shapes if "/former/" in name} == set(given)
    assert all(shapes[name].shape == leaf.shape for name, leaf in given.items())
    with pytest.raises(ConfigError, match=r"front_end\.tokens=4, and the Q-Former in .* was trained with 3: set it to that"):
        front_end_parameters(dataclasses.replace(front, tokens=4), 32)


def network_of(front: FrontEnd):
    from mmdiff.models.network import Network

    return Network.of(dataclasses.replace(configuration("mlp"), front_end=front), 300)


def test_a_frozen_tower_counts_once():
    """One more layer of the tower, in operations: forwards alone where it is frozen, three times where it is trained."""

    def flops(depth: int, frozen: bool) -> float:
        cfg = configuration("mlp", frozen=frozen)
        tower = dataclasses.replace(cfg.front_end.tower, depth=depth)
        return training_flops(dataclasses.replace(cfg, front_end=dataclasses.replace(cfg.front_end, tower=tower)), 300)

    images = (64 + 3) // 8 * configuration("mlp").training.batch_size
    layer = 2 * images * 5 * (4 * 16 * 16 + 2 * 16 * 16 + 2 * 5 * 16)
    assert flops(3, True) - flops(2, True) == layer
    assert flops(3, False) - flops(2, False) == 3 * layer


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"front_end": {"kind": "none"}}, r"front_end\.encoder='somewhere' has no meaning with front_end\.kind='none'"),
        ({"front_end": {"encoder": ""}}, r"front_end\.kind='mlp' needs front_end\.encoder"),
        ({"front_end": {"tokens": 3}}, r"front_end\.tokens=3 has no meaning with front_end\.kind='mlp'"),
        ({"front_end": {"kind": "resampler"}}, r"front_end\.tokens=0 must be at least 1"),
        ({"front_end": {"kind": "qformer", **MANY, "gated": 1}}, r"front_end\.gated=1 has no meaning"),
        ({"front_end": {"kind": "resampler", **MANY, "heads": 3}}, r"front_end\.heads=3 does not divide"),
        ({"front_end": {"skipped": 2}}, r"front_end\.skipped=2 must be from 0 to 1"),
        ({"layout": {"images": "denoised"}}, r"needs layout\.images='read' or 'next_embedding'"),
        ({"layout": {"images": "next_embedding"}}, r"predicts the vectors of front_end\.kind='causal_former'"),
        ({"data": {"image_size": None}}, r"needs images of one size"),
        ({"model": {"lossless": True}}, r"set model\.lossless=False"),
        ({"model": {"places": "sincos"}}, r"model\.places='sincos' has no meaning with front_end\.kind='mlp'"),
        ({"front_end": {"kind": "causal_former", **MANY, "regression": "cosine"}}, r"regression='cosine' has no meaning"),
    ],
)
def test_what_cannot_work_is_refused(changes, told):
    cfg = configuration("mlp")
    with pytest.raises(ConfigError, match=told):
        groups = {name: dataclasses.replace(getattr(cfg, name), **values) for name, values in changes.items()}
        dataclasses.replace(cfg, **groups)


def test_old_configurations_are_what_they_were():
    """A run from before there were front ends goes on, and is known by the same fingerprint."""
    values = json.loads(Config(model=Model(width=128)).to_json())
    del values["front_end"]
    old = Config.from_json(json.dumps(values))
    assert old == Config(model=Model(width=128)) and "front_end" not in values
    assert old.fingerprint() != configuration("mlp").fingerprint() != configuration("linear").fingerprint()
