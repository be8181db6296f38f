"""`mmdiff plan`: what a configuration needs on devices that need not be there."""

import json
import sys
from typing import Any

from mmdiff import config_files
from mmdiff.cli.main import USAGE
from mmdiff.cli.train import override, take_option, unknown_field

HELP = """usage: mmdiff plan EXPERIMENT.py[:FUNCTION] (--topology NAME | --devices N) [--FIELD VALUE ...] [options]

Compiles the experiment's training step, and the program that draws images, for the devices named, and prints memory per
device, operations, what is sent between devices, a lower bound on the time of a step, and whether it fits. No device is
used but the CPU. Topologies are named as libtpu names them (v4, v5e, v5p, v6e, tpu7x) and need pip install -e ".[plan]".

  --topology NAME     v5e:16x16, v5p:4x4x8, v6e:8x8, ...
  --devices N         N devices of this machine, or N simulated ones
  --vocabulary N      size of the vocabulary in text pieces (default: data.vocabulary_size, or 256 bytes)
  --no-remedy         if it does not fit, do not search for changes that make it fit (each try is a compilation)
  --json              one JSON object

examples:
  mmdiff plan experiments/transfusion_7b.py --topology v5p:4x4x8
  mmdiff plan experiments/transfusion_7b.py:attention --topology v5e:16x16 --training.accumulate 2
  mmdiff plan experiments/quickstart.py --devices 8

exit codes: 0 it fits (or nobody knows how much memory there is), 1 it does not fit, 2 usage, 65 bad configuration
"""
GIB = 2**30


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0 if argv else USAGE
    experiment, rest = argv[0], argv[1:]
    topology, rest = take_option(rest, "--topology")
    number, rest = take_option(rest, "--devices")
    pieces, rest = take_option(rest, "--vocabulary")
    as_json, search = "--json" in rest, "--no-remedy" not in rest
    rest = [a for a in rest if a not in ("--json", "--no-remedy")]
    problem = unknown_field(rest)
    if experiment.startswith("-"):
        problem = "the first argument is the experiment file, for example experiments/transfusion_7b.py"
    elif (topology is None) == (number is None):
        problem = "give --topology NAME or --devices N, for example --topology v5e:16x16"
    for name, value in (("--devices", number), ("--vocabulary", pieces)):
        if value is not None and not (value.isdecimal() and int(value) > 0):
            problem = f"{name} {value!r} is not a positive number"
    if problem:
        print(f"mmdiff plan: {problem}", file=sys.stderr)
        return USAGE
    cfg = override(config_files.load_experiment(experiment), rest)

    import jax

    if topology is not None:
        jax.config.update("jax_platforms", "cpu")
    else:
        jax.config.update("jax_num_cpu_devices", int(number or 1))
    from mmdiff.parallel import plan

    devices = plan.topology_devices(topology) if topology else plan.present_devices(int(number or 1))
    size = plan.vocabulary_size(cfg, int(pieces) if pieces else None)
    report = {"experiment": experiment, "topology": topology, **plan.plan(cfg, devices, size)}
    if report["fits"] is False and search:
        found = plan.remedy(cfg, devices, size)
        report["remedy"] = None if found is None else {"options": found[0], "peak_hbm_bytes": found[1]["peak_hbm_bytes"]}
    print(json.dumps(report) if as_json else text(report))
    return 1 if report["fits"] is False else 0


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    where = report["topology"] or "this machine"
    refused = report.get("compiler_refused")
    lines = [
        f"{report['experiment']} on {where}: {report['devices']} devices ({report['device_kind']}), mesh {mesh}",
        "",
        row("parameters", f"{report['parameters'] / 1e9:.3f} B, {report['rows_per_device']} rows per device and step"),
    ]
    if refused:
        lines.append(row("memory per device", f"the compiler needs {gib(report['peak_hbm_bytes'])}"))
    else:
        parts = f"arguments {gib(report['argument_bytes'])} + temporaries {gib(report['temporary_bytes'])}"
        lines.append(row("memory per device", f"{parts}, peak {gib(report['peak_hbm_bytes'])}"))
    capacity, fits = report["hbm_capacity_bytes"], report["fits"]
    verdict = {None: "capacity not known", True: "fits", False: "DOES NOT FIT"}[fits]
    lines.append(row("", verdict + (f" in {gib(capacity)}" if capacity else "")))
    flops, by_hand = report["flops_per_step"], report["flops_per_step_by_hand"]
    beside = f", {by_hand:.4g} by hand ({flops / by_hand:.3f})" if by_hand else ""
    lines += [
        row("operations per step", f"{flops:.4g} counted in the traced step{beside}"),
        row("", f"{report['executed_flops_per_step']:.4g} executed, with what the backward pass recomputes"),
        row("tokens per step", f"{report['tokens_per_step']:,}"),
    ]
    if not refused:
        kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in sorted(report["collective_bytes"].items())) or "nothing"
        lines.append(row("sent per device", f"{gib(report['collective_bytes_sent'])} per step: {kinds}"))
        if report["loops_of_unknown_length"]:
            lines.append(row("", f"{report['loops_of_unknown_length']} loops of unknown length counted once"))
    if report["roofline_step_seconds"]:
        named = ", ".join(f"{name} {report[f'{name}_seconds']:.3f} s" for name in ("compute", "memory", "network"))
        step = report["roofline_step_seconds"]
        lines += [
            row("roofline", f"{step:.3f} s per step at best: {named}"),
            row("", f"MFU at most {100 * report['mfu_bound']:.0f}%, {report['tokens_per_step'] / step:,.0f} tokens/s"),
            row("", "assumes bfloat16 peak, all links busy on rings, perfect overlap, state read and written once"),
        ]
    sampling = report["sampling"]
    drawn = f"{sampling['documents']} documents, {sampling['patches']} patches, {sampling['network_evaluations']} evaluations"
    lines.append(row("drawing images", f"{drawn}: peak {gib(sampling['peak_hbm_bytes'])} per device"))
    if capacity and sampling["peak_hbm_bytes"] > capacity:
        lines.append(row("", f"DOES NOT FIT in {gib(capacity)}: draw on a mesh with a larger mesh.tensor"))
    lines.append(row("compiled in", f"{report['compile_seconds']:.0f} s and {sampling['compile_seconds']:.0f} s"))
    if "remedy" in report:
        found = report["remedy"]
        told = "none of the changes tried makes it fit; use more devices" if found is None else " ".join(found["options"])
        lines.append(row("would fit with", told + (f" (peak {gib(found['peak_hbm_bytes'])})" if found else "")))
    return "\n".join(lines)


def row(name: str, what: str) -> str:
    return f"  {name:<20} {what}"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
