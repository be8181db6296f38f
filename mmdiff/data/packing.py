"""Packing plans: which documents stand in which row, decided from lengths alone.

Best fit with shuffled ties: a row takes the longest document left, then again and again the longest that still fits.
On lengths that vary at all this fills rows to within a few per cent. Documents are never split.

Only the number of documents of each length matters for the shape of a plan, so rows of equal lengths are planned
together: a plan costs about as much as a shuffle.
"""

import numpy as np


def row_patterns(lengths: np.ndarray, row_length: int) -> list[tuple[list[tuple[int, int]], int]]:
    """The rows of a plan, up to which of the documents of equal length stands where.

    Returns:
      a list of (row, repeat): a row is a list of (length, number of documents of that length).
    """
    counts = np.bincount(lengths)
    sizes = [size for size in np.flatnonzero(counts)[::-1].tolist() if size]
    left = {size: int(counts[size]) for size in sizes}
    patterns = []
    while sizes:
        row, room = [], row_length
        for size in sizes:  # longest first
            taken = min(room // size, left[size])
            if taken:
                row.append((size, taken))
                room -= taken * size
            if room < sizes[-1]:
                break
        repeat = min(left[size] // taken for size, taken in row)
        for size, taken in row:
            left[size] -= taken * repeat
        sizes = [size for size in sizes if left[size]]
        patterns.append((row, repeat))
    return patterns


def row_count(lengths: np.ndarray, row_length: int) -> int:
    """Number of rows that `pack_plan` will make."""
    return sum(repeat for _, repeat in row_patterns(lengths, row_length))


def pack_plan(lengths: np.ndarray, row_length: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Partition documents into rows.

    Args:
      lengths: int [documents], each at most `row_length`; what has no length stands in no row.
      rng: decides the order among documents of equal length, and the order of the rows and within them.
    Returns:
      arrays of document numbers, one per row, each with total length at most `row_length`.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]  # by length, ties shuffled
    ends = np.cumsum(np.bincount(lengths)).tolist()
    rows: list[np.ndarray] = []
    for pattern, repeat in row_patterns(lengths, row_length):
        columns = []
        for size, taken in pattern:
            stop = ends[size]
            ends[size] = stop - taken * repeat
            columns.append(order[ends[size] : stop].reshape(repeat, taken))
        rows.extend(rng.permuted(np.concatenate(columns, axis=1), axis=1))
    return [rows[i] for i in rng.permutation(len(rows))]


def waste(lengths: np.ndarray, rows: int, row_length: int) -> float:
    """Fraction of positions of `rows` rows that hold padding."""
    return 1.0 - float(lengths.sum()) / (rows * row_length) if rows else 0.0
