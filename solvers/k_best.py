"""The k best choices of a separable problem, each with a bound.

The integer program is solved again and again, each time without the choices found before ("no-good" cuts). Options
that no choice of at most the k-th best known loss can contain are left out first (reduced-cost fixing). Few choices
are simply enumerated.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from qcompiler.solvers.clock import interrupted, interruptible
from qcompiler.solvers.ilp import LARGEST, allowance, solve_core, useful
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.problem import Choice, InfeasibleProblem, NoChoiceFound, Problem, Solution, separable

_ENUMERATED = 4096  # choices; a table of them is faster than one integer program
_MOVES = 400  # the cheapest moves of single units and pairs of them, from which known choices are made


@dataclass(frozen=True, eq=False)
class _Search:
    """What is known before the program: a problem without ties, the core's options, choices, and a bound of all."""

    problem: Problem
    options: npt.NDArray[np.bool_]
    known: list[Choice]
    bound: float
    cutoff: float
    prices: dict[str, float]


def k_best(problem: Problem, count: int, deadline: float = 60.0) -> list[Solution]:
    """The best distinct choices, best first.

    The bound of each answer holds for every choice that is not before it in the list. Its status is "optimal" where
    bound and loss agree up to the accuracy of the integer solver. When time runs out, or the core has more than
    `ilp.LARGEST` variables, the rest of the list are choices near the best one, "feasible". The list is shorter than
    `count` where there are no more choices, or none was found.

    Args:
        problem: without quadratic terms.
        count: how many, at least 1.
        deadline: seconds for all of them; Ctrl-C ends it as the deadline does (see `clock`).

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
        NoChoiceFound: time ran out before one was found.
        ValueError: quadratic terms, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}, and must be at least 1")
    start = time.monotonic()
    merged, members = separable(problem)
    with interruptible():
        search = _prepared(merged, count, deadline)
        free = search.options.sum(axis=1).astype(float)
        if free.prod() <= _ENUMERATED:
            found = _enumerated(search, count)
        elif free[free > 1].sum() <= LARGEST:
            found = _by_program(search, count, start + deadline)
        else:
            found = _completed(search, [], count, search.bound)
        if not found and interrupted():
            raise KeyboardInterrupt
    if not found:
        raise NoChoiceFound("time ran out before a feasible choice was found")
    seconds = time.monotonic() - start
    return [replace(s, choice=s.choice[members], seconds=seconds) for s in found]


def _prepared(problem: Problem, count: int, deadline: float) -> _Search:
    try:
        best = solve_lagrangian(problem, deadline / 3)
    except NoChoiceFound:
        return _Search(problem, problem.allowed, [], -math.inf, math.inf, {})
    known = _neighbours(problem, best, count)
    prices = dict(best.multipliers)
    cutoff = problem.objective(known[count - 1]) if len(known) >= count else math.inf
    options = useful(problem, best, cutoff) if math.isfinite(cutoff) else problem.allowed
    return _Search(problem, options, known, best.bound, cutoff, prices)


def _neighbours(problem: Problem, best: Solution, count: int) -> list[Choice]:
    """Distinct feasible choices around a good one, best first: it, moves of one unit, moves of two."""
    index = np.arange(problem.units)
    now = best.choice
    priced = problem.loss + sum(price * problem.costs[name] for name, price in best.multipliers.items())
    reduced = priced - priced[index, now][:, None]
    reduced[index, now] = np.inf
    size = min(max(_MOVES, 4 * math.isqrt(count)), reduced.size)
    moves = np.argpartition(reduced, size - 1, axis=None)[:size] if size else np.zeros(0, np.intp)
    moves = np.sort(moves[np.isfinite(reduced.ravel()[moves])])
    unit, option = np.unravel_index(moves, reduced.shape)
    first, second = np.nonzero(np.triu(unit[:, None] != unit[None, :]))
    first = np.concatenate([np.arange(len(unit)), first])
    second = np.concatenate([np.arange(len(unit)), second])  # a move with itself is a move of one unit
    twice = np.where(first == second, 0.5, 1.0)
    fits = np.ones(len(first), np.bool_)
    for name, budget in problem.budgets.items():
        change = problem.costs[name][unit, option] - problem.costs[name][unit, now[unit]]
        fits &= (change[first] + change[second]) * twice <= budget - problem.used(now, name)
    change = problem.loss[unit, option] - problem.loss[unit, now[unit]]
    total = np.where(fits, (change[first] + change[second]) * twice, np.inf)
    nearest = np.argsort(total, kind="stable")[: 2 * count + 16]
    found = [now]
    for pair in nearest[np.isfinite(total[nearest])]:
        moved = now.copy()
        moved[unit[[first[pair], second[pair]]]] = option[[first[pair], second[pair]]]
        if problem.feasible(moved):
            found.append(moved)
    return sorted(found, key=problem.objective)


def _enumerated(search: _Search, count: int) -> list[Solution]:
    """All choices of the core, sorted by loss."""
    problem, options = search.problem, search.options
    free = np.flatnonzero(options.sum(axis=1) > 1)
    grid = np.meshgrid(*(np.flatnonzero(options[unit]) for unit in free), indexing="ij")
    table = np.repeat(options.argmax(axis=1)[None, :], grid[0].size if grid else 1, axis=0)
    for unit, column in zip(free, grid, strict=True):
        table[:, unit] = column.ravel()
    order = np.argsort(problem.loss[np.arange(problem.units), table].sum(axis=1), kind="stable")
    best = list(islice((choice for choice in table[order] if problem.feasible(choice)), count))
    if not best:
        raise InfeasibleProblem(problem.least_costs(), problem.budgets)
    return [_solution(search, choice, problem.objective(choice), "optimal") for choice in best]


def _by_program(search: _Search, count: int, until: float) -> list[Solution]:
    problem, found, unproven = search.problem, list[Solution](), list[Choice]()
    bound = search.bound
    while len(found) < count:
        answer = solve_core(problem, search.options, until, excluded=[s.choice for s in found])
        if answer.infeasible:
            if not found and not search.known:
                raise InfeasibleProblem(problem.least_costs(), problem.budgets)
            # Of the choices within the cutoff none is left: the next loss is beyond it.
            bound = search.cutoff
            break
        bound = max(bound, min(answer.bound, search.cutoff))
        if answer.choice is None:
            break
        objective = problem.objective(answer.choice)
        if objective - bound > allowance(problem, search.options, objective):
            unproven = [answer.choice]
            break
        found.append(_solution(search, answer.choice, bound, "optimal"))
    known = sorted([*search.known, *unproven], key=problem.objective)
    return _completed(replace(search, known=known), found, count, bound)


def _completed(search: _Search, found: list[Solution], count: int, bound: float) -> list[Solution]:
    """The list filled up with known choices; `bound` holds for all that are not in `found`."""
    have = {tuple(s.choice.tolist()) for s in found}
    rest = {key: choice for choice in search.known if (key := tuple(choice.tolist())) not in have}
    for choice in list(rest.values())[: count - len(found)]:
        solution = _solution(search, choice, bound, "feasible")
        near = solution.objective - solution.bound <= allowance(search.problem, search.options, solution.objective)
        found.append(replace(solution, status="optimal" if near else "feasible"))
    # Losses that the integer solver cannot tell apart may have come in the wrong order; the bounds rise anyway.
    bounds = sorted(s.bound for s in found)
    ordered = sorted(found, key=lambda s: s.objective)
    return [replace(s, bound=min(b, s.objective)) for s, b in zip(ordered, bounds, strict=True)]


def _solution(search: _Search, choice: Choice, bound: float, status: str) -> Solution:
    objective = search.problem.objective(choice)
    return Solution(choice, objective, min(bound, objective), "k_best", status, 0.0, search.prices)
