"""Whatever the mesh, the same numbers; and every device holds and sends what it should. Eight simulated devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mmdiff.config import ConfigError, Mesh, Training
from mmdiff.parallel.mesh import local_rows, make_mesh, place_rows
from mmdiff.parallel.sharding import Placement

HERE = Path(__file__).parent
TOLERANCE = 1e-5
BLOCKS = ("gau", "attention")
MESHES = [*(("gau", mesh) for mesh in ("8x1x1", "2x2x2", "1x8x1", "1x1x8")), ("attention", "2x2x2")]


def on_eight_devices(script: str):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, HERE / script], env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results():
    return on_eight_devices("on_meshes.py")


@pytest.mark.parametrize(("block", "mesh"), MESHES)
def test_training_gives_the_same_losses_and_parameters(results, block, mesh):
    one, many = results[block]["1x1x1"], results[block][mesh]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=TOLERANCE)
    np.testing.assert_allclose(many["params"], one["params"], rtol=TOLERANCE, atol=1e-4)
    assert one["losses"][0] != one["losses"][-1]


@pytest.mark.parametrize(("block", "mesh"), MESHES)
def test_sampling_writes_the_same_texts_and_draws_the_same_images(results, block, mesh):
    one, many = results[block]["1x1x1"], results[block][mesh]
    assert many["texts"] == one["texts"] and any(one["texts"])
    assert len(many["pixels"]) == len(one["pixels"]) == 2
    for ours, theirs in zip(many["pixels"], one["pixels"], strict=True):
        assert np.abs(np.subtract(ours, theirs)).max() <= 1  # a value may round the other way


@pytest.mark.parametrize(("block", "mesh"), MESHES)
def test_parameters_are_split_where_the_mesh_splits_them(results, block, mesh):
    whole, held = (results[block][name]["bytes_of_parameters"] for name in ("1x1x1", mesh))
    parts = {"8x1x1": 1, "2x2x2": 4, "1x8x1": 8, "1x1x8": 8}[mesh]
    assert whole / parts <= held < 1.6 * whole / parts + 20_000  # small ones stay whole
    assert parts > 1 or held == whole


@pytest.fixture(scope="module")
def programs():
    return on_eight_devices("compiled_on_meshes.py")


def sends_what_it_must(program, mesh) -> bool:
    """Bytes of the collectives of one step, from the compiled program, against a count by hand."""
    sent, layers = dict(program["sent"]), program["layer_bytes"]
    gathered, reduced = sent.pop("all-gather", 0), sent.pop("all-reduce", 0) + sent.pop("reduce-scatter", 0)
    gradients = layers + program["outside_bytes"]
    if mesh == "8x1x1":  # copies of the model: gradients are added up once, nothing else of any size
        right = gathered < 0.01 * gradients
    else:  # stored in parts: a layer is gathered going forward and again going back, the rest at least once
        right = 0.99 * (2 * layers + program["outside_bytes"]) <= gathered < 1.05 * 2 * gradients
    return right and gradients <= reduced < 1.05 * gradients and not sent


@pytest.mark.parametrize("mesh", ["8x1x1", "1x8x1"])
@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_sent_is_what_the_layout_needs(programs, block, mesh):
    assert sends_what_it_must(programs[block][mesh], mesh), programs[block][mesh]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_lost_constraint_shows(programs, block):
    """The control of the test above."""
    assert not sends_what_it_must(programs[block]["1x8x1 unconstrained"], "1x8x1")


@pytest.mark.parametrize("block", BLOCKS)
def test_split_devices_need_a_fraction_of_the_memory(programs, block):
    whole, split = programs[block]["1x1x1"], programs[block]["1x8x1"]
    assert split["arguments"] < whole["arguments"] / 6
    assert split["temporaries"] < whole["temporaries"] / 4


@pytest.mark.parametrize("block", BLOCKS)
def test_no_device_holds_all_logits_when_the_vocabulary_is_split(programs, block):
    assert programs[block]["1x1x8"]["arrays_of_all_logits"] == 0
    assert programs[block]["1x8x1"]["arrays_of_all_logits"] > 0  # the check can fail


def mesh_of(**sizes):
    return make_mesh(Mesh(**sizes), None, jax.devices()[:1])


def test_sizes_that_do_not_fit_the_devices_are_refused():
    with pytest.raises(ConfigError, match=r"mesh\.data=-1 x mesh\.fsdp=3 x mesh\.tensor=1 does not fit 1 devices"):
        mesh_of(fsdp=3)
    with pytest.raises(ConfigError, match="only one can take the devices that remain"):
        Mesh(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match=r"mesh\.tensor=0 must be at least 1"):
        Mesh(tensor=0)
    assert mesh_of(fsdp=-1, data=1).shape == {"data": 1, "fsdp": 1, "tensor": 1}


def test_rows_that_do_not_divide_are_refused(programs):
    assert make_mesh(Mesh(), Training(batch_size=3, accumulate=3), jax.devices()[:1]).size == 1
    assert programs["refused"].startswith("training.batch_size=12 in training.accumulate=3 pieces is 4 rows at a time")


def test_an_axis_that_does_not_divide_stays_whole(programs):
    assert programs["specs"] == {
        "16 rows": "P(('data', 'fsdp'),)",
        "6 rows": "P('data',)",
        "3 rows": "P(None,)",
        "64 wide, gathered": "P(None, 'tensor')",
    }


def test_placing_only_the_local_rows_equals_placing_the_batch():
    mesh = mesh_of()
    batch = {"a": np.arange(12).reshape(6, 2)}
    assert local_rows(mesh, 6) == list(range(6))
    np.testing.assert_array_equal(place_rows(batch, mesh, 6)["a"], place_rows(batch, mesh)["a"])
    assert not Placement(mesh).split
