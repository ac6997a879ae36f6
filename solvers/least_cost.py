"""The dual question: the least of a resource that a given loss needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import sparse

from qcompiler.solvers.problem import InfeasibleProblem, Problem, Solution
from qcompiler.solvers.solve import solve


def least_cost(
    problem: Problem, resource: str, most_loss: float, method: str = "auto", deadline: float = 60.0
) -> Solution:
    """Minimise the use of a resource with a total loss of at most `most_loss` and within the other budgets.

    A budget of the resource itself is not looked at: its least use is the answer. The problem is solved with the roles
    exchanged, so cross terms of the loss become pair costs and the method must take those.

    Args:
        problem: quadratic terms included.
        resource: one of its costs.
        most_loss: what the loss may be, finite.
        method: as in `solve`.
        deadline: seconds, as in `solve`.

    Returns:
        A solution whose `objective` and `bound` are amounts of the resource. Its prices belong to `exchanged`.

    Raises:
        InfeasibleProblem: no choice is that good; `least["loss"]` is the least loss within the other budgets, or a
            proven bound of it where that is not known exactly.
        ValueError: no such resource, a limit that is not finite, terms that the method does not take.
    """
    turned, name = exchanged(problem, resource, most_loss)
    try:
        return solve(turned, method, deadline)
    except InfeasibleProblem as error:
        others = {n: b for n, b in problem.budgets.items() if n != resource}
        reached = solve(replace(problem, budgets=others), method, deadline)  # raises if these alone exclude each other
        least = reached.objective if reached.status == "optimal" else max(reached.bound, most_loss)
        raise InfeasibleProblem({**error.least, name: least}, turned.budgets) from None


def exchanged(problem: Problem, resource: str, most_loss: float) -> tuple[Problem, str]:
    """The problem whose loss is the resource and whose budget is the loss, and what the loss is called there."""
    if resource not in problem.costs:
        raise ValueError(f"there is no resource '{resource}', only {', '.join(sorted(problem.costs))}")
    if not np.isfinite(most_loss):
        raise ValueError(f"the limit of the loss is {most_loss}, and must be finite")
    name = "loss"
    while name in problem.costs:
        name += "'"
    costs = {n: cost for n, cost in problem.costs.items() if n != resource}
    costs[name] = np.where(problem.allowed, problem.loss, 0.0)
    pairs: dict[str, Any] = {n: matrix for n, matrix in problem.pair_costs.items() if n != resource}
    if problem.cross is not None:
        pairs[name] = sparse.csr_array(problem.cross)
    budgets: Mapping[str, float] = {n: b for n, b in problem.budgets.items() if n != resource}
    loss = np.where(problem.allowed, problem.costs[resource], np.inf)
    cross = problem.pair_costs.get(resource)
    return Problem(loss, costs, {**budgets, name: float(most_loss)}, problem.ties, cross, pairs), name
