"""Distances between two sets of feature vectors. NumPy, float64; who makes the features is mmdiff/evaluation/features.py.

With x [n, d] features of real images and y [m, d] of generated ones, their means mu and unbiased covariances C,

    (1) frechet   = |mu_x - mu_y|^2 + tr C_x + tr C_y - 2 tr (C_x C_y)^(1/2)
        tr (C_x C_y)^(1/2) = sum of sqrt(eigenvalues of S C_y S),   S = C_x^(1/2), symmetric, so that all are real
    (2) k(a, b)   = (a.b / d + 1)^3
        kid       = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)   (unbiased MMD^2)
    (3) r_k(x_i)  = distance of x_i to its k-th nearest neighbour among the other x;  ball(x_i) = { z: |z - x_i| <= r_k(x_i) }
        precision = share of y inside any ball of x           recall   = share of x inside any ball of y        (k = 3)
    (4) density   = number of (x_i, y_j) with y_j in ball(x_i), / (k m)
        coverage  = share of the x whose ball holds any y                                                      (k = 5)
    (5) nearest   = mean_j min_t |y_j - t| / mean_i min_t |x_i - t|,   t the training images, x held-out ones

(1) is biased upwards by about 1/n and singular below n = d + 1: compare equal n only. (2) has no bias. (5) is 1 where
generated images are as far from the training images as unseen real ones are, and 0 where they are copies of them.

Sources: (1) Heusel et al. arXiv 1706.08500; (2) Binkowski et al. arXiv 1801.01401; (3) Kynkaanniemi et al. arXiv
1904.06991; (4) Naeem et al. arXiv 2002.09797; (5) in the spirit of Meehan et al. arXiv 2004.05675.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg

CHUNK = 2**24  # distances held at a time
KID_SUBSET = 1000
KID_SUBSETS = 100


class Moments(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of a set of features."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Moments of features [n, d] in float64.

    Raises:
      ValueError: fewer than two of them have no covariance.
    """
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}.")
    return Moments(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet(x: Moments, y: Moments) -> float:
    """Equation (1)."""
    root = _root(x.covariance)
    product = root @ y.covariance @ root
    values = scipy.linalg.eigvalsh((product + product.T) / 2)
    trace_of_root = np.sqrt(np.clip(values, 0, None)).sum()
    squared = np.sum((x.mean - y.mean) ** 2)
    return float(squared + np.trace(x.covariance) + np.trace(y.covariance) - 2 * trace_of_root)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance; eigenvalues that rounding made negative count as zero."""
    values, vectors = scipy.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Equation (2) on all of x [n, d] and y [m, d].

    Raises:
      ValueError: fewer than two samples of either.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"an unbiased MMD needs at least 2 samples of each set, got {len(x)} and {len(y)}.")
    kernel = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3

    def within(a):
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


class KID(NamedTuple):
    value: float
    spread: float  # standard deviation over the subsets


def kid(x: np.ndarray, y: np.ndarray, seed: int = 0) -> KID:
    """Equation (2), averaged over random subsets: 100 of 1000 samples each, or of half the samples if those are fewer.

    Raises:
      ValueError: fewer than four samples of either.
    """
    count = min(len(x), len(y))
    if count < 4:
        raise ValueError(f"KID needs at least 4 samples of each set, got {count}.")
    size, rng = min(KID_SUBSET, count // 2), np.random.default_rng(seed)
    choose = lambda a: a[rng.choice(len(a), size, replace=False)]
    values = [unbiased_mmd(choose(x), choose(y)) for _ in range(KID_SUBSETS)]
    return KID(float(np.mean(values)), float(np.std(values, ddof=1)))


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(x: np.ndarray, y: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Equation (3).

    Raises:
      ValueError: not more than k samples of either.
    """
    inside_x, inside_y = np.zeros(len(y), bool), np.zeros(len(x), bool)
    radii_x, radii_y = neighbour_distances(x, k), neighbour_distances(y, k)
    for rows, distances in _distances(x, y):
        inside_x |= (distances <= radii_x[rows, None]).any(0)
        inside_y[rows] = (distances <= radii_y).any(1)
    return PrecisionRecall(float(inside_x.mean()), float(inside_y.mean()))


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


def density_coverage(x: np.ndarray, y: np.ndarray, k: int = 5) -> DensityCoverage:
    """Equation (4).

    Raises:
      ValueError: not more than k samples of x.
    """
    radii, total, covered = neighbour_distances(x, k), 0, 0
    for rows, distances in _distances(x, y):
        inside = distances <= radii[rows, None]
        total += inside.sum()
        covered += inside.any(1).sum()
    return DensityCoverage(float(total / (k * len(y))), float(covered / len(x)))


def neighbour_distances(x: np.ndarray, k: int) -> np.ndarray:
    """r_k of equation (3) for each of x [n, d]: float64 [n].

    Raises:
      ValueError: not more than k samples.
    """
    if len(x) <= k:
        raise ValueError(f"{k} nearest neighbours need at least {k + 1} samples, got {len(x)}.")
    radii = np.empty(len(x))
    for rows, distances in _distances(x, x):
        numbers = np.arange(rows.start, rows.stop)
        distances[numbers - rows.start, numbers] = -1  # itself comes first, whatever duplicates there are
        radii[rows] = np.partition(distances, k, axis=1)[:, k]
    return radii


def nearest_distances(queries: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each of `queries` [n, d] to the nearest of `others` [m, d]: float64 [n]."""
    nearest = np.empty(len(queries), np.int64)
    for rows, distances in _distances(queries, others):
        nearest[rows] = distances.argmin(1)
    # anew from the differences: a copy is at distance 0, not at what rounding left of the squares
    return np.linalg.norm(np.asarray(queries, np.float64) - np.asarray(others, np.float64)[nearest], axis=1)


class NearestRatio(NamedTuple):
    ratio: float
    closest: float  # the same of the 5 % that lie nearest: one copy in twenty shows here and hardly in the mean


def nearest_ratio(generated: np.ndarray, held_out: np.ndarray, train: np.ndarray) -> NearestRatio:
    """Equation (5), on distances of `nearest_distances`; NaN where the held-out images are copies of training images."""
    near, far = nearest_distances(generated, train), nearest_distances(held_out, train)
    rounding = 1e-6 * np.sqrt(np.sum(np.var(np.asarray(train, np.float64), axis=0)))  # of features that are float32
    near, far = (np.where(d > rounding, d, 0.0) for d in (near, far))
    ratio = lambda a, b: float(a / b) if b > 0 else float("nan")
    return NearestRatio(ratio(near.mean(), far.mean()), ratio(np.quantile(near, 0.05), np.quantile(far, 0.05)))


def _distances(x: np.ndarray, y: np.ndarray):
    """Yields (rows, |x_i - y_j| for i in rows), a few rows at a time."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centre = y.mean(0)  # large common offsets would cancel in the squares
    x, y = x - centre, y - centre
    squares, size = (y**2).sum(1), max(1, CHUNK // max(len(y), 1))
    for start in range(0, len(x), size):
        part = x[start : start + size]
        squared = (part**2).sum(1)[:, None] + squares - 2 * part @ y.T
        yield slice(start, start + len(part)), np.sqrt(np.clip(squared, 0, None))
