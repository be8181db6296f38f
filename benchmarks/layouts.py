"""One model on one set of chips, cut in different ways: what each chip computes, holds and sends, from the compiled step.

Nothing is run and no chip is needed (pip install -e ".[plan]"); every layout takes a minute to compile. A chip works on at most
--rows rows at a time: splitting layers instead of rows gives each chip more rows of the same batch, which it takes in pieces.
"""

import argparse
import dataclasses
import json
import sys

from mmdiff import config, config_files
from mmdiff.parallel import plan
from mmdiff.parallel.mesh import AXES

EXAMPLES = """examples:
  python benchmarks/layouts.py                                                  the 760m model on 64 chips of v5e
  python benchmarks/layouts.py --experiment experiments/transfusion_7b.py --topology v5p:4x4x8 --meshes 1,128,1 1,32,4
"""


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--experiment", default="experiments/transfusion_760m.py")
    parser.add_argument("--topology", default="v5e:8x8")
    parser.add_argument("--meshes", nargs="+", default=["64,1,1", "1,64,1", "8,8,1", "1,16,4", "1,8,8"], metavar="D,F,T")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows on a chip at a time (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    base = config_files.load_experiment(options.experiment)
    devices = plan.topology_devices(options.topology)
    reports = {}
    for name in options.meshes:
        mesh = config.Mesh(**dict(zip(AXES, map(int, name.split(",")), strict=True)))
        pieces = max(1, base.training.batch_size // (mesh.data * mesh.fsdp * options.rows))
        training = dataclasses.replace(base.training, accumulate=pieces)
        cfg = dataclasses.replace(base, mesh=mesh, training=training)
        reports[name] = plan.plan(cfg, devices, plan.vocabulary_size(cfg, None), sampling=False) | {"pieces": pieces}
    if options.json:
        print(json.dumps({"experiment": options.experiment, "topology": options.topology, "layouts": reports}))
        return 0
    print(f"{options.experiment} on {options.topology}; everything per chip and step\n")
    print("| data x fsdp x tensor | pieces | TFLOP | arguments | temporaries | peak | gathered | added up | sent | fits |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    gib = lambda size: f"{size / 2**30:.2f}"
    for name, report in reports.items():
        refused, sent = report.get("compiler_refused"), report.get("collective_bytes", {})
        added = sent.get("all-reduce", 0) + sent.get("reduce-scatter", 0)
        cells = [
            name.replace(",", " x "),
            str(report["pieces"]),
            f"{report['executed_flops_per_step'] / report['devices'] / 1e12:.1f}",
            *(gib(report[key]) if key in report else "" for key in ("argument_bytes", "temporary_bytes", "peak_hbm_bytes")),
            *(["", "", ""] if refused else [gib(sent.get("all-gather", 0)), gib(added), gib(report["collective_bytes_sent"])]),
            "yes" if report["fits"] else "no",
        ]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
