"""The random walk against optima known by enumeration or proven by the integer program."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.solvers.certificate import check
from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.measured import lower_estimate
from qcompiler.solvers.metropolis import solve_metropolis
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, without_ties
from qcompiler.solvers.solve import solve
from tests.solvers.toys import ONE_OPTION, QUADRATIC, assert_good_on, feasible_choices, layers


@pytest.mark.parametrize("seed", range(5))
def test_additive_toys_within_two_percent(seed: int) -> None:
    problem = layers(seed)
    best, found = solve_ilp(problem), solve_metropolis(problem, steps=3000, seed=seed)
    assert found.objective <= 1.02 * best.objective
    assert found.bound <= best.objective * (1 + 1e-9)
    assert check(problem, found).valid
    assert check(problem, found).proof == "dual"


@pytest.mark.parametrize("index", range(len(QUADRATIC)))
def test_quadratic_toys(index: int) -> None:
    assert_good_on(QUADRATIC[index], solve_metropolis(QUADRATIC[index], steps=300))


def test_lower_estimate_is_below_every_choice() -> None:
    for problem in QUADRATIC:
        merged, _ = without_ties(problem)
        estimate = lower_estimate(merged)
        assert estimate.separable
        for choice in feasible_choices(merged):
            assert estimate.objective(choice) <= merged.objective(choice) + 1e-12
            assert estimate.used(choice, "bytes") <= merged.used(choice, "bytes") + 1e-12


def test_measured_loss_and_cost_rule() -> None:
    """The tables say that bits alone count; measured, units must agree and pairs of them cost more together."""
    problem = layers(1, units=6)
    tie_penalty = float(problem.loss.max())
    budget = problem.budgets["bits"]

    def loss(choice: np.ndarray) -> float:
        return problem.objective(choice) + tie_penalty * len(set(choice.tolist()))

    def cost(choice: np.ndarray) -> dict[str, float]:
        return {"bits": problem.used(choice, "bits") + 0.05 * budget * int((np.diff(choice) != 0).sum())}

    found = solve_metropolis(problem, loss=loss, cost=cost, steps=1500)
    assert cost(found.choice)["bits"] <= budget
    assert found.objective == loss(found.choice)
    assert found.bound == -np.inf
    assert found.status == "feasible"
    uniform = np.full(6, 1)  # 3 bits: the best uniform choice within 3.87
    assert found.objective <= loss(uniform)
    alone = solve_metropolis(problem, steps=1500)
    assert found.choice.tolist() != alone.choice.tolist()


def test_measured_cost_alone_keeps_a_true_bound() -> None:
    problem = layers(2, units=6)
    half = solve_metropolis(problem, cost=lambda c: {"bits": 0.5 * problem.used(c, "bits")}, steps=800)
    twice = replace(problem, budgets={"bits": 2 * problem.budgets["bits"]})
    assert half.bound <= solve_ilp(twice).objective <= half.objective * (1 + 1e-9)
    assert half.objective < solve_ilp(problem).objective


def test_no_choice_is_measured_twice() -> None:
    problem, seen = layers(3, units=4), []

    def loss(choice: np.ndarray) -> float:
        seen.append(tuple(choice.tolist()))
        return problem.objective(choice)

    solve_metropolis(problem, loss=loss, steps=500)
    assert len(seen) == len(set(seen)) > 20


def test_scores_learn() -> None:
    """AMED's own walk, with no budget to repair for, against the same walk with scores that never move (eta of 0)."""
    ratios = []
    for seed in range(5):
        problem = layers(seed, 12)
        shuffled = np.random.default_rng(seed).permuted(problem.loss, axis=1)
        free = replace(problem, loss=shuffled, budgets={})
        learning, blind = (
            solve_metropolis(free, loss=free.objective, steps=500, eta=eta, whole_walk=True, seed=seed)
            for eta in (0.2, 1e-12)
        )
        ratios.append(np.log(learning.objective / blind.objective))
    assert np.mean(ratios) < np.log(0.6)


def test_one_option_is_left_alone() -> None:
    found = solve_metropolis(ONE_OPTION)
    assert found.choice.tolist() == [0, 0]
    assert found.objective == 2.0
    assert found.status == "optimal"


def test_deterministic_for_a_seed() -> None:
    problem = layers(4, units=20)
    first, again, other = (solve_metropolis(problem, steps=60, seed=s).choice.tolist() for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_signed_losses() -> None:
    problem = layers(5, units=5)
    lower = replace(problem, loss=problem.loss - 3.0)
    assert solve_metropolis(lower, steps=1500).objective == pytest.approx(solve_ilp(lower).objective, abs=1e-6)
    by_call = solve_metropolis(lower, loss=lower.objective, steps=1500)
    assert by_call.objective == pytest.approx(solve_ilp(lower).objective, abs=1e-2)


def test_deadline_is_kept() -> None:
    start = time.monotonic()
    found = solve_metropolis(layers(6, units=200), 0.3, steps=10**9)
    assert time.monotonic() - start < 1.5
    assert np.isfinite(found.objective)


def test_infeasible_problems() -> None:
    problem = layers(7)
    with pytest.raises(InfeasibleProblem, match="bits: at least"):
        solve_metropolis(replace(problem, budgets={"bits": 1.0}))
    with pytest.raises(NoChoiceFound):
        solve_metropolis(problem, cost=lambda c: {"bits": 2 * problem.budgets["bits"]}, steps=50)


@pytest.mark.parametrize("wrong", [{"eta": 1.0}, {"eta": 0.0}, {"temperature": 0.0}, {"steps": 0}])
def test_meaningless_arguments_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="eta"):
        solve_metropolis(layers(0), **wrong)


def test_meaningless_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="must be numbers"):
        solve_metropolis(layers(0), loss=lambda _: float("nan"))
    with pytest.raises(ValueError, match="names"):
        solve_metropolis(layers(0), cost=lambda _: {"seconds": 1.0})


def test_nothing_to_choose() -> None:
    assert solve_metropolis(Problem(np.zeros((0, 1)), {}, {})).choice.size == 0


@pytest.mark.parametrize("method", ["metropolis", "soft-mixture", "policy-search"])
def test_found_by_name(method: str) -> None:
    problem = layers(8, units=5)
    found = solve(problem, method)
    assert found.method == method
    assert found.objective <= 1.02 * solve_ilp(problem).objective
