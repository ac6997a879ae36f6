"""Check a solution from the problem alone, trusting no solver.

The bound is weak duality: for prices y >= 0, every feasible choice x has
loss(x) >= loss(x) + y (cost(x) - budget) >= sum over units of min over options (loss + y cost) - y budget.
Whoever has the prices can verify it in one pass over the tables; with terms between units, whoever has the messages
too (`messages.bound`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qcompiler.solvers.messages import bound
from qcompiler.solvers.pairs import PairProblem
from qcompiler.solvers.problem import Problem, Solution, separable

_TOLERANCE = 1e-9  # relative
_PROVEN = 1e-6  # of the largest spread of losses in a unit or of a pair: how far integer solvers prove an optimum
_ROUNDING = 1e-14  # of the sum of all that is added up, where much of it cancels


@dataclass(frozen=True)
class Certificate:
    """What could be recomputed.

    Attributes:
        objective: loss of the choice.
        used: cost of the choice in every resource.
        dual_bound: the bound that the solution's prices prove.
        faults: every claim of the solution that does not hold; empty if it is sound.
        proof: "dual" where prices (and messages) prove the claimed bound; "solver" where it is higher than they can
            prove, so that it rests on an integer program or a convex form.
    """

    objective: float
    used: Mapping[str, float]
    dual_bound: float
    faults: tuple[str, ...]
    proof: str

    @property
    def valid(self) -> bool:
        """No claim failed."""
        return not self.faults


def dual_bound(problem: Problem, multipliers: Mapping[str, float]) -> float:
    """The bound that prices >= 0 prove, lowered by the rounding error of computing it.

    Raises ValueError for a negative or infinite price, a price on a resource without budget, or quadratic terms.
    """
    merged, _ = separable(problem)
    if not all(name in merged.budgets and 0 <= price < math.inf for name, price in multipliers.items()):
        raise ValueError("prices must be finite, not negative, and on budgeted resources")
    priced = merged.loss + sum(price * merged.costs[name] for name, price in multipliers.items())
    paid = [price * merged.budgets[name] for name, price in multipliers.items()]
    best = priced.min(axis=1) if merged.units else np.zeros(0)
    magnitude = np.where(merged.allowed, np.abs(merged.loss), 0).max(axis=1, initial=0).sum() if merged.units else 0
    magnitude += sum(p * np.abs(merged.costs[n]).max(axis=1, initial=0).sum() for n, p in multipliers.items())
    error = 4 * np.finfo(np.float64).eps * (float(magnitude) + sum(abs(p) for p in paid))
    return math.fsum([*best, *(-p for p in paid)]) - float(error)


def _proven(problem: Problem, solution: Solution) -> float:
    if problem.separable:
        return dual_bound(problem, solution.multipliers)
    if solution.messages is None:
        return -math.inf
    pairs = PairProblem.of(problem)
    prices = np.array([solution.multipliers.get(name, 0.0) for name in pairs.problem.budgets])
    return bound(pairs, solution.messages, prices)


def check(problem: Problem, solution: Solution) -> Certificate:
    """Recompute cost, loss, feasibility, ties and bound of a solution."""
    choice = np.asarray(solution.choice)
    if choice.shape != (problem.units,) or not ((choice >= 0) & (choice < problem.loss.shape[1])).all():
        return Certificate(math.nan, {}, -math.inf, ("not one option index per unit",), "none")
    objective = problem.objective(choice)
    used = {name: problem.used(choice, name) for name in problem.costs}
    proven = _proven(problem, solution)
    slack = _TOLERANCE * max(abs(objective), abs(solution.bound), 1e-300) + _ROUNDING * _magnitude(problem)
    faults = [f"{n}: {used[n]:.17g} is over {b:.17g}" for n, b in problem.budgets.items() if used[n] > b]
    faults += [f"units {group} differ" for group in problem.ties if len({int(choice[u]) for u in group}) > 1]
    if not math.isfinite(objective):
        faults.append("an option that does not exist")
    if abs(objective - solution.objective) > slack:
        faults.append(f"the loss is {objective:.17g}, not {solution.objective:.17g}")
    if solution.bound > objective + slack:
        faults.append("the bound is above the loss of a feasible choice")
    if solution.status == "optimal" and objective - solution.bound > 1e3 * slack + _PROVEN * _spread(problem):
        faults.append("called optimal, but the bound is lower")
    proof = "dual" if solution.bound <= proven + slack else "solver"
    return Certificate(objective, used, proven, tuple(faults), proof)


def _magnitude(problem: Problem) -> float:
    """The largest sum of absolute losses and of the terms between units that a loss can be added up from."""
    own = float(np.abs(np.where(problem.allowed, problem.loss, 0.0)).max(axis=1, initial=0.0).sum())
    return own if problem.cross is None else own + 0.5 * float(abs(problem.cross).sum())


def _spread(problem: Problem) -> float:
    """The largest difference that one unit's own losses, or the terms of one pair, can make."""
    own = np.ptp(np.where(problem.allowed, problem.loss, problem.loss.min(axis=1, keepdims=True)), axis=1)
    return max(float(own.max(initial=0)), 0.0 if problem.cross is None else 2 * float(abs(problem.cross).max()))
