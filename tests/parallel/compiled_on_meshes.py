"""Run by tests/parallel/test_meshes.py in a process with eight simulated devices: training steps, compiled only.

Prints one JSON object: {block: {mesh: what the program holds and sends}}.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import make_tiny  # first: it sets up JAX

# isort: split
import jax
import numpy as np

from mmdiff import config
from mmdiff.models import transfusion
from mmdiff.models.network import Network
from mmdiff.parallel import hlo
from mmdiff.parallel.mesh import make_mesh
from mmdiff.parallel.plan import abstract_rows, abstract_state
from mmdiff.parallel.sharding import Placement
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.step import compile_train_step

MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8))
transfusion.UNROLL_LIMIT = 0  # scan over the layers, as on accelerators
VOCABULARY, ROWS, LENGTH = 760, 16, 128  # no other axis is 760 long


def compiled(cfg: config.Config, sizes) -> dict:
    mesh = make_mesh(config.Mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), None, jax.devices()[: int(np.prod(sizes))])
    network = Network(cfg.model, VOCABULARY, mesh)
    tx, _ = make_optimizer(cfg.optimizer, 10)
    state = abstract_state(cfg, network, mesh)
    program = compile_train_step(network, cfg, tx, state, abstract_rows(cfg, mesh))
    text, memory = program.as_text(), program.memory_analysis()
    size = lambda tree: 4 * sum(leaf.size for leaf in jax.tree.leaves(tree))
    arrays = [[int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    whole = [a for a in arrays if VOCABULARY in a and np.prod(a) >= ROWS * LENGTH * VOCABULARY / np.prod(sizes[:2])]
    return {
        "sent": hlo.traffic(text).payload,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "layer_bytes": size(state.params["blocks"]),
        "outside_bytes": size(state.params) - size(state.params["blocks"]),
        "arrays_of_all_logits": len(whole),
    }


def main() -> dict:
    out: dict = {}
    for block in ("gau", "attention"):
        tiny = make_tiny(block=block, width=256, depth=3, key_width=32, head_width=32)
        cfg = dataclasses.replace(
            tiny.cfg,
            layout=dataclasses.replace(tiny.cfg.layout, row_length=LENGTH),
            training=config.Training(batch_size=ROWS),
        )
        out[block] = {"x".join(map(str, sizes)): compiled(cfg, sizes) for sizes in MESHES}
        keep = Placement.__call__
        Placement.__call__ = lambda self, x, *axes: x  # what a lost sharding constraint would do
        try:
            out[block]["1x8x1 unconstrained"] = compiled(cfg, (1, 8, 1))
        finally:
            Placement.__call__ = keep
    try:
        make_mesh(config.Mesh(), config.Training(batch_size=12, accumulate=3))
    except config.ConfigError as error:
        out["refused"] = str(error)
    place = Placement(make_mesh(config.Mesh(data=2, fsdp=2, tensor=2)))
    shown = lambda spec: str(spec).replace("PartitionSpec", "P")
    out["specs"] = {f"{n} rows": shown(place.spec((n,), ("rows",))) for n in (16, 6, 3)}
    names = tuple(None if name == "width" else name for name in ("width", "heads"))
    out["specs"]["64 wide, gathered"] = shown(place.spec((64, 64), names))
    return out


if __name__ == "__main__":
    print(json.dumps(main()))
