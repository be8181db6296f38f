"""Speed and memory beside the PyPI package transfusion-pytorch, both measured in turn in one run.

Sizes: width 256; 8 transformer layers, or 16 gated attention units (GAU), which cost about the same; 64 patches of 48
values and 32 text tokens per document; batch 16; float32; each side with its default number of threads. Measured:

    train_step                  forward, backward and AdamW on 16 documents [text, image]; mmdiff in pieces of 4
    image_batch_1, _16          prompts of 32 tokens to 32x32x3 images, 16 network evaluations (Euler), no guidance
    unprompted_image_batch_16   the same without any prompt
    few_steps_1, _2, _4         one such image in 1, 2 and 4 evaluations of a few-step model, and the peer at its defaults
                                (midpoint rule and guidance, 61 evaluations); also set against 16 evaluations of either side
    text_64_tokens_batch_1, _16 64 tokens after a prompt of 32, with cache
    memory                      peak of a fresh process that does nothing but the train step

The peer lives in its own virtual environment, which the first run makes, and in its own process; so does mmdiff. In each
round every side works alone while the others wait for input. A speedup is the median over the rounds of
`seconds of transfusion-pytorch / seconds of mmdiff`: above 1, mmdiff is faster. Where the peer has several public ways to
the same result, the fastest is used and named.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
from pathlib import Path

import common
from common import say

SIZES = {
    "width": 256,
    "attention_layers": 8,
    "gau_layers": 16,
    "image_side": 32,
    "patch": 4,
    "text_tokens": 32,
    "batch": 16,
    "pieces": 4,  # mmdiff's train step works the batch through four documents at a time: the same gradient, half the memory
    "image_steps": 16,
    "new_tokens": 64,
}
TASKS = {
    "train_step": "train step, batch 16",
    "image_batch_1": "one image, 16 evaluations",
    "image_batch_16": "16 images, 16 evaluations",
    "unprompted_image_batch_16": "16 images without a prompt",
    "few_steps_1": "one image, 1 against 61",
    "few_steps_2": "one image, 2 against 61",
    "few_steps_4": "one image, 4 against 61",
    "text_64_tokens_batch_1": "64 tokens of one text",
    "text_64_tokens_batch_16": "64 tokens of 16 texts",
}
PEER, OURS = "transfusion-pytorch", ("gau", "attention")
SIDES = (PEER, *OURS)
WARM_CALLS = {"train_step": 8}  # the peer tries its strategies in the first steps
MEMORY_STEPS = 8
EXAMPLES = """examples:
  python benchmarks/vs_transfusion_pytorch.py                      all tasks, 9 rounds, a table
  python benchmarks/vs_transfusion_pytorch.py --quick              3 short rounds
  python benchmarks/vs_transfusion_pytorch.py --tasks train_step --rounds 15
  python benchmarks/vs_transfusion_pytorch.py --json > speed.json  one JSON object
"""


def start(name: str, python: Path, arguments: argparse.Namespace) -> common.Worker:
    """The peer or one kind of mmdiff, in a process of its own."""
    sizes = json.dumps(SIZES | {"seed": arguments.seed, "compile_peer": arguments.compile_peer})
    folder = common.HERE / "workers"
    if name == PEER:
        return common.Worker(PEER, python, folder / "peer_speed.py", sizes)
    return common.Worker(name, sys.executable, folder / "mmdiff_speed.py", sizes, name)


def measure_speed(workers: list[common.Worker], tasks: list[str], rounds: int, seconds: float) -> dict[str, dict]:
    """Per task: the rounds, and what each worker says about how it does the task.

    Every worker repeats a call until one measurement takes about `seconds`.
    """
    results = {}
    for task in tasks:
        say(f"{TASKS[task]}: warming up")
        warm = {w.name: w.ask("warm", task=task, calls=WARM_CALLS.get(task, 2)) for w in workers}
        calls = {name: max(1, min(50, math.ceil(seconds / answer["seconds"]))) for name, answer in warm.items()}
        measured = []
        for number, one in enumerate(common.rounds_in_turn(workers, task, calls, rounds), 1):
            measured.append(one)
            figures = "  ".join(f"{name} {one[name]['wall_seconds']:.3f} s" for name in SIDES)
            say(f"{TASKS[task]}: round {number}/{rounds}  {figures}")
        results[task] = {
            "rounds": measured,
            "notes": {name: answer["note"] for name, answer in warm.items()},
            "first_call_seconds": {name: answer["first_seconds"] for name, answer in warm.items()},
        }
    return results


def measure_memory(python: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Peak memory of the train step, one fresh process after another."""
    memory = {}
    for name in SIDES:
        say(f"memory of the train step: {name}")
        with start(name, python, arguments) as worker:
            memory[name] = worker.ask("memory", task="train_step", calls=MEMORY_STEPS)
    return memory


