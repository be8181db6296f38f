"""Tokenizers and systems of the experiments can be made, and differ in what they are meant to."""

import runpy

import jax
import pytest

from mmdiff.config_files import load_experiment, replaced
from mmdiff.data.batches import Batches
from mmdiff.data.sources import open_source, open_vocabulary
from mmdiff.tokenizers.network import TokenizerNetwork
from mmdiff.training.flops import training_flops

from . import FOLDER

TOKENIZERS = ["config", "vq", "simvq", "fsq", "lfq", "bsq", "rotation", "continuous", "convolutional", "gan", "latents"]
LARGER = ["vq_64", "fsq_64", "continuous_64"]


STAND_IN = {"side": 32, "patch": 4, "width": 192, "hidden": 384, "depth": 4, "heads": 6, "embedding": 64}


@pytest.mark.parametrize("name", TOKENIZERS + LARGER)
def test_every_tokenizer_of_the_experiments_can_be_made(name):
    cfg = load_experiment(f"{FOLDER / 'tokenizers.py'}:{name}")
    params = jax.eval_shape(TokenizerNetwork.of(cfg).init, jax.random.key(0))
    assert ("discriminator" in params) == (name == "gan")


@pytest.mark.parametrize("name", ["lavit_64", "seed_64", "seed_pairs_64"])
def test_larger_tokenizers_on_a_frozen_encoder_can_be_made(name):
    cfg = load_experiment(f"{FOLDER / 'semantic.py'}:{name}")
    tower = STAND_IN | {"side": 64, "patch": 8}
    cfg = replaced(cfg, {f"tokenizer.tower.{key}": value for key, value in tower.items()})
    network = TokenizerNetwork.of(cfg, None, 300)
    jax.eval_shape(network.init, jax.random.key(0))
    assert network.grid == (8, 8) and cfg.tokenizer.encoder == "runs/stand_ins/two_tower"
    source = open_source(replaced(cfg, {"data.size": 300}), "train")
    assert Batches(source, open_vocabulary(cfg, source), cfg).rows_per_epoch() > 0


@pytest.mark.parametrize("name", ["lavit", "lavit_fixed", "lavit_bidirectional", "seed", "seed_pairs"])
def test_tokenizers_on_a_frozen_encoder_can_be_made(name):
    cfg = load_experiment(f"{FOLDER / 'semantic.py'}:{name}")
    cfg = replaced(cfg, {f"tokenizer.tower.{key}": value for key, value in STAND_IN.items()})
    params = jax.eval_shape(TokenizerNetwork.of(cfg, None, 300).init, jax.random.key(0))
    assert {"seed": "between", "seed_pairs": "words"}.get(name, "selector") in params
    if name != "seed_pairs":
        file = "lavit_arms" if name.startswith("lavit_") else "systems"
        system = load_experiment(f"{FOLDER / file}.py:{name}")
        assert system.layout.images == "next_code" and system.model.patch == cfg.model.patch
        assert system.data.tokenizer.endswith(f"/{name}")


@pytest.mark.parametrize("name", ["lavit", "seed", "seed_pairs"])
def test_a_frozen_encoder_of_a_tokenizer_counts_once(name):
    """One more layer of it, in operations: forwards alone."""

    def flops(depth):
        cfg = load_experiment(f"{FOLDER / 'semantic.py'}:{name}")
        tower = {f"tokenizer.tower.{key}": value for key, value in (STAND_IN | {"depth": depth}).items()}
        return training_flops(replaced(cfg, tower), 300)

    cfg = load_experiment(f"{FOLDER / 'semantic.py'}:{name}")
    layer = 2 * 65 * (4 * 192 * 192 + 2 * 192 * 384 + 2 * 65 * 192)  # an image a row
    assert flops(5) - flops(4) == cfg.training.batch_size * layer


@pytest.mark.parametrize("file", ["systems", "orders", "lavit_arms"])
def test_every_system_of_the_experiments_can_be_made(file):
    found = runpy.run_path(str(FOLDER / f"{file}.py"))
    made = [
        load_experiment(f"{FOLDER / file}.py:{arm}") for arm in (*found["ARMS"], *(["pixels"] if file == "systems" else []))
    ]
    assert len({cfg.name for cfg in made}) == len(made)
    assert {cfg.training.steps for cfg in made} == {800}


@pytest.mark.parametrize("name", ["raw", "pixels"])
def test_rows_of_the_systems_take_their_documents(name):
    cfg = replaced(load_experiment(f"{FOLDER / 'systems.py'}:{name}"), {"data.size": 300})
    vocabulary = open_vocabulary(cfg, open_source(cfg, "train"))
    for split in ("train", "validation"):
        assert Batches(open_source(cfg, split), vocabulary, cfg, learn=split == "train").rows_per_epoch() > 0


def test_arms_of_lavit_differ_in_one_thing_each():
    lavit, regression, fixed, _, continuous = (
        load_experiment(f"{FOLDER / 'lavit_arms.py'}:{arm}") for arm in runpy.run_path(str(FOLDER / "lavit_arms.py"))["ARMS"]
    )
    assert replaced(regression, {"layout.images": "next_code", "name": "lavit"}) == lavit
    assert replaced(fixed, {"data.tokenizer": lavit.data.tokenizer, "name": "lavit"}) == lavit
    assert continuous.front_end.init == lavit.data.tokenizer and continuous.training == lavit.training
    assert (continuous.model, continuous.optimizer) == (lavit.model, lavit.optimizer)
