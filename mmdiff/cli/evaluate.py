"""`mmdiff evaluate`: measure a run on held-out data, as a table or as JSON."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdiff import config
from mmdiff.cli.arguments import DRAWING, Parser, add_drawing, given, weak_in_vain
from mmdiff.cli.programs import keep_programs

EXAMPLES = """examples:
  mmdiff evaluate runs/quickstart
  mmdiff evaluate runs/quickstart --metrics image_accuracy --steps 4 --solver ddim
  mmdiff evaluate runs/faces --phrases "black hair|brown hair|blond hair;smiling" --count 500
  mmdiff evaluate runs/faces --phrases "black hair|brown hair|blond hair;smiling" --metrics phrase_drawn --steps 50
  mmdiff evaluate runs/quickstart --json > metrics.json
  mmdiff evaluate runs/faces --features encoder --count 1000
  mmdiff evaluate runs/quickstart --ladder --few runs/quickstart_few
  mmdiff evaluate runs/faces --metrics fid_inception --features inception --weights pt_inception-2015-12-05-6726825d.pth

metrics:
{metrics}
Without --metrics all are measured that suit the run's data, but for the slow ones. --features adds the Frechet and the
kernel distance in these features, precision_recall, density_coverage and nearest_train_ratio. Sets hold as many generated
as real images, at most --count. The protocol (samples, split, sampler, resizing, hashes) goes to stderr; it is a key of
--json.

features:
  random      a random convolutional network      patch_dct   spectra of 8x8 blocks
  encoder     trained once on the run's images, without labels, about a minute; kept in WORKDIR/evaluation
  inception   the network of FID; --weights: {known},
              from https://github.com/mseitzer/pytorch-fid/releases (read without PyTorch)

