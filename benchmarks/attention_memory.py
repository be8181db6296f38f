"""Memory and arithmetic of attention over long rows: `dense` beside `blockwise`, forward and backward, compiled.

For one row of T positions, packed with documents of text and images as training sees them:

    memory       temporaries of the compiled program, in bytes: what it needs beside its inputs and results
    arithmetic   multiplications and additions of the matrix products; blockwise computes the tiles that its mask needs
    difference   largest difference of the result and of its gradients, relative to the largest number of each

Nothing is timed. Where all scores of a row no longer fit (16k), dense is compiled, but not run.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mmdiff import config
from mmdiff.data.vocabulary import Vocabulary
from mmdiff.layout import ImagePiece, IntervalMask, Piece, TextPiece, lay_out, pack, plan_images
from mmdiff.nn.attention import KeyValue, attention
from mmdiff.nn.attention_blockwise import BLOCK
from mmdiff.nn.attention_tiled import needed_tiles

LENGTHS = 1024, 4096, 16384
LONGEST_RUN = 4096
SHAPES = {"4 heads of 64": (4, 64, 64), "gated unit, 1024 values": (1, 128, 1024)}  # heads, width, values
GRID = 16  # patches along a side of an image
EXAMPLES = """examples:
  python benchmarks/attention_memory.py                      a table
  python benchmarks/attention_memory.py --json               one JSON object
  python benchmarks/attention_memory.py --lengths 1024 2048  shorter rows
"""


def packed_mask(length: int, seed: int) -> IntervalMask:
    """A row of documents, each up to half as long as the row: texts of 20 to 200 tokens, two in three with an image."""
    rng, layout, vocabulary = np.random.default_rng(seed), config.Layout(row_length=length), Vocabulary(None)
    rows, left = [], length
    while True:
        pieces: list[Piece] = []
        for _ in range(rng.integers(1, max(2, length // 800))):
            pieces.append(TextPiece(np.zeros(rng.integers(20, 200), np.int32)))
            if rng.random() < 2 / 3:
                pieces.append(ImagePiece(None, GRID, GRID))
        row, _ = lay_out(pieces, plan_images(pieces, layout, True), vocabulary, layout, patch_values=0)
        if len(row.tokens) > left:
            return IntervalMask(*(jnp.asarray(m)[None] for m in pack(rows, length).mask))
        rows.append(row)
        left -= len(row.tokens)


def compiled(impl: str, arrays, mask: IntervalMask):
    """(out, dq, dk, dv) of `arrays` = q, k, v and a gradient."""

    def run(q, k, v, g, mask):
        out, transpose = jax.vjp(
            lambda q, k, v: attention(q, [KeyValue(k, v)], mask, scale=q.shape[-1] ** -0.5, impl=impl), q, k, v
        )
        return out, *transpose(g)

    return jax.jit(run).lower(*arrays, mask).compile()


def measure(name: str, length: int, seed: int) -> dict:
    heads, width, values = SHAPES[name]
    mask = packed_mask(length, seed)
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((1, heads, length, w), np.float32) for w in (width, width, values, values)]
    programs = {impl: compiled(impl, arrays, mask) for impl in ("dense", "blockwise")}
    tiles = int(needed_tiles(mask, length, (BLOCK, BLOCK)).sum())
    # pairs of positions times products per pair: dense 2 + 4 of them, blockwise computes the scores again
    operations = {
        "dense": 2 * heads * length**2 * 3 * (width + values),
        "blockwise": 2 * heads * tiles * BLOCK**2 * (4 * width + 3 * values),
    }
    memory = {impl: program.memory_analysis().temp_size_in_bytes for impl, program in programs.items()}
    difference = None
    if length <= LONGEST_RUN:
        pairs = zip(*(program(*arrays, mask) for program in programs.values()), strict=True)
        difference = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs)
    return {
        "shape": name,
        "length": length,
        "dense_bytes": memory["dense"],
        "blockwise_bytes": memory["blockwise"],
        "dense_over_blockwise_memory": memory["dense"] / memory["blockwise"],
        "allowed_pairs_of_all": float(mask.dense(length).mean()),
        "visited_tiles_of_all": tiles * BLOCK**2 / length**2,
        "dense_operations": operations["dense"],
        "blockwise_operations": operations["blockwise"],
        "dense_over_blockwise_operations": operations["dense"] / operations["blockwise"],
        "largest_relative_difference": difference,
    }


def table(results: list[dict]) -> str:
    lines = [
        "shape                         T   dense MiB   blockwise MiB   ratio   tiles   dense GFLOP   blockwise   difference"
    ]
    for r in results:
        difference = "not run" if r["largest_relative_difference"] is None else f"{r['largest_relative_difference']:.1e}"
        lines.append(
            f"{r['shape']:24}{r['length']:7}{r['dense_bytes'] / 2**20:12.1f}{r['blockwise_bytes'] / 2**20:16.1f}"
            f"{r['dense_over_blockwise_memory']:8.1f}{r['visited_tiles_of_all']:8.0%}{r['dense_operations'] / 1e9:14.1f}"
            f"{r['blockwise_operations'] / 1e9:12.1f}{difference:>13}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="positions of a row (default 1024 4096 16384)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    results = [measure(name, length, arguments.seed) for name in SHAPES for length in arguments.lengths]
    print(json.dumps({"block": BLOCK, "results": results}) if arguments.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
