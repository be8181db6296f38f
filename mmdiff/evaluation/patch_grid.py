"""Whether generated images show the grid of their patches.

    g(images) = mean |difference of neighbours in two patches| / mean |difference of neighbours in one patch|

over both directions and all channels. Patches that do not fit together at their edges raise g; the data itself has some
g too (about 1, unless it is aligned with the grid), so generated images are compared with real ones.
"""

from collections.abc import Sequence

import numpy as np

from mmdiff.document import DataError
from mmdiff.evaluation.task import Task


def patch_grid_ratio(task: Task) -> dict[str, float]:
    """`patch_grid_ratio`: g of generated images / g of the real ones; `patch_grid_ratio_real`: g of the real ones."""
    wanted = task.wanted
    if not wanted:
        raise DataError("patch_grid_ratio: the held-out data has no image that is drawn.")
    patch = task.model.cfg.model.patch
    real = gradient_ratio([d.image.pixels for d in wanted], patch)
    drawn = gradient_ratio(task.generated, patch)
    return {"patch_grid_ratio": drawn / real if real else float("nan"), "patch_grid_ratio_real": real}


def gradient_ratio(images: Sequence[np.ndarray], patch: int) -> float:
    """g of uint8 images [h, w, 3] on a grid of square patches; NaN where there is no boundary or nothing but them."""
    sums, counts = np.zeros(2), np.zeros(2)
    for pixels in images:
        for axis in (0, 1):
            steps = np.abs(np.diff(pixels.astype(np.float64), axis=axis)).mean(axis=(1 - axis, 2))
            across = (np.arange(len(steps)) + 1) % patch == 0
            for kind, chosen in enumerate((~across, across)):
                sums[kind] += steps[chosen].sum() * pixels.shape[1 - axis]
                counts[kind] += chosen.sum() * pixels.shape[1 - axis]
    inside, across = sums / np.where(counts > 0, counts, np.nan)
    return float(across / inside) if inside > 0 else float("nan")
