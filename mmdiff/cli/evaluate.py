"""`mmdiff evaluate`: measure a run on held-out data, as a table or as JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence

from mmdiff import config
from mmdiff.cli.arguments import Parser, add_drawing, given

DRAWING = ("steps", "guidance", "solver", "grid")
EXAMPLES = """examples:
  mmdiff evaluate runs/quickstart
  mmdiff evaluate runs/quickstart --metrics image_accuracy --steps 4 --solver ddim
  mmdiff evaluate runs/faces --phrases "black hair|brown hair|blond hair;smiling" --count 500
  mmdiff evaluate runs/quickstart --json > metrics.json

metrics:
{metrics}
Without --metrics all are measured that suit the run's data, but for the slow ones.

exit codes: 0 done, 2 wrong usage, 65 bad run or data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from mmdiff.evaluation.evaluate import METRICS, check_names, evaluate
    from mmdiff.evaluation.phrases import parse_groups

    about = "".join(f"  {name:<21} {metric.about}\n" for name, metric in METRICS.items())
    parser = Parser("mmdiff evaluate", "Measure a trained model on held-out data.", EXAMPLES.format(metrics=about))
    parser.add_argument("workdir", help="folder of a training run")
    parser.add_argument("--metrics", metavar="A,B", help="which to measure")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="documents per metric (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is sampled (default: 0)")
    parser.add_argument("--phrases", metavar="GROUPS", help="phrases that captions should name: 'a|b|c;d', ; between groups")
    parser.add_argument("--data", metavar="DIR", help="folder of held-out documents (default: the run's data.path)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_drawing(parser)
    arguments = parser.parse(argv)
    try:
        metrics = None if arguments.metrics is None else [n.strip() for n in arguments.metrics.split(",") if n.strip()]
        check_names(metrics or [])
        phrases = [] if arguments.phrases is None else parse_groups(arguments.phrases)
        if arguments.count < 1:
            raise config.ConfigError(f"--count {arguments.count} must be at least 1.")
    except config.ConfigError as error:
        parser.error(str(error))
    model = load(arguments.workdir)
    if arguments.data is not None:
        data = dataclasses.replace(model.cfg.data, path=arguments.data)
        model.cfg = dataclasses.replace(model.cfg, data=data)
    wanted = given(arguments, DRAWING)
    try:
        model.options(**wanted)
    except config.ConfigError as error:
        parser.error(str(error))
    result = evaluate(model, metrics, count=arguments.count, seed=arguments.seed, phrases=phrases, **wanted)
    print(as_json(result) if arguments.json else table(result))
    return 0


def load(workdir: str):
    """The model of a run; a run without a whole checkpoint is bad data."""
    import mmdiff
    from mmdiff.training.checkpoint import CheckpointError

    try:
        return mmdiff.load(workdir)
    except CheckpointError as error:
        raise mmdiff.DataError(str(error)) from error


def as_json(result: dict[str, float]) -> str:
    """One JSON object; what is not a number is null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in result.items()})


def table(result: dict[str, float]) -> str:
    """One line per number, standard errors behind their means."""
    shown = [name for name in result if not name.endswith("_stderr")]
    width, lines = max(map(len, shown), default=0), []
    for name in shown:
        error = result.get(f"{name}_stderr")
        lines.append(f"{name:<{width}}  {result[name]:8.4f}" + ("" if error is None else f"  ± {error:.4f}"))
    return "\n".join(lines)
