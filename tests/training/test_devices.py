"""One device or eight: the same step. The eight are simulated, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

TOLERANCE = 1e-5
STEPS = 3

SCRIPT = """
import dataclasses, json, sys
import jax, numpy as np, optax
sys.path.insert(0, {tests!r})
from conftest import make_tiny
from mmdiff import config
from mmdiff.parallel.mesh import make_mesh, place_rows, replicated
from mmdiff.training import state as train_state
from mmdiff.training.step import make_train_step

def run(accumulate):
    tiny = make_tiny(block="gau")
    documents = [tiny.lay(tiny.pieces("12", (2, 2), "3" * (1 + s % 3), seed=s)) for s in range(16)]
    batch = tiny.batch(*[[d] for d in documents], length=32)
    cfg = dataclasses.replace(tiny.cfg, training=config.Training(batch_size=16, accumulate=accumulate))
    tx, mesh = optax.sgd(0.1), make_mesh(16)
    state = jax.device_put(train_state.create(tiny.params, tx, 0), replicated(mesh))
    step, rows = jax.jit(make_train_step(tiny.network, cfg, tx)), place_rows(batch, mesh)
    losses = []
    for _ in range({steps}):
        state, metrics = step(state, rows)
        losses.append([float(metrics[name]) for name in ("loss", "text_loss", "image_loss", "grad_norm")])
    spread = len(rows.tokens.sharding.device_set)
    return dict(devices=spread, losses=losses, params=[np.asarray(p).sum(dtype=float) for p in jax.tree.leaves(state.params)])

print(json.dumps([run(1), run(2)]))
"""


def run(devices: int):
    code = SCRIPT.format(tests=str(Path(__file__).parents[1]), steps=STEPS)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one_and_eight():
    return run(1), run(8)


def test_the_rows_really_are_spread(one_and_eight):
    (one, _), (eight, _) = one_and_eight
    assert one["devices"] == 1 and eight["devices"] == 8


@pytest.mark.parametrize("kind", ["whole", "accumulated"])
def test_losses_and_parameters_do_not_depend_on_the_number_of_devices(one_and_eight, kind):
    one, eight = (result[kind == "accumulated"] for result in one_and_eight)
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=TOLERANCE)
    np.testing.assert_allclose(eight["params"], one["params"], rtol=TOLERANCE, atol=1e-4)
    assert one["losses"][0] != one["losses"][-1]


def test_a_batch_that_does_not_divide_is_refused():
    from mmdiff.config import ConfigError
    from mmdiff.parallel.mesh import make_mesh

    assert make_mesh(len(jax.devices())).axis_names == ("data",)
    if len(jax.devices()) > 1:
        with pytest.raises(ConfigError, match=r"training\.batch_size=1 is not divisible"):
            make_mesh(1)
