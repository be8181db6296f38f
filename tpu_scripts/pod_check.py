"""Checks a pod before a run is started on it: run by all hosts at once.

    tpu_scripts/run.sh -- python tpu_scripts/pod_check.py --storage /mnt/runs

Every line is one check: that the hosts find each other, run the same code with the same libraries, that a sum over all
devices is right and how fast it is, that the clocks agree, and that what one host writes to the shared folder the others
can read. Exit codes: 0 all well, 1 a check failed, 65 the hosts differ or the arguments make no sense.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mmdiff import config
from mmdiff.document import DataError
from mmdiff.parallel import distributed
from mmdiff.parallel.mesh import AXES, make_mesh

SUMMED = 2**22  # floats of each device in the timed sum: 16 MiB
CLOCKS = 1.0  # seconds that the hosts' clocks may differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, help="folder that all hosts share, where the workdir will be")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where the hosts do not find each other by themselves")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--dry-run", action="store_true", help="print the checks and do nothing")
    arguments = parser.parse_args()
    checks = {"software": software, "sum over devices": collective, "clocks": clocks}
    if arguments.storage is not None:
        checks["storage"] = lambda: storage(arguments.storage)
    if arguments.dry_run:
        print("\n".join(checks))
        return 0
    try:
        distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
        tell("hosts", f"{jax.process_count()}, {jax.device_count()} devices ({jax.devices()[0].device_kind})")
        good = True
        for name, check in checks.items():
            passed, told = check()
            good &= not distributed.any_process(not passed)
            tell(name, told if passed else f"FAILED: {told}")
    except (config.ConfigError, DataError) as error:
        print(f"pod_check: {error}", file=sys.stderr)
        distributed.shutdown()
        return 65
    distributed.shutdown()
    return 0 if good else 1


def tell(name: str, what: str) -> None:
    """The first host speaks for all; the others only when something is wrong with them."""
    if distributed.is_first() or what.startswith("FAILED"):
        print(f"host {jax.process_index()}  {name:<18} {what}", flush=True)


def software() -> tuple[bool, str]:
    facts = distributed.environment()
    distributed.agree(facts)
    return True, ", ".join(f"{name} {value}" for name, value in facts.items())


def collective() -> tuple[bool, str]:
    """Device i contributes i + 1 everywhere; the sum is known."""
    mesh = make_mesh(config.Mesh())
    count = mesh.size
    spread = NamedSharding(mesh, PartitionSpec(AXES))
    part = lambda index: np.full((1, SUMMED), index[0].start + 1 if index[0].start is not None else 1, np.float32)
    x = jax.make_array_from_callback((count, SUMMED), spread, part)
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    found = np.asarray(total(x).addressable_data(0))
    begin = time.monotonic()
    total(x).block_until_ready()
    seconds = time.monotonic() - begin
    want = count * (count + 1) / 2
    return bool(np.all(found == want)), f"{found[0]:g} (should be {want:g}), {4 * SUMMED / seconds / 1e9:.2f} GB/s per device"


def clocks() -> tuple[bool, str]:
    multihost_utils.sync_global_devices("clocks")
    here = time.time()
    everywhere = np.asarray(multihost_utils.process_allgather(np.asarray([here - int(here / 1e5) * 1e5], np.float64)))
    spread = float(np.ptp(everywhere))
    return spread < CLOCKS, f"differ by {1000 * spread:.0f} ms"


def storage(folder: Path) -> tuple[bool, str]:
    """Every host writes a file, and reads those of all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = lambda index: folder / f"pod_check.{index}"
    name(jax.process_index()).write_text(str(jax.process_index()))
    multihost_utils.sync_global_devices("written")
    seen = [name(i).is_file() and name(i).read_text() == str(i) for i in range(jax.process_count())]
    multihost_utils.sync_global_devices("read")
    name(jax.process_index()).unlink(missing_ok=True)
    missing = [str(i) for i, there in enumerate(seen) if not there]
    return not missing, f"{folder} is shared" if not missing else f"{folder}: files of hosts {', '.join(missing)} are not seen"


if __name__ == "__main__":
    sys.exit(main())
