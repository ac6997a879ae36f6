"""Budgets that cannot be met, alone or together: found before long work, and told in the budgets' own units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qcompiler.budget import Budget
from qcompiler.errors import BudgetInfeasible
from qcompiler.passes.plan.ledger import Ledger, tightest
from qcompiler.passes.plan.pairs import Pairs
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, Solution
from qcompiler.solvers.solve import solve

_SECONDS = 4.0  # of a solver, for the least of one resource within the budgets of the others


def require_feasible(ledger: Ledger, budgets: Sequence[Budget], ties: Sequence[tuple[int, ...]], pairs: Pairs) -> None:
    """Raise BudgetInfeasible if it is proven that no choice of options meets all budgets, whatever it loses."""
    if not pairs.width:
        ledger.require_feasible(budgets, ties)
    blank = [[0.0] * len(m.plans) for m in ledger.menus]
    problem = pairs.held(ledger.problem(blank, budgets, ties), ledger.menus)
    if len(problem.budgets) < 2:
        return
    name = next(iter(problem.budgets))
    try:
        found = _least(problem, name)
    except InfeasibleProblem:
        raise conflict(ledger, problem, budgets) from None
    if found is not None and found.bound > problem.budgets[name]:
        raise conflict(ledger, problem, budgets)


def conflict(ledger: Ledger, problem: Problem, budgets: Sequence[Budget], proven: bool = True) -> BudgetInfeasible:
    """The error for a problem without a feasible choice: which budgets conflict, and what would be enough of each.

    Args:
        ledger: that the problem was made from.
        problem: options that must not be taken have an infinite loss.
        budgets: all that hold.
        proven: whether there is no feasible choice, or none was found.
    """
    enough: dict[Budget, Solution] = {}
    asked = tightest(budgets)
    for budget in asked:
        try:
            found = _least(problem, budget.resource)
        except InfeasibleProblem:  # the others conflict without it
            continue
        if found is not None:
            enough[budget] = found
    named = " and ".join(map(str, enough if len(enough) > 1 else asked))
    together = " together" if len(asked) > 1 else ""
    what = f"the budgets {named} cannot be met{together}" if len(asked) > 1 else f"the budget {named} cannot be met"
    if not proven:
        what = f"no allocation was found that meets {named}{together}"
    values = [ledger.show(budget, solution.objective) for budget, solution in enough.items()]
    beside = " if the others stay" if len(asked) > 1 else ""
    return BudgetInfeasible(what, fix=f"enough would be {' or '.join(values)}{beside}" if values else "")


def _least(problem: Problem, resource: str) -> Solution | None:
    """The choice that takes least of a resource within the other budgets; None where none was found in time.

    Raises:
        InfeasibleProblem: the other budgets exclude each other.
    """
    cost = np.where(problem.allowed, problem.costs[resource], np.inf)
    others = {name: budget for name, budget in problem.budgets.items() if name != resource}
    try:
        return solve(replace(problem, loss=cost, budgets=others, cross=None), deadline=_SECONDS)
    except NoChoiceFound:
        return None
