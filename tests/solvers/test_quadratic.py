"""Problems with terms between units: against enumeration, and laws."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from qcompiler.solvers import messages, rlt
from qcompiler.solvers.certificate import check
from qcompiler.solvers.convex import ConvexBound
from qcompiler.solvers.messages import MessagePassing
from qcompiler.solvers.pairs import MOST_OPTIONS, PairProblem
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem
from qcompiler.solvers.quadratic import solve_quadratic
from qcompiler.solvers.solve import solve
from qcompiler.solvers.swap import SwapSearch


def random_problem(rng: np.random.Generator, most: int = 4096) -> Problem:
    """Losses over decades, signed cross terms, missing options, ties, pair costs, one to three budgets."""
    units = int(rng.integers(1, 7))
    options = int(rng.integers(1, max(2, min(5, int(most ** (1 / units)))) + 1))
    n = units * options
    loss = 10 ** rng.uniform(-3, 1) * rng.exponential(size=(units, options)) * 4.0 ** -np.arange(options)
    if rng.random() < 0.3:
        loss -= 0.2 * loss.max()
    if options > 1 and rng.random() < 0.3:
        loss[rng.integers(units), rng.integers(options)] = np.inf
    scale = np.sqrt(np.abs(np.where(np.isfinite(loss), loss, 0))).ravel()
    noise = rng.normal(size=(n, n)) * (rng.random((n, n)) < rng.choice([0.3, 1.0]))
    cross = (noise + noise.T) * np.outer(scale, scale) * rng.choice([0.1, 0.5, 2.0])
    costs = {f"r{i}": rng.integers(0, 20, (units, options)).astype(float) for i in range(rng.integers(1, 4))}
    pairs = {}
    if rng.random() < 0.4 and units > 1:
        extra = np.triu(rng.integers(0, 5, (n, n)) * (rng.random((n, n)) < 0.3), 1).astype(float)
        pairs["r0"] = sparse.csr_array(extra + extra.T)
    budgets = {}
    for name, cost in costs.items():
        low, high = cost.min(axis=1).sum(), cost.max(axis=1).sum() + (2.0 * units if name in pairs else 0)
        budgets[name] = float(np.floor(low + rng.uniform(0, 1) * (high - low)))
    ties = ((0, 1),) if units > 2 and rng.random() < 0.3 and np.isfinite(loss[:2]).all() else ()
    dense = rng.random() < 0.5
    return Problem(loss, costs, budgets, ties, cross if dense else sparse.csr_array(cross), pairs)


def optimum(problem: Problem) -> float:
    """By looking at every choice."""
    best = np.inf
    for choice in itertools.product(*(np.flatnonzero(row) for row in problem.allowed)):
        at = np.array(choice)
        tied = all(len({choice[u] for u in group}) == 1 for group in problem.ties)
        if tied and problem.feasible(at):
            best = min(best, problem.objective(at))
    return best


def prices_for(pairs: PairProblem, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 0.1, len(pairs.resources)) * rng.integers(0, 2)


@pytest.mark.parametrize("seed", range(40))
def test_against_enumeration(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed), 1024)
    best = optimum(problem)
    if not np.isfinite(best):
        with pytest.raises((InfeasibleProblem, NoChoiceFound)):
            solve_quadratic(problem, 10)
        return
    found = solve_quadratic(problem, 10)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert found.bound <= best + 1e-9 * abs(best) + 1e-12
    assert check(problem, found).valid, check(problem, found).faults


@pytest.mark.parametrize("seed", range(60, 90))
def test_no_bound_is_above_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, 512)
    best = optimum(problem)
    if not np.isfinite(best):
        return
    room = 1e-9 * max(1.0, abs(best))
    pairs = PairProblem.of(problem)
    soon = time.monotonic() + 2
    dual = MessagePassing(pairs, soon, prices_for(pairs, rng)).run()
    assert dual.bound <= best + room
    noise = dual.messages + rng.normal(size=dual.messages.shape)
    assert messages.bound(pairs, noise, dual.prices) <= best + room
    relaxation = ConvexBound(pairs, prices_for(pairs, rng), soon).run(rounds=5)
    assert relaxation.bound <= best + room
    for marginals in (dual.marginals, relaxation.marginals):
        kept = pairs.allowed & (marginals <= best + room)
        alive = replace(pairs.problem, loss=np.where(kept, pairs.problem.loss, np.inf))
        assert optimum(alive) == pytest.approx(best, rel=1e-9)
    short = rlt.linearised(pairs, pairs.allowed, soon, dual.messages, most_columns=4)
    assert short.bound <= best + 1e-6 * max(1.0, abs(best))


def test_dropped_pairs_weaken_the_bound_by_no_more_than_said() -> None:
    problem = random_problem(np.random.default_rng(3))
    pairs = PairProblem.of(problem)
    soon = time.monotonic() + 20
    full = rlt.linearised(pairs, pairs.allowed, soon)
    assert full.optimal
    for most in (0, 30, 100):
        part = rlt.linearised(pairs, pairs.allowed, soon, most_columns=most)
        assert full.bound - part.dropped - 1e-6 <= part.bound <= full.bound + 1e-6


def coupled(seed: int, units: int = 14) -> Problem:
    rng = np.random.default_rng(seed)
    loss = np.exp(rng.normal(size=(units, 1))) * np.array([1, 4.0**-1, 4.0**-2, 4.0**-3])
    scale = np.sqrt(2 * loss).ravel()
    noise = rng.normal(size=(units, units)) * 0.1
    cross = np.kron(np.triu(noise, 1) + np.triu(noise, 1).T, np.ones((4, 4))) * np.outer(scale, scale)
    size = rng.integers(1, 9, (units, 1)) * np.array([2.0, 3, 4, 8])
    return Problem(
        loss.astype(np.float64),
        {"size": size.astype(np.float64)},
        {"size": float(np.floor(size.min(1).sum() * 1.8))},
        cross=cross,
    )


@pytest.mark.parametrize("factor", [1e-8, 1e6])
def test_scaling_changes_nothing(factor: float) -> None:
    problem = coupled(0)
    plain = solve_quadratic(problem, 20)
    losses = replace(problem, loss=problem.loss * factor, cross=problem.cross * factor)
    costs = replace(
        problem, costs={"size": problem.costs["size"] * factor}, budgets={"size": problem.budgets["size"] * factor}
    )
    assert solve_quadratic(losses, 20).objective == pytest.approx(factor * plain.objective, rel=1e-6)
    assert solve_quadratic(costs, 20).objective == pytest.approx(plain.objective, rel=1e-6)


def test_more_budget_is_never_worse() -> None:
    problem = coupled(1)
    sizes = np.linspace(problem.costs["size"].min(1).sum(), problem.costs["size"].max(1).sum(), 7)
    losses = [solve_quadratic(replace(problem, budgets={"size": float(size)}), 20).objective for size in sizes]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))


def test_separable_problems_get_the_separable_answer() -> None:
    problem = replace(coupled(2), cross=None)
    assert solve_quadratic(problem, 20).objective == pytest.approx(solve(problem, "ilp").objective, rel=1e-7)


def test_auto_takes_the_solver_that_the_problem_needs() -> None:
    problem = coupled(3, 6)
    assert "local search" in solve(problem).method
    assert solve(replace(problem, cross=None)).method == "ilp"
    with pytest.raises(ValueError, match="between units"):
        solve(problem, "ilp")


def test_cross_terms_change_the_answer() -> None:
    """Two units whose errors cancel may both be coarse; the same problem without the terms must not find that."""
    cross = np.zeros((6, 6))
    cross[0, 2] = cross[2, 0] = -1.9
    problem = Problem(np.array([[1.0, 0], [1, 0], [0.5, 0]]), {"b": np.array([[1.0, 4]] * 3)}, {"b": 6.0}, cross=cross)
    assert solve(problem).choice.tolist() == [0, 0, 1]
    assert solve(replace(problem, cross=None)).choice.tolist() != [0, 0, 1]


def test_a_conversion_between_neighbours_is_paid_for() -> None:
    """Options alternate by loss alone; where two formats next to each other cost time, they agree."""
    loss = np.array([[0.0, 0.1], [0.1, 0.0], [0.0, 0.1], [0.1, 0.0]])
    pairs = np.zeros((8, 8))
    for u in range(3):
        for a, b in ((0, 1), (1, 0)):
            pairs[2 * u + a, 2 * u + 2 + b] = pairs[2 * u + 2 + b, 2 * u + a] = 1.0
    problem = Problem(loss, {"ms": np.ones((4, 2))}, {"ms": 4.0}, pair_costs={"ms": sparse.csr_array(pairs)})
    found = solve(problem)
    assert len(set(found.choice.tolist())) == 1
    assert found.status == "optimal"
    assert solve(replace(problem, budgets={"ms": 7.0})).choice.tolist() == [0, 1, 0, 1]


def test_impossible_pairs_make_it_infeasible() -> None:
    pairs = np.ones((4, 4)) - np.eye(4)
    problem = Problem(
        np.zeros((2, 2)), {"no": np.zeros((2, 2))}, {"no": 0.0}, pair_costs={"no": sparse.csr_array(pairs)}
    )
    with pytest.raises(InfeasibleProblem):
        solve(problem, deadline=10)


def test_the_message_bound_is_verified_from_the_solution_alone() -> None:
    problem = coupled(4)
    pairs = PairProblem.of(problem)
    dual = MessagePassing(pairs, time.monotonic() + 10, np.array([0.05])).run()
    start = SwapSearch(pairs, dual.prices, time.monotonic() + 5).run([dual.relaxed])
    assert start is not None
    found = replace(
        solve(problem), bound=dual.bound, messages=dual.messages, multipliers={"size": float(dual.prices[0])},
        status="feasible", objective=start[0], choice=start[1],
    )  # fmt: skip
    assert check(problem, found).valid
    assert check(problem, found).proof == "dual"
    assert check(problem, replace(found, messages=None)).proof == "solver"


def test_out_of_time_keeps_the_best_and_a_true_bound() -> None:
    problem = coupled(5, 40)
    found = solve_quadratic(problem, 0.3)
    assert found.status == "feasible"
    assert problem.feasible(found.choice)
    assert found.bound <= solve_quadratic(problem, 4).objective + 1e-9


@pytest.mark.parametrize("what", ["cross", "pair"])
def test_matrices_must_make_sense(what: str) -> None:
    def build(matrix: np.ndarray) -> Problem:
        loss, cost = np.zeros((2, 2)), {"b": np.ones((2, 2))}
        if what == "cross":
            return Problem(loss, cost, {"b": 9.0}, cross=matrix)
        return Problem(loss, cost, {"b": 9.0}, pair_costs={"b": sparse.csr_array(matrix)})

    with pytest.raises(ValueError, match="symmetric"):
        build(np.triu(np.ones((4, 4))))
    with pytest.raises(ValueError, match="finite"):
        build(np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="finite, and below"):
        build(np.full((4, 4), 1e200))
    with pytest.raises(ValueError, match="squared"):
        build(np.ones((3, 3)))


def test_too_many_options_say_so() -> None:
    problem = Problem(np.zeros((MOST_OPTIONS, 2)), {}, {}, cross=sparse.csr_array((2 * MOST_OPTIONS, 2 * MOST_OPTIONS)))
    with pytest.raises(ValueError, match="larger units"):
        solve(problem)
