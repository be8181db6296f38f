"""Stands for `python -m`: a trainer and an evaluator that do as the name of the configuration says, and nothing else."""

import json
import signal
import sys
import time
from pathlib import Path


def train(config: Path, workdir: Path, seed: int) -> int:
    def leave(*_):
        (workdir / "saved").write_text("")
        sys.exit(75)

    signal.signal(signal.SIGTERM, leave)
    cfg = json.loads(config.read_text())
    with (workdir / "trained").open("a") as file:
        file.write("again\n")
    name = cfg["name"]
    if name == "diverges":
        print("mmdiff train: step 7: no finite loss for 3 steps in a row", file=sys.stderr)
        return 70
    if name == "bad":
        print("mmdiff train: documents.jsonl:17: image not found", file=sys.stderr)
        return 65
    if name == "crashes":
        raise RuntimeError("out of luck")
    if name == "preempted":
        return 75
    if name == "slow" and not (workdir / "saved").exists():
        (workdir / "begun").write_text("")
        time.sleep(60)
    record = {"step": cfg["training"]["steps"], "x_error": 0.5 + 0.1 * seed, "text_bits_per_byte": 1.5}
    (workdir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return 0


def main(command: str, first: str, *rest: str) -> int:
    if command == "train":
        return train(Path(first), Path(rest[1]), int(rest[3]))
    print(json.dumps({"asked": 1.0, "image_accuracy": 0.25 if rest[:2] == ("--metrics", "image_accuracy") else None}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[2:]))  # sys.argv[1] is the module
