"""What a step of a configuration costs here: a process of its own, `python -m mmdiff.sweeps.measure CONFIG.json METRICS`.

It refuses metrics that cannot be measured on the configuration's data, before any time is spent. Then it trains a few steps
and prints one JSON object on its last line: step_seconds (the median of `times`), times, flops_per_step, parameters, and
`environment`. The steps are those of a run, batches included; compilation is not. A process of its own, because whoever
starts the runs must not hold the device that they need.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import jax

from mmdiff import config_files
from mmdiff.config import Config, ConfigError
from mmdiff.document import DataError
from mmdiff.evaluation.evaluate import chosen
from mmdiff.evaluation.task import Task
from mmdiff.parallel import distributed
from mmdiff.parallel.mesh import local_rows, make_mesh, place_rows
from mmdiff.training import flops
from mmdiff.training.run import build
from mmdiff.training.step import compile_train_step

WARM, TIMED, SECONDS = 2, 5, 2.0  # first steps not timed; then at least so many, and for at least so long
MOST = 50


def measure(cfg: Config) -> dict[str, Any]:
    """Train a few steps and forget them."""
    mesh = make_mesh(cfg.mesh, cfg.training)
    with tempfile.TemporaryDirectory() as nowhere:
        run = build(cfg, Path(nowhere), mesh)
    like = run.abstract_state()
    state = jax.jit(run.new_state, out_shardings=jax.tree.map(lambda a: a.sharding, like))()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    size, compiled, times = cfg.training.batch_size, None, []
    batches = run.train.iterate(0, WARM + MOST, local_rows(mesh, size))
    since = time.perf_counter()
    for number, batch in enumerate(batches):
        rows = place_rows(batch, mesh, size)
        if compiled is None:
            compiled = compile_train_step(run.network, cfg, run.tx, state, rows)
        state, values = compiled(state, rows)
        jax.block_until_ready(values)
        now = time.perf_counter()
        if number >= WARM:
            times.append(round(now - since, 6))
        since = now
        if len(times) >= TIMED and sum(times) >= SECONDS:
            break
    return {
        "step_seconds": statistics.median(times),
        "times": times,
        "flops_per_step": flops.training_flops(cfg, run.vocabulary.size),
        "parameters": parameters,
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """The hardware, and the software with its versions."""
    devices = jax.devices()
    kinds = ", ".join(sorted({d.device_kind for d in devices}))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"processor": f"{_processor()}, {cores} core{'s' * (cores != 1)}"}
    if devices[0].platform != "cpu":
        facts["devices"] = f"{len(devices)} x {kinds}"
    elif len(devices) > 1:
        facts["devices"] = f"{len(devices)} simulated on the processor"
    versions = distributed.environment()
    return facts | {"system": f"{platform.system()} {platform.machine()}"} | {k: v for k, v in versions.items() if k != "code"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def main(path: str, *metrics: str) -> int:
    try:
        cfg = config_files.load_experiment(path)
        chosen(Task(types.SimpleNamespace(cfg=cfg)), metrics)  # all that this looks at of a model is its configuration
        print(json.dumps(measure(cfg)))
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 65
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
