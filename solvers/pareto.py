"""The whole path of loss against one resource, with a bound at every point."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from qcompiler.solvers.clock import interrupted, interruptible
from qcompiler.solvers.problem import Choice, InfeasibleProblem, NoChoiceFound, Problem, Solution
from qcompiler.solvers.solve import solve as solve_any

_POINTS = 25


@dataclass(frozen=True, eq=False)
class ParetoPoint:
    """The best choice known for an amount of a resource.

    Attributes:
        amount: the budget.
        used: what the choice uses of it.
        loss: of the choice.
        bound: no choice that uses at most `amount` has a loss below this.
        choice: int [units].
    """

    amount: float
    used: float
    loss: float
    bound: float
    choice: Choice

    @property
    def gap(self) -> float:
        """(loss - bound) / max(|loss|, |bound|), at least 0."""
        scale = max(abs(self.loss), abs(self.bound))
        return max(0.0, (self.loss - self.bound) / scale) if scale > 0 else 0.0


def pareto(
    problem: Problem,
    resource: str,
    amounts: Iterable[float] | None = None,
    solve: Callable[[Problem], Solution] = solve_any,
) -> list[ParetoPoint]:
    """Solve for every amount of a resource, cheapest first; the other budgets stay.

    Along the path the loss never rises and the bound never does: a choice that fits a budget fits a larger one, and
    what no choice within a larger budget can reach, none within a smaller one can.

    Ctrl-C ends it, with the points found.

    Args:
        problem: quadratic terms included, if `solve` takes them.
        resource: one of its costs; its own budget is replaced.
        amounts: budgets in any order; by default 25 of them, spread evenly between what the cheapest choice uses
            and what the best one uses.
        solve: the solver of each point.

    Returns:
        One point per amount, ascending, without those that no choice was found for.

    Raises:
        InfeasibleProblem: not even the largest amount allows a choice.
        NoChoiceFound: nor was one found for any other.
        ValueError: no such resource, no amounts, or one that is not finite.
    """
    if resource not in problem.costs:
        raise ValueError(f"there is no resource '{resource}', only {', '.join(sorted(problem.costs))}")
    budgets = sorted({float(a) for a in (_spread(problem, resource, solve) if amounts is None else amounts)})
    if not budgets or not np.isfinite(budgets).all():
        raise ValueError("amounts must be finite, and at least one")
    points: list[ParetoPoint] = []
    missing: InfeasibleProblem | NoChoiceFound | None = None
    with interruptible():
        for amount in budgets:
            try:
                found = _point(replace(problem, budgets={**problem.budgets, resource: amount}), resource, solve)
            except (InfeasibleProblem, NoChoiceFound) as error:
                missing = error
                found = None
            points += _after(points, found, amount)
            if interrupted():
                break
    if not points:
        assert missing is not None
        raise missing
    return _with_later_bounds(points)


def _point(problem: Problem, resource: str, solve: Callable[[Problem], Solution]) -> ParetoPoint:
    solution = solve(problem)
    used = problem.used(solution.choice, resource)
    return ParetoPoint(problem.budgets[resource], used, solution.objective, solution.bound, solution.choice)


def _after(points: list[ParetoPoint], found: ParetoPoint | None, amount: float) -> list[ParetoPoint]:
    """The point of the next amount: the previous choice where nothing better was found."""
    if points and (found is None or points[-1].loss < found.loss):
        bound = -np.inf if found is None else min(found.bound, points[-1].loss)
        return [replace(points[-1], amount=amount, bound=bound)]
    return [] if found is None else [found]


def _with_later_bounds(points: list[ParetoPoint]) -> list[ParetoPoint]:
    best, result = -np.inf, list[ParetoPoint]()
    for point in reversed(points):
        best = max(best, point.bound)
        result.append(replace(point, bound=min(best, point.loss)))
    return result[::-1]


def _spread(problem: Problem, resource: str, solve: Callable[[Problem], Solution]) -> list[float]:
    """Amounts between the cheapest choice and the best one that the other budgets allow."""
    others = {name: budget for name, budget in problem.budgets.items() if name != resource}
    cheapest = replace(
        problem, loss=np.where(problem.allowed, problem.costs[resource], np.inf), cross=problem.pair_costs.get(resource)
    )
    low = solve(replace(cheapest, budgets=others)).choice
    high = solve(replace(problem, budgets=others)).choice
    least, most = problem.used(low, resource), problem.used(high, resource)
    return np.linspace(min(least, most), most, _POINTS).tolist()
