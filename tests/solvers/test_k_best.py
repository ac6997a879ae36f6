"""The k best choices against enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.solvers import k_best as module
from qcompiler.solvers.certificate import check
from qcompiler.solvers.ilp import Answer
from qcompiler.solvers.k_best import k_best
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, Solution
from tests.solvers.test_solvers import larger_problem, random_problem


def all_losses(problem: Problem) -> list[float]:
    """Losses of all feasible choices, ascending."""
    losses: list[float] = []
    for options in itertools.product(*[np.flatnonzero(row) for row in problem.allowed]):
        choice = np.array(options, np.intp)
        if all(len({options[u] for u in g}) == 1 for g in problem.ties) and problem.feasible(choice):
            losses.append(problem.objective(choice))
    return sorted(losses)


def against_enumeration(rng: np.random.Generator, instances: int) -> None:
    feasible = 0
    for _ in range(instances):
        problem, count = random_problem(rng), int(rng.integers(1, 8))
        expected = all_losses(problem)
        try:
            found = k_best(problem, count)
        except InfeasibleProblem:
            assert not expected
            continue
        feasible += 1
        scale = float(np.ptp(problem.loss[problem.allowed])) + abs(expected[0])
        assert [s.objective for s in found] == pytest.approx(expected[:count], abs=1e-6 * scale)
        assert len({tuple(s.choice.tolist()) for s in found}) == len(found)
        for rank, solution in enumerate(found):
            assert solution.status == "optimal"
            assert solution.bound <= expected[rank] + 1e-9 * scale
            assert not [f for f in check(problem, solution).faults if "called optimal" not in f]
    assert feasible > 0.6 * instances


@pytest.mark.parametrize("seed", range(8))
def test_enumerated(seed: int) -> None:
    against_enumeration(np.random.default_rng(seed), 250)


@pytest.mark.parametrize("seed", range(3))
def test_by_program(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENUMERATED", 0)
    against_enumeration(np.random.default_rng(100 + seed), 25)


def test_larger_ones_are_distinct_sorted_and_proven() -> None:
    problem = larger_problem(np.random.default_rng(3), 60, 2)
    found = k_best(problem, 4)
    losses = [s.objective for s in found]
    assert losses == sorted(losses)
    assert len({tuple(s.choice.tolist()) for s in found}) == 4
    assert all(s.status == "optimal" and problem.feasible(s.choice) for s in found)
    assert all(a.bound <= b.bound for a, b in itertools.pairwise(found))
    for removed in found[:2]:  # what one exchange reaches from the best is not better than the last of them
        for unit, option in np.argwhere(problem.allowed):
            moved = removed.choice.copy()
            moved[unit] = option
            if problem.feasible(moved) and problem.objective(moved) < losses[-1] * (1 - 1e-6):
                assert any((moved == s.choice).all() for s in found)


def test_out_of_time_or_too_large_answers_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = larger_problem(np.random.default_rng(4), 60, 2)
    best = [s.objective for s in k_best(problem, 3)]
    monkeypatch.setattr(module, "LARGEST", 0)
    near = k_best(problem, 3)
    late = k_best(problem, 3, deadline=0.0)
    for found in (near, late):
        assert len(found) == 3
        assert all(problem.feasible(s.choice) for s in found)
        for solution, optimum in zip(found, best, strict=True):
            assert solution.bound <= optimum * (1 + 1e-9)
            assert solution.objective >= optimum * (1 - 1e-6)
            assert solution.status == "feasible"


def test_a_choice_that_is_not_proven_is_still_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the Lagrangian solver finds nothing and the program is stopped with a choice and a low bound."""

    def stopped(problem: Problem, *arguments: object, **options: object) -> Answer:
        return Answer(np.array([1, 0, 0]), -5.0, False, False)

    def lost(problem: Problem, deadline: float) -> Solution:
        raise NoChoiceFound("none")

    monkeypatch.setattr(module, "_ENUMERATED", 0)
    monkeypatch.setattr(module, "solve_core", stopped)
    monkeypatch.setattr(module, "solve_lagrangian", lost)
    problem = Problem.ragged([[1.0, 0.0]] * 3, {"bits": [[1.0, 2.0]] * 3}, {"bits": 5.0})
    (found,) = k_best(problem, 3)
    assert (found.objective, found.bound, found.status) == (2.0, -5.0, "feasible")


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scaling_losses_or_costs_changes_nothing(factor: float) -> None:
    problem = larger_problem(np.random.default_rng(5), 20)
    reference = [s.objective for s in k_best(problem, 4)]
    louder = k_best(replace(problem, loss=problem.loss * factor), 4)
    assert [s.objective for s in louder] == pytest.approx([v * factor for v in reference], rel=1e-6)
    costs, budgets = {"bits": problem.costs["bits"] * factor}, {"bits": problem.budgets["bits"] * factor * (1 + 1e-12)}
    dearer = k_best(replace(problem, costs=costs, budgets=budgets), 4)
    assert [s.objective for s in dearer] == pytest.approx(reference, rel=1e-6)


def test_fewer_choices_than_asked_for() -> None:
    problem = Problem.ragged([[1.0, 0.0], [2.0]], {"bits": [[1.0, 2.0], [1.0]]}, {"bits": 3.0})
    assert [s.choice.tolist() for s in k_best(problem, 9)] == [[1, 0], [0, 0]]
    assert len(k_best(Problem.ragged([], {}, {}), 3)) == 1


def test_many_units_with_one_option() -> None:
    loss = np.full((200, 2), np.inf)
    loss[:, 0] = 1.0
    loss[7, 1] = 0.5
    problem = Problem(loss, {"bits": np.ones((200, 2))}, {"bits": 200.0})
    assert [s.objective for s in k_best(problem, 3)] == [199.5, 200.0]


def test_refusals() -> None:
    problem = larger_problem(np.random.default_rng(0), 3)
    with pytest.raises(ValueError, match="count"):
        k_best(problem, 0)
    with pytest.raises(ValueError, match="quadratic"):
        k_best(replace(problem, cross=np.zeros((18, 18))), 2)
    with pytest.raises(InfeasibleProblem, match="at least"):
        k_best(replace(problem, budgets={"bits": 1.0}), 2)
