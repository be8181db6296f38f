"""How fast training data are read, and whether a training step ever waits for them.

Two sets of photograph-like images with captions are written by `mmdiff prepare`, as JPEG files in ArrayRecord shards:

    decode     documents of one 256x256 JPEG, patches of 16, rows of 4096 positions: rows and images per second of one core,
               nothing cached (the first epoch of a large set)
    prefetch   documents of one 64x64 JPEG, patches of 8, 8 rows of 240 positions a step: the share of the time that a loop
               with steps of 100 ms waits for its next batch

The image content is noise smoothed until its JPEG is as large as a photograph's (about 1.5 bits per pixel).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
from scipy.ndimage import gaussian_filter

from mmdiff import config
from mmdiff.data import batches as batches_module
from mmdiff.data.batches import Batches
from mmdiff.data.prepare import prepare
from mmdiff.data.sources import open_source, open_vocabulary

STEP = 0.1  # seconds
EXAMPLES = """examples:
  python benchmarks/input_rate.py           a table
  python benchmarks/input_rate.py --json    one JSON object
"""


def write_images(folder: Path, count: int, side: int, seed: int) -> float:
    """An ImageFolder of captioned JPEG files; returns their mean size in bits per pixel."""
    random, lines, size = np.random.default_rng(seed), [], 0
    for number in range(count):
        coarse = gaussian_filter(random.normal(size=(side, side, 3)), (side / 16, side / 16, 0))
        fine = gaussian_filter(random.normal(size=(side, side, 3)), (1, 1, 0))
        pixels = 128 + 60 * coarse / coarse.std() + 18 * fine / fine.std()
        name = f"{number:05d}.jpg"
        PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name, quality=85)
        size += (folder / name).stat().st_size
        words = " ".join(f"word{w}" for w in random.integers(0, 50, 12))
        lines.append(json.dumps({"file_name": name, "text": words}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return 8 * size / count / side**2


def batches_of(folder: Path, patch: int, row_length: int, batch_size: int) -> Batches:
    cfg = config.Config(
        model=config.Model(width=max(256, 3 * patch**2), patch=patch),
        layout=config.Layout(row_length=row_length),
        data=config.Data(source="documents", path=str(folder)),
        training=config.Training(batch_size=batch_size),
    )
    source = open_source(cfg, "train")
    return Batches(source, open_vocabulary(cfg, source), cfg)


def decode_rate(folder: Path, images: int) -> dict[str, float]:
    """One thread, every image decoded anew."""
    batches_module.CACHE_BYTES = 0
    batches = batches_of(folder, patch=16, row_length=4096, batch_size=1)
    count = batches.rows_per_epoch()
    batches.row(0)
    begin, processor = time.perf_counter(), time.process_time()
    for number in range(count):
        batches.row(number)
    seconds, used = time.perf_counter() - begin, time.process_time() - processor
    return {
        "rows": count,
        "rows_per_second_per_core": count / seconds,
        "images_per_second_per_core": images / seconds,
        "cores_used": used / seconds,
    }


def waiting(folder: Path, steps: int) -> dict[str, float]:
    """A loop whose steps take 100 ms and use no core, as on an accelerator."""
    batches_module.CACHE_BYTES = 0
    batches = batches_of(folder, patch=8, row_length=240, batch_size=8)
    waited, stream = [], batches.iterate(0, steps)
    for _ in range(steps):
        begin = time.perf_counter()
        next(stream)
        waited.append(time.perf_counter() - begin)
        time.sleep(STEP)
    return {
        "first_batch_seconds": waited[0],
        "waited_share": sum(waited[1:]) / (sum(waited[1:]) + STEP * (steps - 1)),
        "longest_wait_seconds": max(waited[1:]),
    }


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--images", type=int, default=400, help="images of each set (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the loop that waits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report: dict = {"images": options.images, "cores": os.cpu_count(), "seed": options.seed}
        folders = {}
        for side in (256, 64):
            raw, out = Path(name) / f"raw{side}", Path(name) / f"prepared{side}"
            raw.mkdir()
            report[f"bits_per_pixel_{side}"] = write_images(raw, options.images, side, options.seed)
            prepare(raw, out)
            folders[side] = out
        report["decode"] = decode_rate(folders[256], options.images)
        report["prefetch"] = waiting(folders[64], options.steps)
    if options.json:
        print(json.dumps(report))
        return 0
    decode, prefetch = report["decode"], report["prefetch"]
    print(f"256x256 JPEG documents ({report['bits_per_pixel_256']:.2f} bits per pixel) in rows of 4096, one core, no cache:")
    print(f"  {decode['rows_per_second_per_core']:.1f} rows/s, {decode['images_per_second_per_core']:.0f} images/s")
    print(f"64x64 JPEG documents, 8 rows of 240 a step, steps of {1000 * STEP:.0f} ms, {report['cores']} cores:")
    print(
        f"  waits {100 * prefetch['waited_share']:.2f}% of the time, {1000 * prefetch['longest_wait_seconds']:.1f} ms at most, "
        f"{prefetch['first_batch_seconds']:.2f} s for the first batch"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
