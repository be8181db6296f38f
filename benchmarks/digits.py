"""Quality and speed of learning on scikit-learn's digits: names and images of 1,437 digits, read in both orders.

At most 2.8M parameters and 1,000 steps of 64 documents, seed 0; half of the documents are [name, image], half [image,
name], names as bytes. Measured on the 360 digits held out:

    caption_accuracy     greedy captions that are exactly the right name
    class_accuracy       drawn digits (20 per class) that a classifier takes for what they should be
    frechet_distance     of the drawn digits' 64 pixels to the held-out ones; 200 real training images score 0.234
    seconds_per_step     batch included, compilation excluded

All three are also shown over network evaluations and guidance scales, but the result is taken at the one setting RESULT.
With --peer the PyPI package transfusion-pytorch (in its own virtual environment) learns the same in the same run, in turn
with mmdiff, block of steps by block of steps, so that the seconds per step can be compared.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import digits_data as data
import jax
import jax.numpy as jnp
import numpy as np
from common import say
from in_memory import InMemory

from mmdiff import IMG, Document, Image
from mmdiff.config import Config, Data, Diffusion, Layout, Model, Optimizer, Sampling, Training
from mmdiff.data.batches import Batches
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.models.network import Network
from mmdiff.sampling import generate
from mmdiff.training import state as train_state
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.run import merged
from mmdiff.training.step import compile_train_step

# The limits of the comparison.
STEPS, DOCUMENTS_PER_STEP, MOST_PARAMETERS = 1000, 64, 2_801_352
# How the result is drawn, and what is shown beside it.
RESULT = {"steps": 10, "guidance": 1.1}
EVALUATIONS = (4, 8, 10, 16, 50)
GUIDANCES = (1.0, 1.25, 1.5)
PEER_DRAWINGS = ((4, 1.0), (8, 1.0), (10, 1.0), (16, 1.0), (50, 1.0), (16, 1.5))
WEIGHTS = "ema"  # "ema" or "params"
ROWS_PER_STEP = 26  # hold DOCUMENTS_PER_STEP documents
PIECES = 2  # per step: the same gradient with less memory traffic
BLOCK = 25  # training steps between two changes of turn


def config(steps: int = STEPS, seed: int = 0) -> Config:
    """All that can be tuned."""
    return Config(
        name="digits",
        model=Model(width=192, depth=4, patch=2, block="attention", head_width=32),
        # a row holds two documents [name, image] ([BOS] name [IMG] <rows> <cols>, two noised blocks: up to 41 positions) or
        # three [image, name] (up to 27)
        layout=Layout(row_length=82, trailing_context=0.0, text_drop=0.1, noised_copies=2, max_grid=4),
        diffusion=Diffusion(),
        data=Data(order="both", vocabulary="bytes"),
        optimizer=Optimizer(learning_rate=2e-3, warmup=100, b2=0.99),
        training=Training(steps=steps, batch_size=ROWS_PER_STEP, accumulate=PIECES, seed=seed, ema=0.99),
        sampling=Sampling(solver="unipc2", grid="uniform_logsnr"),
    )


EXAMPLES = """examples:
  python benchmarks/digits.py --out runs/digits           train, evaluate, a table and a sample sheet
  python benchmarks/digits.py --peer --json               with transfusion-pytorch beside it, one JSON object
  python benchmarks/digits.py --steps 100                 a short run, to try things out
