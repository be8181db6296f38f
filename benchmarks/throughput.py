"""Images per second of `Model.generate` against the number of images in a call, with random weights.

    python benchmarks/throughput.py                                             the 88M model at 64x64, 256 positions
    python benchmarks/throughput.py --experiment experiments/faces_32.py        small enough for a laptop

Drawing is bound by reading the weights and starting programs while a call holds few images, by arithmetic when it holds
many: from there on images per second stay the same. GFLOP/s are the matrix products of the evaluations over all of the
time, from prompt to pixels in the host's memory.
"""

import argparse
import dataclasses
import json
import statistics
import sys

import common
import jax
import jax.numpy as jnp

from mmdiff import IMG, Document, config_files
from mmdiff.config import Config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.layout import empty_row
from mmdiff.models.network import Network
from mmdiff.sampling.generate import Model
from mmdiff.training.flops import counted_flops


def model_of(cfg: Config) -> Model:
    """Random weights; told the length of steps, so that it can draw with a few-step solver."""
    cfg = config_files.replaced(cfg, {"model.step_input": True})
    vocabulary = Vocabulary.bytes(cfg.layout.max_grid)
    return Model(cfg, Network.of(cfg, vocabulary.size).init(jax.random.key(0)), vocabulary)


def flops_per_evaluation(model: Model, patches: int) -> float:
    """Operations of one evaluation of one image."""
    rows = jax.tree.map(lambda a: jnp.asarray(a)[None], empty_row(patches, model.network.patch_values))
    z, u = rows.patches.astype(jnp.float32), jnp.zeros(rows.tokens.shape)

    def evaluate(params):
        bound = model.network.bind(params)
        hidden = bound.hidden(rows.tokens, rows.is_patch, z, u, rows.cell, rows.position, rows.mask, step=u)
        return bound.predict(hidden, rows.cell)

    return counted_flops(evaluate, model.params)


def measure(model: Model, size: tuple[int, int], batch: int, evaluations: int, rounds: int) -> float:
    """Seconds per call, the median of `rounds`."""
    few = {"solver": "few_step", "grid": "uniform_u"} if evaluations < 4 else {"solver": "unipc2", "grid": "uniform_logsnr"}
    prompts = [Document(IMG)] * batch

    def call():
        model.generate(prompts, image_size=size, steps=evaluations, max_tokens=0, guidance=1.0, **few)

    call()
    return statistics.median(common.clocked(call) for _ in range(rounds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="experiments/celeba_hq_64.py")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64], metavar="N", help="images in a call")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[10, 2], metavar="N", help="below 4: of a few-step model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compute", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    cfg = config_files.load_experiment(arguments.experiment)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, compute=arguments.compute))
    size = cfg.fixed_size
    if size is None:
        print(f"throughput.py: {arguments.experiment} has no data.image_size", file=sys.stderr)
        return 2
    model = model_of(cfg)
    operations = flops_per_evaluation(model, size[0] * size[1] // cfg.model.patch**2)
    found = []
    for evaluations in arguments.evaluations:
        for batch in arguments.batches:
            seconds = measure(model, size, batch, evaluations, arguments.rounds)
            rate = batch * evaluations * operations / seconds
            found.append(
                {
                    "evaluations": evaluations,
                    "batch": batch,
                    "images_per_second": batch / seconds,
                    "seconds_per_call": seconds,
                    "gflop_per_second": rate / 1e9,
                }
            )
    device = jax.devices()[0]
    facts = {"experiment": arguments.experiment, "device": device.device_kind, "compute": str(model.network.compute_type)}
    facts |= {"gflop_per_evaluation": operations / 1e9, "parameters": sum(a.size for a in jax.tree.leaves(model.params))}
    if arguments.json:
        print(json.dumps(facts | {"versions": common.versions("jax", "flax"), "found": found}))
        return 0
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(
        "| evaluations | images in a call | seconds per call | images per second | GFLOP/s |\n| --- | --- | --- | --- | --- |"
    )
    for row in found:
        figures = f"{row['seconds_per_call']:.4f} | {row['images_per_second']:.2f} | {row['gflop_per_second']:.0f}"
        print(f"| {row['evaluations']} | {row['batch']} | {figures} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
