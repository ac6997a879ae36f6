"""The least of a resource for a loss, against enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.solvers.least_cost import exchanged, least_cost
from qcompiler.solvers.problem import Choice, InfeasibleProblem, Problem
from qcompiler.solvers.solve import solve
from tests.solvers.test_solvers import larger_problem, random_problem


def choices(problem: Problem) -> list[Choice]:
    lists = [np.flatnonzero(row) for row in problem.allowed]
    found = (np.array(options, np.intp) for options in itertools.product(*lists))
    return [c for c in found if all(len({int(c[u]) for u in group}) == 1 for group in problem.ties)]


@pytest.mark.parametrize("seed", range(4))
def test_against_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    solved = impossible = 0
    for _ in range(80):
        problem = random_problem(rng)
        others = {name: b for name, b in problem.budgets.items() if name != "bytes"}
        free = replace(problem, budgets=others)
        reachable = [c for c in choices(problem) if free.feasible(c)]
        losses = [problem.objective(c) for c in reachable] or [0.0]
        limit = float(rng.uniform(min(losses) - 0.2, max(losses)))
        expected = min((problem.used(c, "bytes") for c in reachable if problem.objective(c) <= limit), default=None)
        if expected is None:
            with pytest.raises(InfeasibleProblem):
                least_cost(problem, "bytes", limit)
            impossible += 1
            continue
        solution = least_cost(problem, "bytes", limit)
        solved += 1
        assert solution.objective == expected == problem.used(solution.choice, "bytes")
        assert problem.objective(solution.choice) <= limit
        assert solution.bound <= expected
        assert solution.status == "optimal"
    assert solved > 25
    assert impossible > 2


def test_the_answer_of_one_question_is_the_limit_of_the_other() -> None:
    problem = larger_problem(np.random.default_rng(1), 40)
    best = solve(problem)
    back = least_cost(problem, "bits", best.objective)
    assert back.objective <= problem.used(best.choice, "bits")
    assert problem.objective(back.choice) <= best.objective
    assert solve(replace(problem, budgets={"bits": back.objective})).objective == pytest.approx(best.objective)


def test_infeasible_names_the_least_reachable_loss() -> None:
    costs = {"bits": [[1.0, 2.0], [1.0, 2.0]], "seconds": [[1.0, 3.0], [1.0, 3.0]]}
    problem = Problem.ragged([[4.0, 1.0], [5.0, 0.0]], costs, {"seconds": 4.0})
    assert least_cost(problem, "bits", 4.0).choice.tolist() == [0, 1]
    with pytest.raises(InfeasibleProblem, match=r"loss: at least (4|3\.99\d*), budget 3.5") as caught:
        least_cost(problem, "bits", 3.5)
    assert caught.value.least["loss"] == pytest.approx(4.0)


def test_roles_of_terms_between_units_are_exchanged() -> None:
    """What a pair loses becomes a pair cost of the loss, what it costs becomes a quadratic loss."""
    rng = np.random.default_rng(2)
    base = larger_problem(rng, 3)
    half = np.triu(rng.normal(size=(18, 18)), 7)
    pair = np.triu(rng.uniform(0, 100, (18, 18)), 7)
    problem = replace(base, cross=half + half.T, pair_costs={"bits": pair + pair.T})
    turned, name = exchanged(problem, "bits", 2.0)
    assert turned.budgets == {"loss": 2.0}
    for _ in range(50):
        choice = rng.integers(0, 6, 3)
        assert turned.used(choice, name) == pytest.approx(problem.objective(choice), rel=1e-12)
        assert turned.objective(choice) == pytest.approx(problem.used(choice, "bits"), rel=1e-12)


def test_a_resource_called_loss_keeps_its_name() -> None:
    problem = Problem.ragged([[1.0, 0.0]], {"loss": [[3.0, 5.0]], "b": [[1.0, 2.0]]}, {"loss": 5.0})
    turned, name = exchanged(problem, "b", 0.5)
    assert (name, dict(turned.budgets)) == ("loss'", {"loss": 5.0, "loss'": 0.5})
    assert least_cost(problem, "b", 0.5).objective == 2.0


def test_separable_solvers_refuse_quadratic_problems() -> None:
    problem = replace(larger_problem(np.random.default_rng(0), 2), cross=np.zeros((12, 12)))
    with pytest.raises(ValueError, match="quadratic"):
        least_cost(problem, "bits", 1.0, method="lagrangian")


@pytest.mark.parametrize(("resource", "limit", "message"), [("joules", 1.0, "no resource"), ("bits", np.nan, "finite")])
def test_refusals(resource: str, limit: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        least_cost(larger_problem(np.random.default_rng(0), 2), resource, limit)


def test_quadratic_problems_against_enumeration() -> None:
    rng = np.random.default_rng(3)
    for _ in range(4):
        loss = np.sort(rng.uniform(0, 1, (3, 3)), axis=1)[:, ::-1]
        cost = np.sort(rng.integers(1, 20, (3, 3)).astype(float), axis=1)
        half = np.triu(rng.normal(0, 0.2, (9, 9)), 1) * (np.arange(9)[:, None] // 3 != np.arange(9) // 3)
        problem = Problem(loss, {"b": cost}, {}, cross=half + half.T)
        losses = [problem.objective(c) for c in choices(problem)]
        limit = float(rng.uniform(min(losses), max(losses)))
        expected = min(problem.used(c, "b") for c in choices(problem) if problem.objective(c) <= limit)
        solution = least_cost(problem, "b", limit, deadline=5.0)
        assert solution.bound <= expected == solution.objective
        assert problem.objective(solution.choice) <= limit
