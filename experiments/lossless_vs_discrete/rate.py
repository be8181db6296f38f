"""E1 and E3: bits and what they buy. Tokenizers beside PNG, WebP and JPEG, on the same held-out images.

    python experiments/lossless_vs_discrete/rate.py --tokenizers runs/tokenizers/vq runs/tokenizers/fsq \\
        --priors runs/systems/vq_ar --pixels runs/systems/pixels --images shapes words documents=data/faces_32

Bits of an image are counted in three ways: nominal (of each code log2 of how many there are), by the entropy of single codes,
and, given a model of `layout.images="next_code"` on that tokenizer, by what the model finds unlikely about all codes of an
image without a text (an upper bound on their entropy, and what a lossless coder would need). PNG and WebP are lossless, and so
would be a coder with a model of next pixels (--pixels): raw patches carry that much. JPEG and lossy WebP are anchors: their
files hold a header of some hundred bytes, which counts for much in images of this size and is given apart.

With --into FILE.json, what is found goes there too, beside what it holds of other tokenizers and other images.

Claims: (1) prior < entropy < nominal << lossless; (2) on images unlike those it was trained on, a tokenizer gives back less
than JPEG does with as many bits, without its header. (1) would be wrong if any of the orders did not hold; (2) if a tokenizer's
PSNR on such images were above the JPEG curve at its entropy.
"""

import argparse
import io
import json
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
from images import held_out

import mmdiff
from mmdiff.document import Document, Image
from mmdiff.evaluation.reconstruction import peak_ratio, similarity
from mmdiff.tokenizers import codebook

QUALITIES = (5, 10, 20, 40, 60, 80, 95)
CODECS = {"JPEG": {"format": "JPEG"}, "WebP": {"format": "WEBP", "method": 6}}
LOSSLESS = {"PNG": {"format": "PNG", "optimize": True}, "WebP lossless": {"format": "WEBP", "lossless": True, "method": 6}}


def encoded(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


def header_bits(size: tuple[int, int], **options) -> int:
    """Of a file of this kind and size that says next to nothing: one of a single grey."""
    return 8 * len(encoded(np.full((*size, 3), 128, np.uint8), **options))


def fidelity(real: list[np.ndarray], made: list[np.ndarray]) -> dict[str, float]:
    return {
        "psnr": float(np.mean([peak_ratio(r, m) for r, m in zip(real, made, strict=True)])),
        "ssim": float(np.mean([similarity(r, m) for r, m in zip(real, made, strict=True)])),
    }


def by_codecs(real: list[np.ndarray]) -> list[dict]:
    size = real[0].shape[:2]
    rows = []
    for name, options in LOSSLESS.items():
        bits = float(np.mean([8 * len(encoded(image, **options)) for image in real]))
        rows.append({"name": name, "bits": bits, "header": header_bits(size, **options), "psnr": math.inf, "ssim": 1.0})
    for name, options in CODECS.items():
        for quality in QUALITIES:
            files = [encoded(image, quality=quality, **options) for image in real]
            made = [np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
            header = header_bits(size, quality=quality, **options)
            bits = float(np.mean([8 * len(file) for file in files]))
            rows.append({"name": f"{name} {quality}", "bits": bits, "header": header} | fidelity(real, made))
    return rows


def by_tokenizer(tokenizer, real: list[np.ndarray], prior) -> dict:
    """One row; `prior`: a model on its codes, or None."""
    row = fidelity(real, list(tokenizer.reconstruct(real)))
    if not tokenizer.codes:
        return row
    codes = np.concatenate(tokenizer.encode(real))
    row["nominal"] = tokenizer.bits * len(codes) / len(real) / math.prod(tokenizer.grid)  # images may have fewer codes
    row["entropy"] = float(codebook.entropy_bits(codebook.counts(jnp.asarray(codes), tokenizer.codes))) * len(codes) / len(real)
    row["used"] = float((np.bincount(codes, minlength=tokenizer.codes) > 0).mean())
    if prior is not None:
        row["prior"] = float(
            np.mean([told["image_code_bits"] for told in prior.score([Document(Image(image)) for image in real])])
        )
    return row


def lines(name: str, codecs: list[dict], tokenizers: list[dict]) -> str:
    head = "| | bits: nominal | entropy of codes | prior | codes used | PSNR | SSIM |"
    out = [f"**{name}**", "", head, "| --- | --- | --- | --- | --- | --- | --- |"]
    shown = lambda row, key, form: format(row[key], form) if key in row else ""
    for row in tokenizers:
        bits = " | ".join(shown(row, key, ".0f") for key in ("nominal", "entropy", "prior"))
        out.append(f"| {row['name']} | {bits} | {shown(row, 'used', '.0%')} | {row['psnr']:.2f} | {row['ssim']:.3f} |")
    for row in codecs:
        told = f"{row['bits']:.0f}, of these {row['header']} header"
        out.append(f"| {row['name']} | {told} | | | | {row['psnr']:.2f} | {row['ssim']:.3f} |")
    return "\n".join(out)


def joined(before: dict, found: dict) -> dict:
    """Rows of `found` in the place of those of `before` that bear the same names, or behind them."""
    parts = ("codecs", "tokenizers")
    by_name = {
        name: {part: {row["name"]: row for of in (before, found) for row in of.get(name, {}).get(part, [])} for part in parts}
        for name in before | found
    }
    return {name: {part: list(rows.values()) for part, rows in of.items()} for name, of in by_name.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", type=Path, required=True, metavar="RUN")
    parser.add_argument("--priors", nargs="*", type=Path, default=[], metavar="RUN", help="models of next codes on one of them")
    parser.add_argument("--pixels", type=Path, metavar="RUN", help="a model of next pixels")
    parser.add_argument("--images", nargs="+", default=["shapes", "words"], metavar="NAME")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--into", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    before = json.loads(arguments.into.read_text()) if arguments.into and arguments.into.is_file() else {}
    tokenizers = {path: mmdiff.load_tokenizer(path) for path in arguments.tokenizers}
    priors = [mmdiff.load(path) for path in arguments.priors]
    pixels = mmdiff.load(arguments.pixels) if arguments.pixels else None
    found = {}
    for name in arguments.images:
        rows = []
        for path, tokenizer in tokenizers.items():
            real = held_out(name, tokenizer.size, arguments.count)
            on_it = [p for p in priors if p.tokenizer is not None and p.tokenizer.fingerprint == tokenizer.fingerprint]
            rows.append({"name": path.name} | by_tokenizer(tokenizer, real, on_it[0] if on_it else None))
        found[name] = {"codecs": by_codecs(real), "tokenizers": rows}
        if pixels is not None:
            told = [each["image_bits_per_dim"] for each in pixels.score([Document(Image(image)) for image in real])]
            row = {"name": "next pixels", "bits": float(np.mean(told)) * real[0].size, "header": 0}
            found[name]["codecs"].insert(0, row | {"psnr": math.inf, "ssim": 1.0})
    found = joined(before, found)
    if arguments.into:
        arguments.into.write_text(json.dumps(found))
    print("\n\n".join(lines(name, **parts) for name, parts in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