def summarise(results: dict[str, dict], memory: dict[str, dict]) -> dict:
    """Flat figures with names in words."""
    figures: dict = {}
    for task, result in results.items():
        for block in OURS:
            for key, value in common.compare(result["rounds"], block, PEER).items():
                figures[f"{task}_{key}_{block}"] = round(value, 3)
        for name in SIDES:
            figures[f"{task}_seconds_{spelt(name)}"] = round(common.median_seconds(result["rounds"], name), 4)
            cpu = common.median_seconds(result["rounds"], name, "cpu_seconds")
            figures[f"{task}_cpu_seconds_{spelt(name)}"] = round(cpu, 4)
            figures[f"{task}_first_call_seconds_{spelt(name)}"] = round(result["first_call_seconds"][name], 2)
        others = [side["cores_used_by_others"] for one in result["rounds"] for side in one.values()]
        figures[f"{task}_cores_used_by_others"] = round(statistics.mean(others), 2)
        figures[f"{task}_path_transfusion_pytorch"] = result["notes"][PEER]["path"]
        for name, note in result["notes"].items():
            for key in ("parameters", "positions_per_row"):
                if key in note:
                    figures[f"{key}_{spelt(name)}"] = note[key]
    figures |= over_16_evaluations(results)
    for name, answer in memory.items():
        figures[f"peak_memory_megabytes_{spelt(name)}"] = round(answer["peak_megabytes"])
        figures[f"peak_memory_above_imports_megabytes_{spelt(name)}"] = round(above_imports(answer))
    for block in OURS if memory else ():
        peer, ours = memory[PEER], memory[block]
        figures[f"peak_memory_ratio_{block}"] = round(peer["peak_megabytes"] / ours["peak_megabytes"], 3)
        figures[f"peak_memory_above_imports_ratio_{block}"] = round(above_imports(peer) / above_imports(ours), 3)
    return figures


def over_16_evaluations(results: dict[str, dict]) -> dict[str, float]:
    """How many times as fast a few-step drawing is as 16 evaluations of either side."""
    figures: dict[str, float] = {}
    if "image_batch_1" not in results:
        return figures
    usual = results["image_batch_1"]["rounds"]
    for task in results:
        if task.startswith("few_steps"):
            for block in OURS:
                for other in (PEER, block):
                    slow, fast = (
                        common.median_seconds(rounds, name)
                        for rounds, name in ((usual, other), (results[task]["rounds"], block))
                    )
                    figures[f"{task}_{block}_over_16_evaluations_of_{spelt(other)}"] = round(slow / fast, 3)
    return figures


def above_imports(answer: dict) -> float:
    return answer["peak_megabytes"] - answer["imported_megabytes"]


def spelt(name: str) -> str:
    return name.replace("-", "_")


def table(figures: dict, tasks: list[str]) -> str:
    """The figures for a person."""
    lines = [f"{'':28} {PEER:>20} {'GAU':>9} {'attention':>9}   in words"]
    for task in tasks:
        seconds = [figures[f"{task}_seconds_{spelt(name)}"] for name in SIDES]
        lines.append(
            f"{TASKS[task]:28} {seconds[0]:18.3f} s {seconds[1]:7.3f} s {seconds[2]:7.3f} s   "
            + ", ".join(f"{name}: {words(figures, task, name)}" for name in OURS)
        )
    if f"peak_memory_ratio_{OURS[0]}" in figures:
        for key, label in (
            ("peak_memory", "peak memory, train step"),
            ("peak_memory_above_imports", "  above the imports"),
        ):
            size = [figures[f"{key}_megabytes_{spelt(name)}"] for name in SIDES]
            share = ", ".join(f"{name}: the peer uses {figures[f'{key}_ratio_{name}']:.1f} times as much" for name in OURS)
            lines.append(f"{label:28} {size[0]:17} MB {size[1]:6} MB {size[2]:6} MB   {share}")
    for key, ratio in figures.items():
        if "_over_16_evaluations_of_" in key:
            lines.append(f"{key.replace('_', ' ')}: {ratio:.1f} times as fast")
    for task in tasks:
        path, others = (figures[f"{task}_{key}"] for key in ("path_transfusion_pytorch", "cores_used_by_others"))
        lines.append(f"{TASKS[task]}: the peer's fastest path is {path}; other processes used {others:.2f} cores")
    return "\n".join(lines)


def words(figures: dict, task: str, block: str) -> str:
    ratio = figures[f"{task}_speedup_{block}"]
    low, high = figures[f"{task}_speedup_lowest_{block}"], figures[f"{task}_speedup_highest_{block}"]
    return f"{ratio:.2f} times as fast ({low:.2f} to {high:.2f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of about 0.5 s instead of 9 of about 2 s")
    parser.add_argument("--rounds", type=int, help="rounds per task (default 9, with --quick 3)")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help="only these: %(choices)s"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--compile-peer", action="store_true", help="torch.compile the peer's train step (minutes)")
    parser.add_argument("--venv", type=Path, default=common.PEER_VENV, help="the peer's virtual environment, made if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    rounds = arguments.rounds or (3 if arguments.quick else 9)
    machine = common.machine()
    common.warn_if_busy(machine["load_average"][0])
    try:
        python = common.peer_python(arguments.venv)
        memory = {} if arguments.no_memory else measure_memory(python, arguments)
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(start(name, python, arguments)) for name in SIDES]
            about = {worker.name: worker.ask("describe") for worker in workers}
            results = measure_speed(workers, arguments.tasks, rounds, 0.5 if arguments.quick else 2.0)
            idle = {spelt(worker.name): round(worker.idle_cpu_seconds, 3) for worker in workers}
    except common.BenchmarkError as error:
        say(f"error: {error}")
        return 1
    figures = summarise(results, memory)
    if arguments.json:
        versions = {name: version for side in about.values() for name, version in side["versions"].items()}
        setting = {"rounds": rounds, "seed": arguments.seed, "peer_compiled": arguments.compile_peer, "sizes": SIZES}
        threads = {spelt(name): side["threads"] for name, side in about.items()}
        facts = {"versions": versions, "threads": threads, "idle_cpu_seconds": idle, "machine": machine}
        print(json.dumps(figures | setting | facts, indent=1))
    else:
        print(table(figures, arguments.tasks))
        print(f"{rounds} rounds, {machine['cpu']}, {machine['cores']} cores, {machine['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
