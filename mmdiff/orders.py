"""In which order an image's positions follow each other where each is predicted from those before it (layout.order).

    raster    row by row                            snake     row by row, every other one backwards
    spiral    round the edge, then inwards          centre    by distance from the middle
    hilbert   along a curve that stays close        random    shuffled, one way for all images of a size

Source of the comparison: Esser et al., arXiv 2012.09841, appendix on the ordering of image representations.
"""

import functools
from typing import Literal

import numpy as np

Order = Literal["raster", "snake", "spiral", "centre", "hilbert", "random"]


@functools.lru_cache
def image_order(order: Order, rows: int, cols: int) -> np.ndarray:
    """Raster numbers of an image's cells, in `order`: int32 [rows * cols], each once."""
    raster = np.arange(rows * cols).reshape(rows, cols)
    row, col = np.divmod(raster.reshape(-1), cols)
    match order:
        case "raster":
            found = raster.reshape(-1)
        case "snake":
            found = np.where(np.arange(rows)[:, None] % 2, raster[:, ::-1], raster).reshape(-1)
        case "spiral":
            found = _spiral(raster)
        case "centre":
            away = np.square(row - (rows - 1) / 2) + np.square(col - (cols - 1) / 2)
            found = np.argsort(away, kind="stable")
        case "hilbert":
            found = np.argsort(_along_curve(row, col, max(rows, cols)), kind="stable")
        case "random":
            found = np.random.default_rng([rows, cols]).permutation(rows * cols)
    found = found.astype(np.int32)
    found.flags.writeable = False  # one array for all callers
    return found


def _spiral(rest: np.ndarray) -> np.ndarray:
    """The upper edge, then the same of what remains, turned so that its next edge is on top."""
    parts = []
    while rest.size:
        parts.append(rest[0])
        rest = np.rot90(rest[1:])
    return np.concatenate(parts)


def _along_curve(row: np.ndarray, col: np.ndarray, side: int) -> np.ndarray:
    """Places of cells on Hilbert's curve through the smallest square of a power of two that holds the image.

    From the largest quadrants down: which of the four a cell is in, then its coordinates as that quadrant's curve runs.
    """
    place, x, y = np.zeros(len(row), int), col.copy(), row.copy()
    half = (1 << (side - 1).bit_length()) // 2
    while half:
        right, low = x >= half, y >= half
        place += half * half * np.where(right, np.where(low, 2, 3), np.where(low, 1, 0))
        x, y = x - half * right, y - half * low
        turned = right & ~low  # the last quadrant runs the other way
        x, y = np.where(turned, half - 1 - x, x), np.where(turned, half - 1 - y, y)
        x, y = np.where(low, x, y), np.where(low, y, x)
        half //= 2
    return place
