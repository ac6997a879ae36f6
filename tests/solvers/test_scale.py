"""The sizes that must be solved, in the time that they may take (CPU seconds: machines are shared)."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.solvers import knapsack
from qcompiler.solvers.certificate import check, dual_bound
from qcompiler.solvers.cuts import prices_by_cuts
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem
from qcompiler.solvers.solve import solve
from tests.solvers.test_solvers import larger_problem, optimum, random_problem


def decades(rng: np.random.Generator, units: int, resources: int = 1) -> Problem:
    """As `larger_problem`, with losses that span ten decades."""
    problem = larger_problem(rng, units, resources)
    return replace(problem, loss=problem.loss * 10 ** rng.uniform(-10, 0, (units, 1)))


def alike(rng: np.random.Generator, units: int, resources: int = 1) -> Problem:
    """Four kinds of units, each many times: prices alone cannot say which of them get the dear option."""
    problem = larger_problem(rng, 4, resources)
    kind = np.arange(units) % 4
    costs = {name: cost[kind] for name, cost in problem.costs.items()}
    budgets = {name: budget * (units / 4) for name, budget in problem.budgets.items()}
    return Problem(problem.loss[kind], costs, budgets)


MAKERS = {"network": larger_problem, "decades": decades, "alike": alike}


@pytest.mark.parametrize("resources", [1, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_fifty_thousand_units(kind: str, resources: int) -> None:
    problem = MAKERS[kind](np.random.default_rng(0), 50_000, resources)
    start = time.process_time()
    solution = solve_lagrangian(problem)
    assert time.process_time() - start < 5
    assert solution.gap < 1e-3
    assert check(problem, solution).valid
    assert check(problem, solution).proof == "dual"


@pytest.mark.slow
@pytest.mark.parametrize("resources", [1, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_million_units(kind: str, resources: int) -> None:
    problem = MAKERS[kind](np.random.default_rng(0), 1_000_000, resources)
    start = time.process_time()
    solution = solve(problem, "lagrangian")
    assert time.process_time() - start < 10
    assert solution.gap < 1e-3
    assert problem.feasible(solution.choice)


@pytest.mark.parametrize("kind", ["network", "decades"])
@pytest.mark.parametrize("seed", range(3))
def test_five_hundred_units_to_optimality(kind: str, seed: int) -> None:
    problem = MAKERS[kind](np.random.default_rng(seed), 500)
    start = time.process_time()
    solution = solve(problem)
    assert time.process_time() - start < 5
    assert solution.status == "optimal"
    assert solution.gap < 1e-6
    assert check(problem, solution).valid


def test_auto_at_a_size_that_no_integer_program_takes() -> None:
    problem = alike(np.random.default_rng(1), 60_000)
    solution = solve(problem, deadline=5.0)
    assert solution.gap < 1e-3
    assert check(problem, solution).valid


@pytest.mark.parametrize("resources", [2, 3])
def test_cutting_planes_find_the_prices_of_the_linear_program(resources: int) -> None:
    rng = np.random.default_rng(resources)
    problem = larger_problem(rng, 200, 2)
    if resources == 3:
        cost = rng.uniform(0, 1, problem.loss.shape)
        costs = {**problem.costs, "joules": cost}
        problem = replace(problem, costs=costs, budgets={**problem.budgets, "joules": 80.0})
    prices, choice = prices_by_cuts(problem, time.monotonic() + 10)
    exact, _ = knapsack._prices(problem)
    assert dual_bound(problem, prices) == pytest.approx(dual_bound(problem, exact), rel=1e-6)
    assert choice.shape == (200,)


def test_cutting_planes_on_small_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds, and what they call infeasible is infeasible."""
    monkeypatch.setattr(knapsack, "_LARGEST_PROGRAM", 0)
    rng = np.random.default_rng(2)
    near = solved = 0
    for _ in range(150):
        problem = random_problem(rng, resources=2)
        best = optimum(problem)
        try:
            solution = solve_lagrangian(problem)
        except InfeasibleProblem:
            assert best == np.inf
            continue
        except NoChoiceFound:
            continue
        slack = 1e-9 * max(1.0, abs(best))
        assert check(problem, solution).valid
        assert solution.bound <= best + slack
        solved += 1
        near += solution.objective <= best + slack
    assert near >= 0.9 * solved > 60


def test_contradicting_budgets_of_many_units_are_proven_infeasible() -> None:
    ones = np.tile([0.0, 1.0], (20_000, 1))
    costs = {"a": ones, "b": 1 - ones}
    problem = Problem(np.tile([1.0, 0.0], (20_000, 1)), costs, {"a": 9_000.0, "b": 9_000.0})
    with pytest.raises(InfeasibleProblem, match="a: at least 0, budget 9000, b: at least 0, budget 9000"):
        solve_lagrangian(problem)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("resources", [1, 2])
def test_scaling_changes_nothing_at_scale(factor: float, resources: int) -> None:
    problem = larger_problem(np.random.default_rng(3), 6_000, resources)
    reference = solve_lagrangian(problem)
    louder = solve_lagrangian(replace(problem, loss=problem.loss * factor))
    assert louder.objective == pytest.approx(reference.objective * factor, rel=1e-4)
    assert louder.gap < 1e-3
    costs = {name: cost * factor for name, cost in problem.costs.items()}
    budgets = {name: budget * factor for name, budget in problem.budgets.items()}
    dearer = solve_lagrangian(replace(problem, costs=costs, budgets=budgets))
    assert dearer.objective == pytest.approx(reference.objective, rel=1e-4)
