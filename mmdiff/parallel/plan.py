"""What a configuration needs on a set of devices, found by compiling its real programs for them ahead of time.

No device has to be there: libtpu's compiler knows the TPU topologies by name (`v5p:4x4x8`), and the CPU backend simulates
any number of devices. Roofline, a lower bound on the time of a step with everything perfectly overlapped:

    compute   operations executed / (chips * peak)            counted from the traced program, recomputation included
    memory    bytes that must move at least / bandwidth       the state read and written once
    network   bytes sent by one chip / its links              collectives of the compiled program on rings, all links busy
    step      the largest of the three
    MFU bound operations of the model / (step * chips * peak)           recomputation not included
"""

import dataclasses
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmdiff import config
from mmdiff.config_files import run_config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.diffusion import grids, solvers
from mmdiff.layout import Rows, empty_row
from mmdiff.models.network import Network
from mmdiff.nn.attention import KeyValue
from mmdiff.parallel.chips import chip_of, chips
from mmdiff.parallel.hlo import traffic
from mmdiff.parallel.mesh import make_mesh
from mmdiff.parallel.sharding import Placement
from mmdiff.sampling.cache import Cache
from mmdiff.sampling.image import Canvas, Drawing, Guidance, draw
from mmdiff.tokenizers.quantizers.base import make_quantizer
from mmdiff.training import flops
from mmdiff.training import state as train_state
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.step import compile_train_step, make_train_step


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology as libtpu names it, for example v5e:16x16.

    Raises:
      ConfigError: libtpu is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU whose metadata could be asked for
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise config.ConfigError(
            f"--topology {name}: {reason}; names are like v4:2x2x1, v5e:16x16, v5p:4x4x8, v6e:8x8, tpu7x:2x2x1, and libtpu "
            'must be installed: pip install -e ".[plan]".'
        ) from error


def present_devices(count: int) -> list[jax.Device]:
    """`count` devices of this machine's accelerator, or simulated ones (jax_num_cpu_devices must be set before)."""
    devices = jax.devices()
    devices = devices if len(devices) >= count else jax.devices("cpu")
    if len(devices) < count:
        raise config.ConfigError(f"--devices {count}: only {len(devices)} there; JAX was started with fewer.")
    return devices[:count]


def vocabulary_size(cfg: config.Config, pieces: int | None) -> int:
    """Ids of a vocabulary of `pieces` text pieces, by default as many as the configuration asks for, and of the codes of its
    tokenizer.

    Raises:
      DataError: data.tokenizer cannot be read.
    """
    count = Vocabulary.bytes(cfg.layout.max_grid)
    if cfg.layout.codes:
        count = count.with_codes(make_quantizer(run_config(Path(cfg.data.tokenizer)).tokenizer).size)
    wanted = 256 if cfg.data.vocabulary == "bytes" else cfg.data.vocabulary_size
    return count.size - 256 + (wanted if pieces is None else pieces)


