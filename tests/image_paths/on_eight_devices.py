"""Run by test_devices.py in a process with eight simulated devices: training on codes and drawing them, on two meshes.

Prints one JSON object: {images: {mesh: {"losses", "params", "pixels"}}}.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tests.conftest  # noqa: F401  first: it sets up JAX

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
from tests.image_paths.tiny import model, picture, rows_of

MESHES = ((1, 1, 1), (2, 2, 2))
ROWS = 8


def work(images: str, sizes) -> dict:
    made = model(images)
    mesh = make_mesh(config.Mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), None, jax.devices()[: int(np.prod(sizes))])
    cfg = dataclasses.replace(made.cfg, training=config.Training(batch_size=ROWS, accumulate=2))
    network = Network.of(cfg, made.vocabulary.size, mesh)
    rows = place_rows(rows_of(made, *[Document("ab", picture(s), "c" * (1 + s % 3)) for s in range(ROWS)]), mesh)
    params = made.network.restack(made.params)
    tx = optax.sgd(0.02, momentum=0.9)
    state = train_state.create(jax.tree.map(lambda p: jnp.array(p, copy=True), params), tx, 0)
    where = train_state.shardings(state, network.axes(), mesh)
    state = jax.device_put(state, where)
    step = compile_train_step(network, cfg, tx, state, rows)
    losses = []
    for _ in range(3):
        state, metrics = step(state, rows)
        losses.append([float(metrics[name]) for name in ("loss", "text_loss", "image_loss", "grad_norm")])
    placed = Model(cfg, jax.device_put(params, where.params), made.vocabulary, mesh, tokenizer=made.tokenizer)
    steps = {"steps": 3} if images == "masked_code" else {}
    out = placed.generate([Document("12", IMG), Document("45", IMG)], guidance=2.0, max_tokens=0, temperature=0.0, **steps)
    return {
        "losses": losses,
        "params": [float(jnp.abs(p).sum()) for p in jax.tree.leaves(state.params)],
        "pixels": [d.images[0].pixels.tolist() for d in out],
    }


if __name__ == "__main__":
    paths = ("masked_code",)  # which has all that next_code has, and noise besides
    print(json.dumps({images: {"x".join(map(str, sizes)): work(images, sizes) for sizes in MESHES} for images in paths}))
