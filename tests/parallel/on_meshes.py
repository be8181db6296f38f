"""Run by tests/parallel/test_meshes.py in a process with eight simulated devices: the same work on every mesh.

Prints one JSON object: {block: {mesh: {"losses", "params", "tokens", "pixels", "memory"}}}.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import make_tiny  # first: it sets up JAX

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmdiff import config
from mmdiff.document import IMG, Document
from mmdiff.models.network import Network
from mmdiff.parallel.mesh import make_mesh, place_rows
from mmdiff.sampling.generate import Model
from mmdiff.training import state as train_state
from mmdiff.training.step import compile_train_step

MESHES = {
    "gau": ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)),
    "attention": ((1, 1, 1), (2, 2, 2)),  # whose layers share all but themselves with the others
}
STEPS, ROWS = 3, 16


def work(tiny, sizes) -> dict:
    mesh = make_mesh(config.Mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), None, jax.devices()[: int(np.prod(sizes))])
    network = Network(tiny.cfg.model, tiny.vocabulary.size, mesh)
    cfg = dataclasses.replace(tiny.cfg, training=config.Training(batch_size=ROWS, accumulate=2))
    documents = [tiny.lay(tiny.pieces("12", (2, 2), "3" * (1 + s % 3), seed=s)) for s in range(ROWS)]
    rows = place_rows(tiny.batch(*[[d] for d in documents], length=32), mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    fresh = jax.tree.map(lambda p: jnp.array(p, copy=True), tiny.params)  # the step donates its state
    state = train_state.create(fresh, tx, 0)
    where = train_state.shardings(state, network.axes(), mesh)
    state = jax.device_put(state, where)
    step = compile_train_step(network, cfg, tx, state, rows)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, rows)
        losses.append([float(metrics[name]) for name in ("loss", "text_loss", "image_loss", "grad_norm")])
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    params = [np.asarray(p).astype(float) for p in jax.tree.leaves(state.params)]
    model = Model(cfg, jax.device_put(tiny.params, where.params), tiny.vocabulary, mesh)
    prompts = [Document("12", IMG), Document("45", IMG)]
    out = model.generate(prompts, steps=3, guidance=2.0, max_tokens=6, max_images=0, image_size=(4, 4), seed=0)
    held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)]
    return {
        "losses": losses,
        "params": [[p.sum(), np.abs(p).sum()] for p in params],
        "texts": [d.texts for d in out],
        "pixels": [i.pixels.tolist() for d in out for i in d.images],
        "bytes_of_parameters": sum(held),
    }


if __name__ == "__main__":
    results = {}
    for block in ("gau", "attention"):
        # the tiled form runs inside shard_map; the dense one is left to XLA
        form = {"attention": "blockwise", "depth": 2} if block == "gau" else {"attention": "dense", "depth": 1}
        tiny = make_tiny(block=block, head_width=8, width=64, **form)
        results[block] = {"x".join(map(str, sizes)): work(tiny, sizes) for sizes in MESHES[block]}
    print(json.dumps(results))