exit codes: 0 done, 2 wrong usage, 65 bad run or data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from mmdiff.data.sources import open_source
    from mmdiff.evaluation import inception, judge, sets
    from mmdiff.evaluation.evaluate import METRICS, check_names, measure
    from mmdiff.evaluation.features import NAMES
    from mmdiff.evaluation.phrases import parse_groups
    from mmdiff.evaluation.protocol import lines, protocol
    from mmdiff.evaluation.task import SPLITS, Comparison, Task

    about = "".join(f"  {name:<23} {metric.about}\n" for name, metric in METRICS.items())
    epilog = EXAMPLES.format(metrics=about, known=inception.KNOWN_NAME)
    parser = Parser("mmdiff evaluate", "Measure a trained model on held-out data.", epilog)
    parser.add_argument("workdir", help="folder of a training run")
    parser.add_argument("--metrics", metavar="A,B", help="which to measure")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="documents per metric (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is sampled (default: 0)")
    parser.add_argument("--phrases", metavar="GROUPS", help="phrases that captions should name: 'a|b|c;d', ; between groups")
    parser.add_argument("--judge", metavar="FILE", help="who judges phrase_drawn (default: one trained now)")
    parser.add_argument("--data", metavar="DIR", help="folder of held-out documents (default: the run's data.path)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    group = parser.add_argument_group("sets of images")
    group.add_argument("--features", choices=NAMES, help="what images are compared by (default: random)")
    group.add_argument("--weights", metavar="FILE", help="of --features inception; of encoder: another run's, to compare with")
    group.add_argument("--weights-sha256", metavar="HEX", help="take a file of Inception weights with this hash")
    group.add_argument("--split", choices=SPLITS, default="validation", help="whose images are real (default: validation)")
    group = parser.add_argument_group("ladder")
    group.add_argument("--ladder", action="store_true", help="quality against evaluations, by solver and grid; with a plot")
    group.add_argument("--few", metavar="RUN", help="a few-step model, measured beside this one (1, 2, 4 and 8 evaluations)")
    add_drawing(parser)
    arguments = parser.parse(argv)
    if arguments.ladder and (arguments.steps is not None or arguments.grid is not None or arguments.json):
        parser.error("--ladder goes through steps and grids itself; leave out --steps, --grid and --json")
    if weak_in_vain(arguments):
        parser.error("--weak is for --autoguidance; give its SCALE, as --autoguidance 2")
    if arguments.few is not None and not arguments.ladder:
        parser.error("--few is for --ladder")
    try:
        metrics = None if arguments.metrics is None else [n.strip() for n in arguments.metrics.split(",") if n.strip()]
        check_names(metrics or [])
        phrases = [] if arguments.phrases is None else parse_groups(arguments.phrases)
        if arguments.judge is not None and (phrases or "phrase_drawn" not in (metrics or ())):
            raise config.ConfigError("--judge is for --metrics phrase_drawn, and has its own phrases; leave out --phrases.")
        comparison = Comparison(
            arguments.features,
            None if arguments.weights is None else Path(arguments.weights),
            arguments.weights_sha256,
            arguments.split,
            Path(arguments.workdir) / "evaluation",
        )
        sets.check(comparison, metrics or ())
        if arguments.count < 1:
            raise config.ConfigError(f"--count {arguments.count} must be at least 1.")
    except config.ConfigError as error:
        parser.error(str(error))
    keep_programs(arguments.workdir)
    model = load(arguments.workdir, arguments.weak)
    source = None
    if arguments.data is not None:  # the training images remain those of the run
        data = dataclasses.replace(model.cfg.data, path=arguments.data)
        source = open_source(dataclasses.replace(model.cfg, data=data), "validation")
    wanted = given(arguments, DRAWING)
    tokenizer = model.cfg.model.network in config.TOKENIZERS
    if tokenizer and (wanted or arguments.ladder or arguments.weak):
        parser.error(f"{arguments.workdir} holds a tokenizer, which draws nothing: leave out sampling options and --ladder")
    try:
        if not tokenizer:
            model.options(**wanted)
    except config.ConfigError as error:
        parser.error(str(error))
    made = {} if arguments.judge is None else {"judge": judge.load(Path(arguments.judge))}
    groups = made["judge"].groups if made else phrases
    task = Task(model, arguments.count, arguments.seed, wanted, groups, source, comparison, made=made)
    if arguments.ladder:
        return climb(task, metrics, arguments.solver, arguments.few)
    result = measure(task, metrics)
    if arguments.json:
        print(as_json(result, protocol(task)))
    else:
        print(lines(protocol(task)), file=sys.stderr)
        print(table(result))
    return 0


def climb(task, metrics: list[str] | None, solver: str | None, few: str | None) -> int:
    """The ladder, a line for each rung as it is measured."""
    from mmdiff.evaluation import ladder
    from mmdiff.evaluation.evaluate import METRICS, chosen

    other = None
    if few is not None:
        model = load(few)
        model.options(solver="few_step")  # refuses what was not trained for it
        other = dataclasses.replace(task, model=model, drawing={})
    names = chosen(task, metrics or ladder.usual_metrics(task, lambda name: METRICS[name].applies(task)))
    solvers = ladder.SOLVERS if solver is None else (solver,)
    rungs = []
    for rung in ladder.climb(task, other, names, solvers, ladder.NFE):
        rungs.append(rung)
        print(ladder.line(rung), flush=True)
    workdir = task.comparison.cache.parent
    usual = task.model.cfg.sampling.solver
    shown = usual if usual in solvers else "unipc2" if "unipc2" in solvers else solvers[0]
    written = ladder.write(rungs, task.comparison.cache, f"{workdir.name}: quality against evaluations", shown)
    print(f"wrote {', '.join(map(str, written))}")
    return 0


def load(workdir: str, weak: str | None = None):
    """The model of a run, with the weaker one of autoguidance, or its tokenizer; without a whole checkpoint it is bad data."""
    import mmdiff
    from mmdiff.tokenizers.model import holds_tokenizer
    from mmdiff.training.checkpoint import CheckpointError

    try:
        if holds_tokenizer(workdir):
            return mmdiff.load_tokenizer(workdir)
        return mmdiff.load(workdir, weak=weak)
    except CheckpointError as error:
        raise mmdiff.DataError(str(error)) from error


def as_json(result: dict[str, float], rests_on: dict[str, Any] | None = None) -> str:
    """One JSON object; what is not a number is null. `rests_on` becomes the key "protocol"."""
    numbers = {name: value if math.isfinite(value) else None for name, value in result.items()}
    return json.dumps(numbers | ({"protocol": rests_on} if rests_on is not None else {}))


def table(result: dict[str, float]) -> str:
    """One line per number, standard errors behind their means."""
    shown = [name for name in result if not name.endswith("_stderr")]
    width, lines = max(map(len, shown), default=0), []
    for name in shown:
        error = result.get(f"{name}_stderr")
        lines.append(f"{name:<{width}}  {result[name]:8.4f}" + ("" if error is None else f"  ± {error:.4f}"))
    return "\n".join(lines)
