from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from qcompiler.formats import parse_spec
from qcompiler.passes.transform.factors import Factors, Metric, Rounding, Search, approximate, search

ROWS, COLUMNS, RANK = 40, 24, 3
SPEC = parse_spec("int3-sym-g8-fp16")


def noise(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def moments(condition: float = 100.0) -> np.ndarray:
    x = noise(1, 400) * np.geomspace(condition, 1, COLUMNS)[None, :] @ np.linalg.qr(noise(2, COLUMNS))[0]
    return (x.T @ x / len(x)).astype(np.float32)


def least(error: np.ndarray, root: np.ndarray) -> float:
    """What the best approximation of a rank leaves of error @ root."""
    return float(np.square(np.linalg.svd(error @ root, compute_uv=False)[RANK:]).sum())


def found(error: np.ndarray, metric: Metric) -> Factors:
    factors = approximate(error, metric, RANK)
    assert factors is not None
    assert np.linalg.matrix_rank(factors.product(), tol=1e-5 * np.abs(error).max()) <= RANK
    return factors


def test_the_plain_metric_gives_the_truncated_decomposition() -> None:
    error = noise()
    left = error - found(error, Metric.plain(COLUMNS)).product()
    assert np.square(left).sum() == pytest.approx(least(error, np.eye(COLUMNS)), rel=2e-3)


def test_second_moments_give_the_least_error_of_the_output() -> None:
    error, h = noise(), moments()
    metric = Metric.inputs(h)
    values, vectors = np.linalg.eigh(h.astype(np.float64) / h.diagonal().max())
    cost = metric.cost(error - found(error, metric).product())
    assert cost == pytest.approx(least(error, vectors * np.sqrt(values)), rel=5e-3)
    assert cost < 0.9 * metric.cost(error - found(error, Metric.plain(COLUMNS)).product())


def test_slims_saliency_is_that_of_scaled_columns_and_dead_ones_do_not_break_it() -> None:
    error, magnitude = noise(), np.r_[0.0, np.geomspace(0.1, 10, COLUMNS - 1)]
    metric = Metric.slim(magnitude)
    scale = (magnitude + 0.1) / 10
    cost = metric.cost(error - found(error, metric).product())
    assert cost == pytest.approx(least(error, np.diag(scale)), rel=5e-3)
    assert np.array_equal(Metric.slim(np.zeros(4)).moments, Metric.plain(4).moments)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 1e5, 1e8])
def test_numbers_of_any_usual_size_fit_into_float16(size: float) -> None:
    error = noise() * np.float32(size)
    factors = found(error, Metric.plain(COLUMNS))
    for part in (factors.left, factors.right):
        assert np.array_equal(part, part.astype(np.float16).astype(np.float32))
    left = np.square((error - factors.product()) / size).sum()
    assert left == pytest.approx(least(noise(), np.eye(COLUMNS)), rel=1e-2)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e14])
def test_numbers_of_any_size_fit_into_8_bits_with_their_steps(size: float) -> None:
    error = noise() * np.float32(size)
    factors = approximate(error, Metric.plain(COLUMNS), RANK, bits=8)
    assert factors is not None
    assert factors.steps is not None
    codes = factors.right / factors.steps[:, None]
    for part in (factors.left, codes):
        assert np.abs(part - np.rint(part)).max() < 1e-4
        assert np.abs(part).max() == pytest.approx(127, abs=1e-4)
    left = np.square((error - factors.product()) / size).sum()
    assert left == pytest.approx(least(noise(), np.eye(COLUMNS)), rel=1e-2)


def test_what_float16_cannot_hold_and_what_is_nothing_has_no_factors() -> None:
    plain = Metric.plain(COLUMNS)
    assert approximate(noise() * np.float32(1e14), plain, RANK) is None
    assert approximate(np.zeros((ROWS, COLUMNS), np.float32), plain, RANK) is None
    assert approximate(noise(), Metric(np.zeros(COLUMNS, np.float32)), RANK) is None


def test_singular_moments_are_no_obstacle() -> None:
    x = noise(3, 2)  # two samples of 24 channels, one of them dead
    x[:, 5] = 0
    metric = Metric.inputs(np.asarray(x.T @ x / 2, np.float32))
    factors = found(noise(), metric)
    assert np.isfinite(factors.product()).all()
    assert metric.cost(noise() - factors.product()) < 1e-4 * metric.cost(noise())


@pytest.mark.parametrize("of_weight", [False, True])
def test_a_search_keeps_its_best_and_stops_at_the_first_that_is_no_better(of_weight: bool) -> None:
    matrix, rounding, metric = noise(), Rounding([(16, SPEC), (24, parse_spec("uint4-asym-g8-fp16"))]), Metric.plain(24)
    result = search(matrix, rounding, metric, RANK, Search(50, 1, of_weight=of_weight))
    assert result is not None
    factors, costs = result
    assert all(later < earlier for earlier, later in pairwise(costs[:-1]))
    assert len(costs) == 50 or not costs[-1] < costs[-2]
    rest = matrix - factors.product()
    assert metric.cost(rest - rounding.fitted(rest)(rest)) == pytest.approx(min(costs), rel=1e-3)


def test_several_rounds_with_the_same_scales_help() -> None:
    matrix, h = noise(), moments()
    metric, rounding = Metric.inputs(h), Rounding([(ROWS, SPEC)])
    once, often = (search(matrix, rounding, metric, RANK, Search(1, repeats)) for repeats in (1, 5))
    assert once is not None
    assert often is not None
    assert often[1][0] < once[1][0]


def test_control_an_error_with_a_flat_spectrum_has_little_of_low_rank() -> None:
    """Of a matrix with equal singular values a rank takes its share and no more."""
    flat = np.linalg.qr(noise(4, COLUMNS))[0].astype(np.float32)
    plain = Metric.plain(COLUMNS)
    left = plain.cost(flat - found(flat, plain).product()) / plain.cost(flat)
    assert left == pytest.approx(1 - RANK / COLUMNS, abs=0.01)
