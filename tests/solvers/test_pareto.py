"""The path of loss against a resource."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.solvers.hull import curve
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.pareto import pareto
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, Solution
from qcompiler.solvers.solve import solve
from tests.solvers.test_solvers import larger_problem, optimum, random_problem


@pytest.mark.parametrize("seed", range(3))
def test_against_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compared = 0
    for _ in range(8):
        problem = random_problem(rng)
        try:
            points = pareto(problem, "bytes")
        except InfeasibleProblem:
            continue
        for point in points:
            at = replace(problem, budgets={**problem.budgets, "bytes": point.amount})
            best = optimum(at)
            compared += 1
            assert at.feasible(point.choice)
            assert point.used == problem.used(point.choice, "bytes") <= point.amount
            assert point.loss == problem.objective(point.choice) == pytest.approx(best, abs=1e-6)
            assert point.bound <= best + 1e-9 * max(1.0, abs(best))
    assert compared > 50


def test_default_amounts_go_from_the_cheapest_to_the_best_choice() -> None:
    problem = larger_problem(np.random.default_rng(1), 30)
    points, ends = pareto(problem, "bits"), curve(problem, "bits")
    assert len(points) == 25
    assert points[0].amount == ends[0].cost
    assert points[-1].amount == pytest.approx(ends[-1].cost)
    assert points[-1].loss == pytest.approx(ends[-1].loss)
    assert np.ptp(np.diff([p.amount for p in points])) < 1e-6 * points[-1].amount
    assert all(p.gap < 1e-5 for p in points)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scaling_losses_or_costs_scales_the_path(factor: float) -> None:
    problem = larger_problem(np.random.default_rng(5), 20)
    reference = [p.loss for p in pareto(problem, "bits", np.linspace(2.5e6, 7e6, 5))]
    assert len(reference) > 2
    louder = pareto(replace(problem, loss=problem.loss * factor), "bits", np.linspace(2.5e6, 7e6, 5))
    assert [p.loss for p in louder] == pytest.approx([v * factor for v in reference], rel=1e-6)
    dearer = replace(problem, costs={"bits": problem.costs["bits"] * factor})
    points = pareto(dearer, "bits", np.linspace(2.5e6, 7e6, 5) * factor * (1 + 1e-12))
    assert [p.loss for p in points] == pytest.approx(reference, rel=1e-6)


def bad_solver(problem: Problem) -> Solution:
    """Right, but for every other budget with a useless choice, and with bounds that are sometimes far too low."""
    found = solve_lagrangian(problem)
    number = int(problem.budgets["bits"] // 1000) if "bits" in problem.budgets else 1
    if number % 3 == 0:
        return replace(found, bound=-1e9)
    if number % 3 == 1 and problem.budgets:
        worst = np.where(problem.costs["bits"] == problem.costs["bits"].min(axis=1, keepdims=True), 0, 1).argmin(axis=1)
        return replace(found, choice=worst, objective=problem.objective(worst))
    return found


def test_monotone_whatever_the_solver_does() -> None:
    problem = larger_problem(np.random.default_rng(2), 30)
    points = pareto(problem, "bits", solve=bad_solver)
    exact = pareto(problem, "bits", amounts=[p.amount for p in points])
    assert all(a.loss >= b.loss and a.bound >= b.bound for a, b in itertools.pairwise(points))
    assert any(a.choice is b.choice for a, b in itertools.pairwise(points))
    for point, best in zip(points, exact, strict=True):
        assert point.bound <= best.loss * (1 + 1e-9)
        assert point.loss >= best.loss * (1 - 1e-9)
        assert problem.used(point.choice, "bits") <= point.amount


def test_amounts_in_any_order_and_infeasible_ones_left_out() -> None:
    problem = Problem.ragged([[5.0, 1.0, 0.0]], {"b": [[2.0, 4.0, 9.0]]}, {"b": 0.0})
    points = pareto(problem, "b", [10.0, 1.0, 5.0, 2.0, 5.0])
    assert [(p.amount, p.used, p.loss) for p in points] == [(2.0, 2.0, 5.0), (5.0, 4.0, 1.0), (10.0, 9.0, 0.0)]
    with pytest.raises(InfeasibleProblem, match="b: at least 2, budget 1"):
        pareto(problem, "b", [0.5, 1.0])


def test_a_solver_that_finds_nothing_later_keeps_what_was_found() -> None:
    problem = larger_problem(np.random.default_rng(3), 10)

    def early(at: Problem) -> Solution:
        if at.budgets["bits"] > middle:
            raise NoChoiceFound("out of time")
        return solve(at)

    middle = problem.budgets["bits"]
    points = pareto(problem, "bits", [middle, middle * 1.1], solve=early)
    assert points[1].loss == points[0].loss
    assert points[1].bound == -np.inf
    assert points[0].gap < 1e-5


def test_quadratic_problems_with_a_solver_that_takes_them() -> None:
    cross = np.zeros((4, 4))
    cross[1, 3] = cross[3, 1] = 3.0  # both at the dear option lose more than they save
    problem = Problem(np.array([[1.0, 0.0], [1.0, 0.0]]), {"b": np.array([[1.0, 2.0]] * 2)}, {}, cross=cross)
    pairs = [np.array(c) for c in itertools.product(range(2), repeat=2)]

    def exhaustive(at: Problem) -> Solution:
        best = min((c for c in pairs if at.feasible(c)), key=at.objective)
        return Solution(best, at.objective(best), at.objective(best), "all", "optimal", 0.0)

    points = pareto(problem, "b", solve=exhaustive)
    assert [points[0].loss, points[-1].loss] == [2.0, 1.0]
    assert points[-1].used == 3.0


@pytest.mark.parametrize(("resource", "amounts"), [("joules", None), ("bits", []), ("bits", [np.inf])])
def test_refusals(resource: str, amounts: list[float] | None) -> None:
    with pytest.raises(ValueError):
        pareto(larger_problem(np.random.default_rng(0), 2), resource, amounts)
