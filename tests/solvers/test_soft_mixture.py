"""The gradient over mixtures against optima known by enumeration or proven by the integer program."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.solvers.certificate import check
from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.measured import Measured
from qcompiler.solvers.problem import InfeasibleProblem, Problem
from qcompiler.solvers.soft_mixture import Mixture, solve_soft_mixture
from tests.solvers.toys import ONE_OPTION, QUADRATIC, assert_good_on, feasible_choices, layers, quadratic


@pytest.mark.parametrize("seed", range(8))
def test_additive_toys_within_two_percent(seed: int) -> None:
    problem = layers(seed)
    best, found = solve_ilp(problem), solve_soft_mixture(problem, seed=seed)
    assert found.objective <= 1.02 * best.objective
    assert found.bound <= best.objective * (1 + 1e-9)
    assert check(problem, found).valid


@pytest.mark.parametrize("index", range(len(QUADRATIC)))
def test_quadratic_toys(index: int) -> None:
    assert_good_on(QUADRATIC[index], solve_soft_mixture(QUADRATIC[index]))


def test_the_gradient_alone_finds_good_choices() -> None:
    """No exchanges afterwards: 60 layers, rounded and repaired, and the multiplier near the optimal price."""
    problem = layers(6, units=60)
    best = solve_ilp(problem)
    measured = Measured(problem, 60.0)
    mixture = Mixture(measured, 8, np.random.default_rng(0))
    mixture.train(800, 0.1, 1.0)
    repaired = [choice for c in mixture.rounded() if (choice := measured.repair(c)) is not None]
    assert min(map(problem.objective, repaired)) <= 1.05 * best.objective
    loss, over = mixture.expected()
    assert np.abs(over).max() < 0.02
    assert np.median(loss) == pytest.approx(best.objective, rel=0.2)
    np.testing.assert_allclose(mixture.shares.sum(axis=2), 1.0)
    prices = mixture.multipliers[:, 0] * mixture.scale / measured.spread[0]
    assert np.median(prices) == pytest.approx(best.multipliers["bits"], rel=0.8)


@pytest.mark.parametrize("stored", ["dense", "sparse"])
def test_expected_loss_is_that_of_independent_draws(stored: str) -> None:
    """And its gradient is its difference quotient, by the shares and through the softmax."""
    problem = replace(quadratic(0, units=3, pair_costs=True, stored=stored), budgets={"bytes": 25.0})
    mixture = Mixture(Measured(problem, 60.0), 2, np.random.default_rng(1))
    mixture.train(5, 0.3, 1.0)
    loss, over = mixture.expected()
    spread = mixture.measured.spread[0]
    choices = feasible_choices(replace(problem, budgets={}))
    for start in range(2):
        chance = [float(np.prod(mixture.shares[start][np.arange(3), choice])) for choice in choices]
        assert sum(chance) == pytest.approx(1.0)
        expected = sum(p * problem.objective(c) for p, c in zip(chance, choices, strict=True))
        assert loss[start] == pytest.approx(expected)
        cost = sum(p * problem.used(c, "bytes") for p, c in zip(chance, choices, strict=True))
        assert over[start, 0] == pytest.approx((cost - 25.0) / spread)
    slope = mixture.loss.of(mixture.shares)[1]
    nudged = mixture.shares.copy()
    nudged[0, 2, 1] += 1e-6
    assert (mixture.loss.of(nudged)[0][0] - loss[0]) / 1e-6 == pytest.approx(slope[0, 2, 1], rel=1e-6)


def test_local_search_reaches_a_local_optimum_of_pair_terms() -> None:
    for problem in QUADRATIC:
        if problem.ties:
            continue
        measured = Measured(problem, 60.0)
        choice = measured.improved(measured.start())
        for unit in range(problem.units):
            for option in np.flatnonzero(problem.allowed[unit]):
                moved = choice.copy()
                moved[unit] = option
                assert not problem.feasible(moved) or problem.objective(moved) >= problem.objective(choice) - 1e-12


def test_two_budgets() -> None:
    rng = np.random.default_rng(9)
    base = layers(9)
    seconds = rng.uniform(1, 2, base.loss.shape)
    costs = {**base.costs, "seconds": seconds}
    problem = Problem(base.loss, costs, {**base.budgets, "seconds": 14.0})
    best, found = solve_ilp(problem), solve_soft_mixture(problem)
    assert check(problem, found).valid
    assert found.objective <= 1.02 * best.objective


def test_one_option_is_left_alone() -> None:
    found = solve_soft_mixture(ONE_OPTION)
    assert found.choice.tolist() == [0, 0]
    assert found.status == "optimal"


def test_no_budget_takes_the_best_options() -> None:
    problem = replace(layers(2), budgets={})
    assert solve_soft_mixture(problem).objective == pytest.approx(problem.loss.min(axis=1).sum())


def test_deterministic_for_a_seed() -> None:
    problem = layers(4, units=20)
    first, again = (solve_soft_mixture(problem, steps=40, seed=1) for _ in range(2))
    assert first.choice.tolist() == again.choice.tolist()
    assert first.bound == again.bound
    measured = Measured(problem, 60.0)
    one, other = (Mixture(measured, 2, np.random.default_rng(s)).logits for s in (1, 2))
    assert (one[0] == other[0]).all()
    assert (one[1] != other[1]).any()


def test_deadline_is_kept() -> None:
    start = time.monotonic()
    found = solve_soft_mixture(layers(6, units=200), 0.3, steps=10**9)
    assert time.monotonic() - start < 2
    assert np.isfinite(found.objective)


def test_infeasible_problems() -> None:
    with pytest.raises(InfeasibleProblem, match="bits: at least"):
        solve_soft_mixture(replace(layers(7), budgets={"bits": 1.0}))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"starts": 0}, {"rate": 0.0}, {"temperature": -1.0}])
def test_meaningless_arguments_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="at least one"):
        solve_soft_mixture(layers(0), **wrong)


def test_nothing_to_choose() -> None:
    assert solve_soft_mixture(Problem(np.zeros((0, 1)), {}, {})).choice.size == 0
