"""BAQ's closed form against a general solver, its rounding against enumeration."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy.optimize import minimize

from qcompiler.solvers.baq import (
    allocate_bits,
    container_bits,
    equal_loss_bits,
    integer_bits,
    level_bits,
    level_counts,
    mean_bits,
)
from qcompiler.solvers.problem import InfeasibleProblem


def instance(rng: np.random.Generator, groups: int, equal: bool = False) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.full(groups, 64.0) if equal else rng.integers(1, 200, groups).astype(float)
    return np.exp(rng.normal(0, 2, groups)) * sizes, sizes


def loss(c: np.ndarray, bits: np.ndarray, slope: float = 2.0) -> float:
    return float((c * 2.0 ** (-slope * bits)).sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slope", [2.0, 1.5])
def test_closed_form_is_the_convex_optimum(seed: int, slope: float) -> None:
    rng = np.random.default_rng(seed)
    c, n = instance(rng, 7)
    low, high = rng.uniform(0, 2, 7), rng.uniform(3, 6, 7)
    bits = equal_loss_bits(c, n, 2.9, low, high, slope)
    scale = loss(c, bits, slope)
    share = n / n.sum()
    answer = minimize(
        lambda r: loss(c, r, slope) / scale,
        np.clip(np.full(7, 2.9), low, high),
        jac=lambda r: -slope * np.log(2) * c * 2.0 ** (-slope * r) / scale,
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "ineq", "fun": lambda r: 2.9 - share @ r, "jac": lambda r: -share},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    assert answer.success
    assert answer.fun == pytest.approx(1.0, abs=1e-8)
    assert mean_bits(bits, n) == pytest.approx(2.9, abs=1e-12)


def test_loss_per_weight_is_equal_where_no_bound_holds() -> None:
    rng = np.random.default_rng(0)
    c, n = instance(rng, 500)
    bits = equal_loss_bits(c, n, 4.0, -50, 50)
    per_weight = c * 4.0**-bits / n
    assert np.ptp(per_weight) / per_weight.mean() < 1e-10
    mean = np.exp((n * np.log(c / n)).sum() / n.sum())
    np.testing.assert_allclose(bits, 4.0 + 0.5 * np.log2(c / n / mean), atol=1e-12)


def test_doubling_a_coefficient_adds_half_a_bit() -> None:
    c, n = instance(np.random.default_rng(1), 9)
    bits = equal_loss_bits(c, n, 4.0, -50, 50)
    c[3] *= 2
    more = equal_loss_bits(c, n, 4.0, -50, 50)
    others = np.delete(more - bits, 3)
    np.testing.assert_allclose((more - bits)[3] - others, 0.5, atol=1e-12)


def test_one_coefficient_gives_uniform_bits() -> None:
    n = np.array([3.0, 50, 7])
    np.testing.assert_allclose(equal_loss_bits(n * 0.7, n, 3.25, 0, 8), 3.25, atol=1e-14)
    assert integer_bits(n * 0.7, n, 3.0, 0, 8).tolist() == [3, 3, 3]


@pytest.mark.parametrize("slope", [2.0, 1.95])
def test_whole_bits_of_equal_groups_are_optimal(slope: float) -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        c, n = instance(rng, 5, equal=True)
        average = float(rng.uniform(1, 4))
        bits = integer_bits(c, n, average, 1, 4, slope)
        fitting = [np.array(b) for b in itertools.product(range(1, 5), repeat=5) if np.mean(b) <= average]
        assert loss(c, bits, slope) == pytest.approx(min(loss(c, b, slope) for b in fitting), rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_whole_bits_of_any_groups_are_within_one_step_of_the_relaxation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    c, n = instance(rng, 12)
    average = float(rng.uniform(2, 5))
    bits = integer_bits(c, n, average, 2, 8)
    gains = [(c[g] * 4.0**-b * 0.75, n[g]) for g in range(12) for b in range(2, 8)]
    relaxed, room, gain = loss(c, np.full(12, 2.0)), (average - 2) * n.sum(), 0.0
    for gain, size in sorted(gains, key=lambda item: -item[0] / item[1]):
        share = min(1.0, room / size)
        relaxed -= share * gain
        room -= share * size
        if share < 1:
            break
    assert relaxed * (1 - 1e-12) <= loss(c, bits) <= relaxed + gain


@pytest.mark.parametrize("rounding", ["none", "integer", "levels"])
def test_the_average_is_never_exceeded_and_the_bound_is_below(rounding) -> None:
    rng = np.random.default_rng(4)
    for _ in range(150):
        c, n = instance(rng, int(rng.integers(1, 9)))
        if rng.random() < 0.3:
            n = n * rng.uniform(0.1, 1)
        if rng.random() < 0.3:
            c[0] = 0.0
        average = float(rng.uniform(1, 9))
        found = allocate_bits(c, n, average, 1, 8, rounding=rounding)
        assert found.average <= average * (1 + 1e-12)
        if rounding == "integer":
            assert math.fsum(n * found.bits) <= average * math.fsum(n)
        assert found.average == pytest.approx((n * found.bits).sum() / n.sum())
        assert found.bound <= found.loss == pytest.approx(loss(c, found.bits))
        assert found.container_average >= found.average
        assert found.bits.min() >= 1
        assert found.bits.max() <= 8
        assert rounding != "none" or found.gap < 1e-12


def test_more_bits_never_lose_more() -> None:
    c, n = instance(np.random.default_rng(5), 30)
    for rounding in ("none", "integer"):
        losses = [allocate_bits(c, n, float(a), 1, 8, rounding=rounding).loss for a in np.linspace(1, 8.5, 31)]
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
        assert losses[-1] == pytest.approx(loss(c, np.full(30, 8.0)))


def test_levels_are_the_papers() -> None:
    assert level_counts([0.0, 0.3, 0.7, 1.5, 2.0, 2.2]).tolist() == [1, 1, 2, 3, 4, 5]
    bits = np.log2([1, 3, 4, 5])
    assert mean_bits(bits, [1, 1, 1, 1]) == pytest.approx(np.log2(60) / 4)
    assert container_bits(bits, [1, 1, 1, 5]) == pytest.approx((0 + 2 + 2 + 15) / 8)
    c, n = instance(np.random.default_rng(6), 400, equal=True)
    levels = 2 ** level_bits(c, n, 2.0, 0, 8)
    np.testing.assert_allclose(levels, np.rint(levels), rtol=1e-12)
    changed = np.rint(levels) != level_counts(equal_loss_bits(c, n, 2.0, 0, 8))
    assert changed.mean() < 0.3
    assert (level_bits(c, n, 2.0, 0, 8) == 0).any()


def test_levels_lie_between_the_closed_form_and_whole_bits() -> None:
    c, n = instance(np.random.default_rng(7), 300, equal=True)
    real, levels, whole = (allocate_bits(c, n, 3.0, 0, 8, rounding=r).loss for r in ("none", "levels", "integer"))
    assert real < levels < whole
    assert whole < loss(c, np.full(300, 3.0))


def test_a_million_groups() -> None:
    rng = np.random.default_rng(8)
    c, n = instance(rng, 1_000_000)
    start = time.monotonic()
    found = allocate_bits(c, n, 3.3, 0, 8)
    assert time.monotonic() - start < 10
    assert found.average <= 3.3
    assert found.average > 3.3 - 200 / n.sum()
    assert found.gap < 0.2


def test_too_small_an_average_says_the_smallest() -> None:
    with pytest.raises(InfeasibleProblem, match=r"at least 2, budget 1\.5"):
        integer_bits([1.0, 2.0], [1.0, 1.0], 1.5, 2, 4)
    assert integer_bits([1.0, 2.0], [1.0, 1.0], 2.0, 2, 4).tolist() == [2, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        ([], [], 3.0, 0, 8),
        ([1.0], [1.0, 2.0], 3.0, 0, 8),
        ([-1.0], [1.0], 3.0, 0, 8),
        ([np.nan], [1.0], 3.0, 0, 8),
        ([1.0], [0.0], 3.0, 0, 8),
        ([1.0], [1.0], np.inf, 0, 8),
        ([1.0], [1.0], 3.0, 8, 0),
        ([1.0], [1.0], 3.0, 0.5, 8),
    ],
)
def test_meaningless_arguments_are_refused(arguments) -> None:
    with pytest.raises(ValueError):
        integer_bits(*arguments)
