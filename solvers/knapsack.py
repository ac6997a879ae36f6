"""The Lagrangian solver: prices on the budgets, then local search. Fast at any size, with a proven bound."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from qcompiler.solvers.certificate import dual_bound
from qcompiler.solvers.cuts import prices_by_cuts
from qcompiler.solvers.descent import NEAREST, polished
from qcompiler.solvers.hull import affordable_steps, path
from qcompiler.solvers.problem import (
    Choice,
    Floats,
    InfeasibleProblem,
    NoChoiceFound,
    Problem,
    Solution,
    separable,
)

_LARGEST_PROGRAM = 12_000  # options; a larger linear program takes more than a second
_PROVEN = 1e-12  # relative gap below which double precision cannot tell objective and bound apart


def solve_lagrangian(problem: Problem, deadline: float = 60.0) -> Solution:
    """Solve by prices: optimal prices for the linear relaxation, rounding, greedy fill, 1- and 2-exchanges.

    With one budget the relaxation is solved exactly along convex hulls (see `hull`), with several as a linear
    program, or by cutting planes where that is large (see `cuts`). The bound is that of weak duality at those
    prices, so `certificate.check` can verify it.

    Args:
        problem: without quadratic terms.
        deadline: seconds; what is found by then is returned.

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
        NoChoiceFound: none was found (possible with several budgets only).
        ValueError: quadratic terms.
    """
    start = time.monotonic()
    merged, members = separable(problem)
    least = merged.least_costs()
    if any(least[name] > budget for name, budget in merged.budgets.items()):
        raise InfeasibleProblem(least, merged.budgets)
    if not merged.units:
        return Solution(np.zeros(0, np.intp), 0.0, 0.0, "lagrangian", "optimal", 0.0)
    prices, relaxed = _relaxed(merged, start + deadline)
    tried = (polished(merged, prices, choice, start + deadline) for choice in _starts(merged, prices, relaxed))
    found = [choice for choice in tried if choice is not None]
    if not found:
        raise NoChoiceFound(f"no feasible choice found ({InfeasibleProblem(least, merged.budgets)})")
    best = min(found, key=merged.objective)
    objective, bound = merged.objective(best), dual_bound(merged, prices)
    bound = min(bound, objective)
    proven = objective - bound <= _PROVEN * max(abs(objective), abs(bound))
    return Solution(
        best[members],
        problem.objective(best[members]),
        bound,
        "lagrangian",
        "optimal" if proven else "feasible",
        time.monotonic() - start,
        prices,
    )


def _starts(problem: Problem, prices: Mapping[str, float], relaxed: Choice) -> Iterator[Choice]:
    yield relaxed
    if problem.units > NEAREST:  # the others may be far from the budgets, where units are alike
        return
    yield (problem.loss + sum(price * problem.costs[name] for name, price in prices.items())).argmin(axis=1)
    if len(problem.budgets) > 1:  # the thriftiest over all resources: the likeliest to be feasible at all
        share = np.zeros(problem.loss.shape)
        for name in problem.budgets:
            share += problem.costs[name] / (float(np.ptp(problem.costs[name], axis=1).sum()) or 1.0)
        yield np.where(problem.allowed, share, np.inf).argmin(axis=1)


def _relaxed(problem: Problem, until: float) -> tuple[Mapping[str, float], Choice]:
    """Prices for the linear relaxation, exact or nearly so, and its rounded solution."""
    if len(problem.budgets) == 1:
        return _one_price(problem)
    if len(problem.budgets) > 1 and problem.loss.size > _LARGEST_PROGRAM:
        return prices_by_cuts(problem, until)
    return _prices(problem)


def _one_price(problem: Problem) -> tuple[dict[str, float], Choice]:
    """The optimal price of the only budget, and the last choice of the equal-slope path that it allows."""
    (resource,) = problem.budgets
    steps = path(problem, resource)
    stop = affordable_steps(problem, steps, resource)
    price = -float(steps.slope[stop]) if stop < len(steps.slope) else 0.0
    return {resource: price}, steps.choices(stop)


def _prices(problem: Problem) -> tuple[Mapping[str, float], Choice]:
    """Optimal prices of the linear relaxation for any number of budgets, and its largest option per unit."""
    names = list(problem.budgets)
    allowed = problem.allowed
    units, options = np.nonzero(allowed)
    loss = problem.loss[allowed]
    loss_scale = float(np.abs(loss).max()) or 1.0
    rows, room, scales = _rows(problem, names)
    one_each = sparse.coo_array((np.ones(len(units)), (units, np.arange(len(units)))))
    result = linprog(
        loss / loss_scale,
        A_ub=rows if names else None,
        b_ub=room if names else None,
        A_eq=one_each.tocsr(),
        b_eq=np.ones(problem.units),
        method="highs",
    )
    if result.status == 2:
        raise InfeasibleProblem(problem.least_costs(), problem.budgets)
    if result.status != 0:  # numerical trouble: prices of zero prove a bound too, only a weaker one
        return dict.fromkeys(names, 0.0), np.where(allowed, problem.loss, np.inf).argmin(axis=1)
    duals = np.maximum(-np.asarray(result.ineqlin.marginals), 0) * loss_scale / scales if names else []
    share = np.zeros(problem.loss.shape)
    share[units, options] = result.x
    return {name: float(v) for name, v in zip(names, duals, strict=True)}, share.argmax(axis=1)


def _rows(problem: Problem, names: list[str]) -> tuple[Floats, Floats, Floats]:
    """Budget rows relative to the cheapest option of each unit, scaled to 1: (rows, right sides, scales)."""
    rows: list[Floats] = []
    room: list[float] = []
    scales: list[float] = []
    for name in names:
        cost = np.where(problem.allowed, problem.costs[name], np.inf)
        extra = (cost - cost.min(axis=1, keepdims=True))[problem.allowed]
        scale = float(extra.max()) or 1.0
        rows.append(extra / scale)
        room.append((problem.budgets[name] - problem.least_costs()[name]) / scale)
        scales.append(scale)
    return np.array(rows), np.array(room), np.array(scales)