def plan(cfg: config.Config, devices: list[jax.Device], vocabulary_size: int, sampling: bool = True) -> dict[str, Any]:
    """Compile the training step and (unless `sampling` is False) the program that denoises images, of `cfg` for `devices`;
    what they cost.

    Returns:
      the members of `mmdiff plan --json`. Sizes are bytes of one device, operations those of all devices together.
    Raises:
      ConfigError: the mesh does not fit the devices or the batch.
    """
    mesh = make_mesh(cfg.mesh, cfg.training, devices)
    chip, count = chip_of(devices[0]), chips(devices)
    report: dict[str, Any] = {
        "devices": len(devices),
        "chips": count,
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "rows_per_device": cfg.training.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]),
        "hbm_capacity_bytes": chip.memory * count / len(devices) if chip else None,
    }
    params = jax.eval_shape(Network.of(cfg, vocabulary_size).init, jax.random.key(0))
    report["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    report |= _training(cfg, mesh, vocabulary_size)
    report["fits"] = _fits(report)
    report |= _operations(cfg, vocabulary_size)
    report |= _roofline(report, chip, count)
    if sampling and cfg.layout.images == "denoised":
        drawing = _sampling(cfg, mesh, vocabulary_size)
        fits = _fits(drawing | {"hbm_capacity_bytes": report["hbm_capacity_bytes"]})
        report["sampling"] = drawing | {"fits": fits}
    return report


def remedy(cfg: config.Config, devices: list[jax.Device], vocabulary_size: int) -> tuple[list[str], dict[str, Any]] | None:
    """Changes that make a configuration fit, tried one on top of the other: (options, what it then needs) or None."""
    changed: list[str] = []
    for option, other in _changes(cfg, len(devices)):
        changed = [kept for kept in changed if kept.split()[0] != option.split()[0]] + [option]
        try:
            report = _training(other, make_mesh(other.mesh, other.training, devices), vocabulary_size)
        except config.ConfigError:
            continue
        chip = chip_of(devices[0])
        if chip and _fits(report | {"hbm_capacity_bytes": chip.memory * chips(devices) / len(devices)}):
            return changed, report
    return None


def _changes(cfg: config.Config, devices: int):
    """(option, configuration with it and all before it), the cheap ones first."""
    if cfg.mesh.fsdp != devices:
        cfg = dataclasses.replace(cfg, mesh=config.Mesh(data=1, fsdp=-1))
        yield "--mesh.data 1 --mesh.fsdp -1 --mesh.tensor 1", cfg
    if cfg.model.remat != "full":
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="full"))
        yield "--model.remat full", cfg
    while cfg.training.batch_size % (2 * cfg.training.accumulate) == 0:
        cfg = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, accumulate=2 * cfg.training.accumulate))
        yield f"--training.accumulate {cfg.training.accumulate}", cfg


def _tx(cfg: config.Config):
    return make_optimizer(cfg.optimizer, cfg.training.steps)[0]


def abstract_state(cfg: config.Config, network: Network, mesh: Mesh):
    """Shapes, types and shardings of the training state."""
    tx = _tx(cfg)
    state = jax.eval_shape(lambda: train_state.create(network.init(jax.random.key(0)), tx, 0, network.frozen))
    where = train_state.shardings(state, network.axes(), mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)


def abstract_rows(cfg: config.Config, mesh: Mesh) -> Rows:
    """Shapes, types and shardings of a batch."""
    row, size = empty_row(cfg.layout.row_length, cfg.patch_values), cfg.training.batch_size

    def abstract(a):
        shape = (size, *a.shape)
        where = Placement(mesh).sharding(shape, ("rows", *[None] * a.ndim))
        return jax.ShapeDtypeStruct(shape, a.dtype, sharding=where)

    return jax.tree.map(abstract, row)


def _training(cfg: config.Config, mesh: Mesh, vocabulary_size: int) -> dict[str, Any]:
    network = Network.of(cfg, vocabulary_size, mesh)
    state, rows = abstract_state(cfg, network, mesh), abstract_rows(cfg, mesh)
    return _compiled(lambda: compile_train_step(network, cfg, _tx(cfg), state, rows))


def _compiled(compile_) -> dict[str, Any]:
    """Memory and traffic of a program, or what the compiler says it would need if that is too much."""
    begin = time.monotonic()
    try:
        program = compile_()
    except jax.errors.JaxRuntimeError as error:
        # two wordings, of different versions
        used = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        size, letter = (part for part in used.groups() if part)
        unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[letter]
        return {
            "compile_seconds": time.monotonic() - begin,
            "peak_hbm_bytes": float(size) * unit,
            "compiler_refused": True,
        }
    memory, sent = program.memory_analysis(), traffic(program.as_text())
    return {
        "compile_seconds": time.monotonic() - begin,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_hbm_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "collective_bytes": sent.payload,
        "collective_bytes_sent": sent.sent,
        "loops_of_unknown_length": sent.loops_of_unknown_length,
    }


def _fits(report: dict[str, Any]) -> bool | None:
    """None where the capacity is not known."""
    if report["hbm_capacity_bytes"] is None:
        return None
    return not report.get("compiler_refused") and report["peak_hbm_bytes"] <= report["hbm_capacity_bytes"]