"""


class Learner:
    """mmdiff learning the digits, some steps at a time."""

    def __init__(self, cfg: Config, digits: data.Digits, init: dict | None = None):
        """`init`: parameters to begin with; what they lack begins fresh."""
        self.cfg, self.vocabulary = cfg, Vocabulary.bytes(cfg.layout.max_grid)
        source = InMemory(data.documents(digits.train, digits.train_labels))
        self.batches = Batches(source, self.vocabulary, cfg)
        self.documents_per_step = cfg.training.batch_size * len(source) / self.batches.rows_per_epoch()
        network = Network(cfg.model, self.vocabulary.size)
        tx, _ = make_optimizer(cfg.optimizer, cfg.training.steps)
        key = jax.random.key(cfg.training.seed)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, key)))
        self._check()
        params = network.init(key)
        if init is not None:
            params = merged(params, jax.tree.map(jnp.copy, init), "init")  # training gives its buffers away
        self.state = train_state.create(params, tx, cfg.training.seed)
        self.rows = self.batches.iterate(0, cfg.training.steps)
        self.step = compile_train_step(network, cfg, tx, self.state, self.batches.batch(0))

    def train(self, steps: int) -> dict[str, float]:
        """The next steps; seconds for all of them, and the last loss."""
        wall, cpu, metrics = time.perf_counter(), time.process_time(), {"loss": float("nan")}
        for _ in range(steps):
            self.state, metrics = self.step(self.state, next(self.rows))
        loss = float(metrics["loss"])  # waits for the last step
        return {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "loss": loss}

    def model(self) -> generate.Model:
        return generate.Model(self.cfg, getattr(self.state, WEIGHTS), self.vocabulary)

    def _check(self) -> None:
        if self.parameters > MOST_PARAMETERS:
            raise common.BenchmarkError(f"{self.parameters} parameters are more than {MOST_PARAMETERS}; make it smaller.")
        if self.documents_per_step > DOCUMENTS_PER_STEP * 1.01:
            most = int(self.cfg.training.batch_size * DOCUMENTS_PER_STEP / self.documents_per_step)
            raise common.BenchmarkError(
                f"{self.documents_per_step:.1f} documents per step are more than {DOCUMENTS_PER_STEP}; "
                f"lower training.batch_size to {most}."
            )


def learn(learner: Learner, peer: common.Worker | None) -> list[dict[str, dict]]:
    """Both trainings, block by block; seconds per step of every block, the first one dropped (compilation)."""
    blocks = []
    for number, (start, stop) in enumerate(spans(learner.cfg.training.steps)):
        turns = [("mmdiff", learner.train)]
        if peer is not None:
            turns.append(("peer", lambda steps: peer.ask("train", steps=steps)))
            time.sleep(common.SETTLE_SECONDS)
        block = {}
        for name, train in turns if number % 2 == 0 else turns[::-1]:
            answer = train(stop - start)
            block[name] = {key: value if key == "loss" else value / (stop - start) for key, value in answer.items()}
        blocks.append(block)
        if number % 4 == 0 or stop == learner.cfg.training.steps:
            figures = "  ".join(f"{n}: {b['wall_seconds'] * 1000:.0f} ms, loss {b['loss']:.3f}" for n, b in block.items())
            say(f"step {stop}/{learner.cfg.training.steps}  {figures}")
    return blocks[1:] or blocks


def spans(steps: int) -> Iterator[tuple[int, int]]:
    for start in range(0, steps, BLOCK):
        yield start, min(start + BLOCK, steps)


def caption(model: generate.Model, digits: data.Digits) -> list[str]:
    """Greedy captions of the held-out digits."""
    prompts = [Document(Image(data.to_pixels(grey))) for grey in digits.held_out]
    out = model.generate(prompts, temperature=0.0, max_tokens=8, max_images=0)
    return ["".join(document.texts) for document in out]


def draw(model: generate.Model, steps: int, guidance: float, seed: int, **options) -> np.ndarray:
    """Greys [200, 64] showing data.LABELS."""
    prompts = [Document(data.NAMES[label], IMG) for label in data.LABELS]
    size = (data.SIDE, data.SIDE)
    out = model.generate(prompts, image_size=size, steps=steps, guidance=guidance, max_tokens=0, seed=seed, **options)
    return np.stack([data.to_grey(document.images[0].pixels) for document in out])


def evaluate(model: generate.Model, digits: data.Digits, judge: data.Judge, seed: int) -> tuple[dict, np.ndarray]:
    """The figures, and the digits drawn at RESULT."""
    say("captions and drawings of mmdiff")
    figures: dict = {"caption_accuracy": data.caption_accuracy(caption(model, digits), digits.held_out_labels)}
    drawings, best = [], draw(model, **RESULT, seed=seed + 1)
    for guidance in GUIDANCES:
        for steps in EVALUATIONS:
            greys = draw(model, steps, guidance, seed + 1)
            drawings.append({"network_evaluations": steps, "guidance": guidance} | judge.score(greys))
    setting = {"network_evaluations": RESULT["steps"], "guidance": RESULT["guidance"]}
    return figures | judge.score(best) | setting | {"drawings": drawings}, best


def evaluate_peer(peer: common.Worker, digits: data.Digits, judge: data.Judge, folder: Path) -> dict:
    captions = peer.ask("caption")["captions"]
    figures: dict = {"peer_caption_accuracy": data.caption_accuracy(captions, digits.held_out_labels)}
    drawings = []
    for steps, guidance in PEER_DRAWINGS:
        say(f"drawings of the peer: {steps} network evaluations, guidance {guidance}")
        path = folder / "peer.npy"
        peer.ask("draw", labels=data.LABELS.tolist(), evaluations=steps, guidance=guidance, out=str(path))
        drawings.append({"network_evaluations": steps, "guidance": guidance} | judge.score(np.load(path)))
    at_16 = next(d for d in drawings if (d["network_evaluations"], d["guidance"]) == (16, 1.0))
    figures |= {f"peer_{key}": value for key, value in at_16.items()}
    return figures | {"peer_drawings": drawings}


def speed(blocks: list[dict[str, dict]]) -> dict[str, float]:
    """Medians over the blocks."""
    figures = {}
    for name, prefix in (("mmdiff", ""), ("peer", "peer_")):
        if name in blocks[0]:
            figures[f"{prefix}seconds_per_step"] = round(common.median_seconds(blocks, name), 4)
            figures[f"{prefix}cpu_seconds_per_step"] = round(common.median_seconds(blocks, name, "cpu_seconds"), 4)
    if "peer" in blocks[0]:
        ratios = common.compare(blocks, "mmdiff", "peer")
        figures |= {f"train_step_{key}_over_peer": round(value, 3) for key, value in ratios.items()}
    return figures


def table(figures: dict) -> str:
    """The figures for a person."""
    lines = [
        f"{'':30} {'captions':>9} {'class':>7} {'Frechet':>8} {'ms/step':>8} {'parameters':>11}",
        f"{'real training images':30} {'':9} {'':7} {figures['real_images_frechet_distance']:8.3f}",
    ]
    for prefix, name in (("", "mmdiff"), ("peer_", "transfusion-pytorch")):
        if f"{prefix}caption_accuracy" in figures:
            lines.append(
                f"{name:30} {figures[prefix + 'caption_accuracy']:9.3f} {figures[prefix + 'class_accuracy']:7.3f} "
                f"{figures[prefix + 'frechet_distance']:8.3f} {1000 * figures[prefix + 'seconds_per_step']:8.1f} "
                f"{figures[prefix + 'parameters']:11}"
            )
            lines.append(
                f"    drawn with {figures[prefix + 'network_evaluations']} network evaluations, "
                f"guidance {figures[prefix + 'guidance']}"
            )
    if "train_step_speedup_over_peer" in figures:
        low, high = (figures[f"train_step_speedup_{end}_over_peer"] for end in ("lowest", "highest"))
        ratio = figures["train_step_speedup_over_peer"]
        lines.append(f"a training step of mmdiff is {ratio:.1f} times as fast ({low:.1f} to {high:.1f})")
    for prefix, name in (("", "mmdiff"), ("peer_", "transfusion-pytorch")):
        if f"{prefix}drawings" in figures:
            lines += ["", f"{name}: network evaluations, guidance, class accuracy, Frechet distance"]
            for one in figures[f"{prefix}drawings"]:
                evaluations, guidance = one["network_evaluations"], one["guidance"]
                lines.append(f"{evaluations:6} {guidance:5.1f} {one['class_accuracy']:7.3f} {one['frechet_distance']:8.3f}")
    return "\n".join(lines)


def start_peer(venv: Path, digits: data.Digits, folder: Path, steps: int, seed: int) -> common.Worker:
    np.savez(folder / "digits.npz", train=digits.train, train_labels=digits.train_labels, held_out=digits.held_out)
    setting = {"data": str(folder / "digits.npz"), "names": data.NAMES, "steps": steps, "seed": seed}
    setting["batch"] = DOCUMENTS_PER_STEP
    worker = common.HERE / "workers" / "peer_digits.py"
    return common.Worker("transfusion-pytorch", common.peer_python(venv), worker, json.dumps(setting))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="train and evaluate transfusion-pytorch too")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS}, the protocol)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the sample sheet digits.png")
    parser.add_argument("--venv", type=Path, default=common.PEER_VENV, help="the peer's environment, made if missing")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    machine = common.machine()
    common.warn_if_busy(machine["load_average"][0])
    try:
        figures, best = run(arguments)
    except common.BenchmarkError as error:
        say(f"error: {error}")
        return 1
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        Image(data.sheet(best, rows=10)).save(arguments.out / "digits.png")
        say(f"wrote {arguments.out / 'digits.png'}")
    if arguments.json:
        facts = {
            "versions": common.versions("jax", "flax", "optax") | figures.pop("peer_versions", {}),
            "machine": machine,
        }
        print(json.dumps(figures | facts, indent=1))
    else:
        print(table(figures))
    return 0


def run(arguments: argparse.Namespace) -> tuple[dict, np.ndarray]:
    digits = data.load()
    judge, cfg = data.Judge(digits), config(arguments.steps, arguments.seed)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        learner, peer = Learner(cfg, digits), None
        if arguments.peer:
            peer = stack.enter_context(start_peer(arguments.venv, digits, folder, arguments.steps, arguments.seed))
        figures = {
            "parameters": learner.parameters,
            "training_steps": arguments.steps,
            "documents_per_step": round(learner.documents_per_step, 2),
            "seed": arguments.seed,
            "weights": WEIGHTS,
            "solver": cfg.sampling.solver,
        }
        figures |= judge.anchors() | speed(learn(learner, peer))
        ours, best = evaluate(learner.model(), digits, judge, arguments.seed)
        figures |= ours
        if peer is not None:
            about = peer.ask("describe")
            figures |= {"peer_parameters": about["parameters"], "peer_versions": about["versions"]}
            figures |= evaluate_peer(peer, digits, judge, folder)
    return figures, best


if __name__ == "__main__":
    sys.exit(main())
