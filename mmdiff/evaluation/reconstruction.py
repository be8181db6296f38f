"""Metrics of a tokenizer: what it gives back of held-out images, and how it uses its codes.

    psnr          10 log10(255^2 / mean squared error), dB, of each image; an exact copy counts as 68 dB, an error of 0.1 levels
    ssim          structural similarity in Gaussian windows of 11 pixels (as wide as smaller images), mean over channels
    code_use      bits_nominal = most codes of an image * log2 of how many there are; codes_used: share of them that occur;
                  code_bits, bits_per_image: their entropy, as often as each occurs in these images

Source of ssim: Wang et al., IEEE TIP 13(4), 2004, by dm-pix.
"""

import dm_pix
import jax.numpy as jnp
import numpy as np

from mmdiff.evaluation.task import Task, mean
from mmdiff.tokenizers import codebook

EXACT = 0.01  # mean squared error, in levels, below which an image counts as an exact copy
WINDOW = 11


def psnr(task: Task) -> dict[str, float]:
    """`psnr`."""
    return mean("psnr", [peak_ratio(d.image.pixels, made) for d, made in zip(task.wanted, task.generated, strict=True)])


def peak_ratio(real: np.ndarray, made: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two images uint8, dB."""
    error = np.square(real.astype(np.float64) - made).mean()
    return float(10 * np.log10(255**2 / max(error, EXACT)))


def ssim(task: Task) -> dict[str, float]:
    """`ssim`."""
    return mean("ssim", [similarity(d.image.pixels, made) for d, made in zip(task.wanted, task.generated, strict=True)])


def similarity(real: np.ndarray, made: np.ndarray) -> float:
    """Structural similarity of two images uint8 [h, w, 3]."""
    one, two = (np.asarray(pixels, np.float32) / 255 for pixels in (real, made))
    return float(dm_pix.ssim(one, two, filter_size=min(WINDOW, *real.shape[:2])))


def code_use(task: Task) -> dict[str, float]:
    """`bits_nominal`, `codes_used`, `code_bits`, `bits_per_image`; of a continuous tokenizer nothing."""
    tokenizer = task.model
    if not tokenizer.codes:
        return {}
    ids = tokenizer.encode([drawing.image.pixels for drawing in task.wanted])
    counts = codebook.counts(jnp.asarray(np.concatenate(ids)), tokenizer.codes)
    bits = float(codebook.entropy_bits(counts))
    return {
        "bits_nominal": tokenizer.bits,
        "codes_used": float(codebook.usage(counts)),
        "code_bits": bits,
        "bits_per_image": bits * float(np.mean([len(row) for row in ids])),
    }