def _operations(cfg: config.Config, vocabulary_size: int) -> dict[str, float | None]:
    """Counted on whole arrays, with attention in its dense form: kernels hide what they compute.

    The model's own operations are three times those of its forward pass; executed are those of the whole step, with what
    it computes again.
    """
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention="dense"))
    network = Network.of(cfg, vocabulary_size)
    state = jax.eval_shape(lambda: train_state.create(network.init(jax.random.key(0)), _tx(cfg), 0, network.frozen))
    row = empty_row(cfg.layout.row_length, cfg.patch_values)
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((cfg.training.batch_size, *a.shape), a.dtype), row)
    return {
        "flops_per_step": flops.training_flops(cfg, vocabulary_size),
        "flops_per_step_by_hand": flops.flops_by_hand(cfg, vocabulary_size)
        if network.grid is None and network.size is None
        else None,
        "executed_flops_per_step": flops.counted_flops(make_train_step(network, cfg, _tx(cfg)), state, rows),
        "tokens_per_step": cfg.training.batch_size * cfg.layout.row_length,
    }


def _roofline(report: dict[str, Any], chip, count: float) -> dict[str, Any]:
    if chip is None or report.get("compiler_refused"):
        return {"roofline_step_seconds": None, "mfu_bound": None}
    per_chip = report["devices"] / count
    seconds = {
        "compute_seconds": report["executed_flops_per_step"] / (count * chip.flops),
        "memory_seconds": per_chip * (report["argument_bytes"] + report["output_bytes"]) / chip.bandwidth,
        "network_seconds": per_chip * report["collective_bytes_sent"] / chip.link,
    }
    step = max(seconds.values())
    return seconds | {
        "roofline_step_seconds": step,
        "mfu_bound": report["flops_per_step"] / (step * count * chip.flops),
    }


def _sampling(cfg: config.Config, mesh: Mesh, vocabulary_size: int) -> dict[str, Any]:
    """The program that draws one guided image for each of as many documents as the mesh splits rows into."""
    network = Network.of(cfg, vocabulary_size, mesh)
    place, sampling = network.place, cfg.sampling
    documents = mesh.shape["data"] * mesh.shape["fsdp"]
    patches = math.prod(side // cfg.model.patch for side in cfg.fixed_size or (256, 256))
    heads, *widths = network.head

    def abstract(shape, dtype, *axes):
        where = place.sharding(shape, (*axes, *[None] * (len(shape) - len(axes))))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    layer = KeyValue(
        *(
            abstract((documents, heads, cfg.layout.row_length, width), network.compute_type, *axes)
            for width, axes in zip(widths, network.cache_axes, strict=True)
        )
    )
    cache = Cache((layer,) * network.cached_layers, abstract((documents,), jnp.int32, "rows"))
    canvas = Canvas(
        abstract((2, documents, patches, 2), jnp.float32, None, "rows"),
        abstract((documents, patches, 4), jnp.int32, "rows"),
        abstract((documents,), jnp.int32, "rows"),
        None,
        abstract((2, documents), jnp.float32, None, "rows"),
    )
    levels = grids.make_grid(
        grids.usual(sampling.solver) if sampling.grid in ("auto", "tuned") else sampling.grid,
        grids.intervals(sampling.solver, sampling.steps),
        sampling.sigma_max,
        sampling.sigma_min,
        cfg.diffusion.shift,
    )
    table = jax.tree.map(lambda a: abstract(np.shape(a), np.asarray(a).dtype), solvers.make_table(sampling.solver, levels))
    keys = abstract((documents,), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    guide = Guidance(*[abstract((), jnp.float32)] * 4)
    params = jax.tree.map(
        lambda names, leaf: abstract(leaf.shape, leaf.dtype, *names),
        network.axes(),
        jax.eval_shape(network.init, jax.random.key(0)),
        is_leaf=lambda leaf: type(leaf) is tuple,
    )
    one_layer = lambda leaf, names: (abstract(leaf.shape[1:], leaf.dtype, *names[1:]),) * cfg.model.depth
    if "blocks" in params:
        params |= {"blocks": jax.tree.map(one_layer, params["blocks"], network.axes()["blocks"])}
    drawing = Drawing(params, (cache, cache), canvas, keys, guide)
    compile_ = lambda: draw.lower(network, cfg.diffusion, drawing, table).compile()
    return {
        "documents": documents,
        "patches": patches,
        "network_evaluations": sampling.steps,
        **_compiled(compile_),
    }
