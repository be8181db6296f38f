"""Run by test_quantizers.py in a process with eight simulated devices: a codebook learnt on one of them and on all.

Prints one JSON object: {"one", "eight", "eighth": {"codes", "counts", "sums", "restarts", "spread"}}.
"""

import functools
import json

import jax
import numpy as np

from mmdiff import config
from mmdiff.parallel.mesh import make_mesh, place_rows, replicated
from mmdiff.tokenizers.quantizers.base import Learning
from mmdiff.tokenizers.quantizers.vq import VQ

jax.config.update("jax_default_matmul_precision", "highest")
STEPS, BATCH, LENGTH = 12, 16, 4
QUANTIZER = VQ(24, 4, decay=0.8, restart=0.2)


def vectors(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(0.5, 1, (BATCH, LENGTH, QUANTIZER.width)).astype(np.float32)


def learn(devices, rows: int = BATCH) -> dict:
    mesh = make_mesh(config.Mesh(data=len(devices), fsdp=1, tensor=1), None, devices)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def update(state, z, weight, key):
        new = QUANTIZER({}, state, z, Learning(key, weight)).state
        return new, ((new["counts"] > 0) & (new["sums"] == new["counts"][:, None] * new["codes"]).all(-1)).sum()

    state = jax.device_put(QUANTIZER.init(jax.random.key(0))[1], replicated(mesh))
    restarts = 0
    for step in range(STEPS):
        weight = np.ones((BATCH, LENGTH), np.float32)
        weight[::3, 2:] = 0
        z, weight = place_rows((vectors(step)[:rows], weight[:rows]), mesh)
        assert len(z.sharding.device_set) == len(devices)
        state, restarted = update(state, z, weight, jax.random.key(step))
        restarts += int(restarted)
    copies = [np.stack([shard.data for shard in leaf.addressable_shards]) for leaf in jax.tree.leaves(state)]
    return {name: np.asarray(leaf).tolist() for name, leaf in state.items()} | {
        "restarts": restarts,
        "copies": [len(c) for c in copies],
        "spread": max(float(np.ptp(c, axis=0).max()) for c in copies),
    }


if __name__ == "__main__":
    devices = jax.devices()
    assert len(devices) == 8
    results = {"one": learn(devices[:1]), "eight": learn(devices), "eighth": learn(devices[:1], BATCH // 8)}
    print(json.dumps(results))
