"""Set distances against closed forms and against loops that spell out their definitions."""

import numpy as np
import pytest
import scipy.linalg

from mmdiff.evaluation import distances
from mmdiff.evaluation.distances import Moments, density_coverage, frechet, kid, moments, nearest_ratio, precision_recall


def normal(seed, count, width=4, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((count, width))


def covariance(seed, width):
    a = normal(seed, 2 * width, width)
    return a.T @ a / (2 * width)


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    """|mu_x - mu_y|^2 + sum (sqrt c_x - sqrt c_y)^2 for diagonal covariances."""
    rng = np.random.default_rng(0)
    mean, other = rng.standard_normal((2, 6))
    c, d = rng.uniform(0.1, 3, (2, 6))
    want = np.sum((mean - other) ** 2) + np.sum((np.sqrt(c) - np.sqrt(d)) ** 2)
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    found = frechet(Moments(turn @ mean, turn @ np.diag(c) @ turn.T), Moments(turn @ other, turn @ np.diag(d) @ turn.T))
    assert found == pytest.approx(want, rel=1e-12)


def test_frechet_of_any_gaussians_is_that_of_the_matrix_square_root():
    x, y = (Moments(normal(s, 1, 7)[0], covariance(s, 7)) for s in (1, 2))
    root = np.trace(scipy.linalg.sqrtm(x.covariance @ y.covariance)).real
    want = np.sum((x.mean - y.mean) ** 2) + np.trace(x.covariance + y.covariance) - 2 * root
    assert frechet(x, y) == pytest.approx(want, rel=1e-10)
    assert frechet(y, x) == pytest.approx(want, rel=1e-10)
    entrywise = np.trace(np.sqrt(np.abs(x.covariance @ y.covariance)))  # a common mistake
    assert abs(root - entrywise) > 0.1


def test_frechet_of_a_set_with_itself_is_nothing_even_where_its_covariance_is_singular():
    few = moments(normal(0, 5, 12))
    assert frechet(few, few) == pytest.approx(0.0, abs=1e-5)
    assert frechet(few, moments(normal(0, 5, 12) + 0.5)) == pytest.approx(12 * 0.25, abs=1e-5)


def test_moments_are_unbiased_and_need_two_samples():
    x = normal(3, 9, 2).astype(np.float32)
    found = moments(x)
    loop = sum(np.outer(row, row) for row in (x - x.mean(0)).astype(np.float64)) / (len(x) - 1)
    np.testing.assert_allclose(found.covariance, loop, rtol=1e-5)
    assert found.covariance.dtype == np.float64
    assert not np.allclose(found.covariance, loop * (len(x) - 1) / len(x), rtol=1e-3)  # the biased one
    with pytest.raises(ValueError, match="at least 2"):
        moments(x[:1])


def test_mmd_is_its_double_sum():
    x, y = normal(0, 6, 3), normal(1, 5, 3, shift=0.5)
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    within = lambda s: np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert distances.unbiased_mmd(x, y) == pytest.approx(within(x) + within(y) - 2 * across, rel=1e-12)


def test_kid_is_unbiased_at_zero_and_sees_a_shift():
    draws = np.random.default_rng(0).standard_normal((2000, 2, 30, 4))
    same = [distances.unbiased_mmd(x, y) for x, y in draws]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 3 * error
    diagonal = np.mean((np.sum(draws**2, -1) / 4 + 1) ** 3)
    assert 2 * diagonal / 30 > 10 * error  # what leaving the diagonal in would add
    found = kid(normal(0, 400), normal(1, 400, shift=0.3))
    assert found.value > 5 * kid(normal(0, 400), normal(1, 400)).spread > 0
    assert kid(normal(0, 400), normal(1, 400, shift=0.3)) == found  # the seed is fixed
    with pytest.raises(ValueError, match="at least 4"):
        kid(normal(0, 3), normal(1, 9))


def balls(x, k):
    return [np.sort([np.linalg.norm(a - b) for j, b in enumerate(x) if j != i])[k - 1] for i, a in enumerate(x)]


@pytest.mark.parametrize("chunk", [7, 2**24])
def test_neighbourhood_metrics_are_their_definitions(monkeypatch, chunk):
    monkeypatch.setattr(distances, "CHUNK", chunk)
    x, y = normal(0, 40, 3), normal(1, 30, 3, shift=0.8, scale=0.7)
    near = lambda a, b, r: np.linalg.norm(a - b) <= r
    r3, s3, r5 = balls(x, 3), balls(y, 3), balls(x, 5)
    precision = np.mean([any(near(b, a, r) for a, r in zip(x, r3, strict=True)) for b in y])
    recall = np.mean([any(near(a, b, r) for b, r in zip(y, s3, strict=True)) for a in x])
    inside = np.array([[near(a, b, r) for b in y] for a, r in zip(x, r5, strict=True)])
    assert precision_recall(x, y) == (pytest.approx(precision), pytest.approx(recall))
    assert density_coverage(x, y) == (pytest.approx(inside.sum() / (5 * 30)), pytest.approx(inside.any(1).mean()))
    assert precision != recall and precision_recall(y, x) == (pytest.approx(recall), pytest.approx(precision))


def test_copies_are_precise_dropped_modes_are_not_recalled_and_far_images_are_neither():
    x = np.concatenate([normal(0, 50), normal(1, 50, shift=20)])
    assert precision_recall(x, x.copy()) == (1, 1)
    assert density_coverage(x, x.copy()).coverage == 1
    one_mode = normal(2, 100)
    found = precision_recall(x, one_mode)
    assert found.precision > 0.8 and found.recall < 0.55
    assert density_coverage(x, one_mode).coverage < 0.55
    assert precision_recall(x, normal(3, 100, shift=-30)) == (0, 0)
    assert density_coverage(x, normal(3, 100, shift=-30)) == (0, 0)


def test_duplicates_are_neighbours_of_one_another():
    x = np.repeat(normal(0, 5), 2, axis=0)
    assert distances.neighbour_distances(x, 1).max() < 1e-6 < distances.neighbour_distances(x, 2).min()


@pytest.mark.parametrize("metric, least", [(precision_recall, 4), (density_coverage, 6)])
def test_too_few_samples_are_refused(metric, least):
    metric(normal(0, least), normal(1, least))
    with pytest.raises(ValueError, match=f"at least {least} samples, got {least - 1}"):
        metric(normal(0, least - 1), normal(1, least))


def test_nearest_ratio_tells_copies_from_fresh_images():
    train, held_out = normal(0, 300, 8), normal(1, 100, 8)
    fresh = nearest_ratio(normal(2, 100, 8), held_out, train)
    assert fresh.ratio == pytest.approx(1, abs=0.1) and fresh.closest == pytest.approx(1, abs=0.25)
    assert nearest_ratio(train[:100], held_out, train) == (0, 0)
    tenth = nearest_ratio(np.concatenate([train[:10], normal(2, 90, 8)]), held_out, train)
    assert tenth.ratio > 0.8 and tenth.closest < 1e-4
    assert nearest_ratio(normal(2, 100, 8, shift=3), held_out, train).ratio > 2
    assert np.isnan(nearest_ratio(held_out, train[:5], train).ratio)


def test_distances_survive_a_large_common_offset():
    x, y = normal(0, 10), normal(1, 12)
    want = [min(np.linalg.norm(a - b) for b in y) for a in x]
    np.testing.assert_allclose(distances.nearest_distances(x + 1e6, y + 1e6), want, rtol=1e-6)
