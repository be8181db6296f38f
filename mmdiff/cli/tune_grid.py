"""`mmdiff tune-grid`: find noise levels at which few steps of a run's model do best."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmdiff import config
from mmdiff.cli.arguments import Parser
from mmdiff.cli.programs import keep_programs
from mmdiff.document import DataError

EPILOG = """examples:
  mmdiff tune-grid runs/quickstart
  mmdiff tune-grid runs/faces --steps 6,10 --solver dpmpp_2m --count 64

Compares drawings of few steps with drawings of 200 from the same noise, on held-out prompts, and moves the levels until
they agree best. What it finds is kept in WORKDIR/grids.json, where sampling (--grid auto, the default) and evaluation find
it. The error is relative to the spread of the pixels, on noise and prompts that were not searched on.

exit codes: 0 done, 2 wrong usage, 65 bad run or data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from mmdiff.diffusion import grids, solvers

    parser = Parser("mmdiff tune-grid", "Find noise levels at which few sampling steps do best.", EPILOG)
    choices = [name for name in grids.ONE_STAGE + grids.TWO_STAGE if name not in (*solvers.STOCHASTIC, "few_step")]
    parser.add_argument("workdir", help="folder of a training run")
    parser.add_argument("--steps", default="4,6,8,10", metavar="A,B", help="numbers of evaluations (default: 4,6,8,10)")
    parser.add_argument("--solver", choices=choices, default="unipc2", help="default: unipc2")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="default: as the run was configured")
    parser.add_argument("--count", type=int, default=32, metavar="N", help="drawings to search on (default: 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    arguments = parser.parse(argv)
    wanted = [part.strip() for part in arguments.steps.split(",")]
    if not all(part.isdecimal() and int(part) >= 2 for part in wanted):
        parser.error(f"--steps {arguments.steps!r}: give numbers from 2 on, as 4,6,8,10")
    if arguments.count < 1:
        parser.error(f"--count {arguments.count} must be at least 1")
    from mmdiff.cli.evaluate import load
    from mmdiff.data.sources import open_source
    from mmdiff.evaluation.prompts import drawings
    from mmdiff.sampling.tuning import Target, tune, write_tuned

    workdir = Path(arguments.workdir)
    keep_programs(workdir)
    model = load(arguments.workdir)
    guidance = model.cfg.sampling.guidance if arguments.guidance is None else arguments.guidance
    try:
        model.options(guidance=guidance)
    except config.ConfigError as error:
        parser.error(str(error))
    found = drawings(open_source(model.cfg, "validation"), model.cfg, 2 * arguments.count)
    if not found:
        raise DataError(f"{workdir}: the data has no held-out documents with an image.")
    size = Counter((d.image.height, d.image.width) for d in found).most_common(1)[0][0]
    prompts = [d.prompt for d in found if (d.image.height, d.image.width) == size]
    prompts *= -(-2 * arguments.count // len(prompts))  # the same prompt again is another drawing: its noise differs
    parts = prompts[: arguments.count], prompts[arguments.count : 2 * arguments.count]
    search, check = (Target(model, part, size, arguments.seed + n, guidance) for n, part in enumerate(parts))
    print(f"{arguments.solver}: error against 200 steps, relative to the spread of the pixels")
    for steps in map(int, wanted):
        begin = time.monotonic()
        tuned = tune(search, check, arguments.solver, steps)
        write_tuned(workdir, arguments.solver, steps, tuned._asdict() | {"guidance": guidance, "count": arguments.count})
        levels = " ".join(f"{sigma:.3g}" for sigma in tuned.sigmas)
        print(
            f"{steps:>3} steps  {tuned.begun} {tuned.error_before:.4f} -> tuned {tuned.error:.4f}"
            f"  ({time.monotonic() - begin:.0f} s)  sigma {levels}",
            flush=True,
        )
    return 0
