"""E0: is the input of a model on raw patches lossless? Pixels through its input layer and back, by the pseudo-inverse.

    python experiments/lossless_vs_discrete/input_layer.py                   fresh layers of several patches and widths
    python experiments/lossless_vs_discrete/input_layer.py --run runs/x      the layer of a trained model, on its own images

A linear map of 3 p^2 values to a width d can be undone only if d >= 3 p^2, and in bfloat16, which the layers behind it
compute in on accelerators, only with room to spare. Recovered: share of pixel values that come back exactly, from the sum of
patch, place and time features, rounded to the type. The condition number is that of the map.

Claim: at d >= 2 * 3 p^2 all of float32 and at least 95% of bfloat16 come back; below 3 p^2 nearly nothing does.
It would be wrong if a width below 3 p^2 gave back more than 15%, or one of twice that less than 100% in float32.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mmdiff
from mmdiff import config
from mmdiff.data.sources import open_source
from mmdiff.layout import patch_cells, patchify
from mmdiff.models.patches import RawPatches
from mmdiff.sampling.image import to_pixels

LAYERS = ((4, (32, 48, 96, 192)), (8, (128, 192, 256, 384, 512, 1024)), (16, (512, 768, 1024, 1536, 2048)))
TYPES = ("float32", "bfloat16")
PATCHES = 64


def recovered(layer: RawPatches, patches: np.ndarray, cells: np.ndarray, kind: str) -> float:
    """Share of the values uint8 [n, 3 p^2] that come back from the layer's output, rounded to `kind`."""
    x = jnp.asarray(patches, jnp.float32)[None] / 127.5 - 1
    embedded = layer.embed(x, jnp.zeros((1, len(patches))), jnp.asarray(cells)[None]).astype(kind).astype(jnp.float32)
    return float((np.asarray(to_pixels(layer.invert(embedded, jnp.asarray(cells)[None])))[0] == patches).mean())


def condition(layer: RawPatches) -> float:
    values = np.linalg.svd(np.asarray(layer.patch_in.kernel[...], np.float64), compute_uv=False)
    return float(values[0] / values[-1])


def fresh(seed: int) -> list[dict]:
    """Random layers on uniform random pixels: the hardest images there are."""
    rows = []
    for patch, widths in LAYERS:
        side = int(PATCHES**0.5)
        patches = np.random.default_rng(seed).integers(0, 256, (PATCHES, 3 * patch**2)).astype(np.uint8)
        for width in widths:
            layer = RawPatches(config.Model(patch=patch, width=width, lossless=False), nnx.Rngs(params=seed))
            rows.append(line(layer, patches, patch_cells(side, side), patch, width))
    return rows


def trained(run: str) -> list[dict]:
    """The layer of a run, on held-out images of its data."""
    model = mmdiff.load(run)
    cfg, source = model.cfg.model, open_source(model.cfg, "validation")
    image = next(image for i in range(len(source)) for image in source[i].images)
    layer = RawPatches(cfg, nnx.Rngs(params=0))
    nnx.update(layer, model.params["image"])
    patches = patchify(image.pixels, cfg.patch)
    cells = patch_cells(image.height // cfg.patch, image.width // cfg.patch)
    return [line(layer, patches, cells, cfg.patch, cfg.width)]


def line(layer: RawPatches, patches: np.ndarray, cells: np.ndarray, patch: int, width: int) -> dict:
    shares = {kind: recovered(layer, patches, cells, kind) for kind in TYPES}
    return {"patch": patch, "values": 3 * patch**2, "width": width} | shares | {"condition": condition(layer)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a training run on raw patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    with jax.default_matmul_precision("highest"):
        rows = trained(arguments.run) if arguments.run else fresh(arguments.seed)
    if arguments.json:
        print(json.dumps({"rows": rows, "seed": arguments.seed}))
        return 0
    print("| patch | values | width | float32 | bfloat16 | condition |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [f"{row[name]}" for name in ("patch", "values", "width")] + [f"{100 * row[kind]:.2f}%" for kind in TYPES]
        print(f"| {' | '.join(cells)} | {row['condition']:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
