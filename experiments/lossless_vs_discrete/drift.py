"""E9: what is left of an image after being encoded and decoded again and again, as in a chain of edits.

    python experiments/lossless_vs_discrete/drift.py --tokenizers runs/tokenizers/vq runs/tokenizers/continuous --images shapes

After k rounds: PSNR against the original, and the share of codes that differ from those of the round before. Raw patches do not
change at all (68 dB here, an exact copy). With --into FILE.json, what is found goes there too, beside what it holds of other
tokenizers and other images.

Claim: most of the loss happens in the first round, and it goes on: PSNR after 20 rounds is below that after one. It would be
wrong for a tokenizer whose PSNR after 20 rounds is within 0.1 dB of that after the first.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from images import held_out

import mmdiff
from mmdiff.evaluation.reconstruction import peak_ratio

ROUNDS = 20
SHOWN = (1, 2, 5, 10, 20)


def drift(tokenizer, real: list[np.ndarray], rounds: int) -> dict[str, list[float]]:
    """`psnr` after each round, and `flips`: share of codes that changed in it (of the first round: none)."""
    images, before = list(real), None
    psnr, flips = [], []
    for _ in range(rounds):
        ids = tokenizer.encode(images) if tokenizer.codes else None
        flips.append(0.0 if before is None or ids is None else flipped(before, ids))
        images, before = list(tokenizer.reconstruct(images)), ids
        psnr.append(float(np.mean([peak_ratio(r, m) for r, m in zip(real, images, strict=True)])))
    return {"psnr": psnr, "flips": flips}


def flipped(before, ids) -> float:
    """Share of codes that are others than before; where their number changed, what is left over counts as changed."""
    wrong = [len(new) - (old[: len(new)] == new[: len(old)]).sum() for old, new in zip(before, ids, strict=True)]
    return float(np.sum(wrong) / sum(map(len, ids)))


def table(found: dict[str, dict[str, dict]], rounds: int) -> str:
    shown = [k for k in SHOWN if k <= rounds]
    lines = [f"| tokenizer | images | {' | '.join(f'k = {k}' for k in shown)} |", "| --- " * (2 + len(shown)) + "|"]
    for name, by_set in found.items():
        for kind, result in by_set.items():
            cells = [f"{result['psnr'][k - 1]:.2f} dB, {result['flips'][k - 1]:.1%}" for k in shown]
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", type=Path, required=True, metavar="RUN")
    parser.add_argument("--images", nargs="+", default=["shapes"], metavar="NAME")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--into", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict]] = {}
    if arguments.into and arguments.into.is_file():
        found = json.loads(arguments.into.read_text())
    for path in arguments.tokenizers:
        tokenizer = mmdiff.load_tokenizer(path)
        sets = {name: held_out(name, tokenizer.size, arguments.count) for name in arguments.images}
        found.setdefault(path.name, {}).update({name: drift(tokenizer, real, arguments.rounds) for name, real in sets.items()})
    if arguments.into:
        arguments.into.write_text(json.dumps(found))
    print(table(found, arguments.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
