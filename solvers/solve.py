"""`solve`: the front door."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from qcompiler import registry
from qcompiler.solvers.problem import Problem, Solution


def solve(problem: Problem, method: str = "auto", deadline: float = 60.0) -> Solution:
    """Solve an allocation problem.

    Args:
        problem: separable, or with terms between units.
        method: a solver's name (`registry.names("solvers")`); "auto" takes "ilp" for a separable problem (from the
            Lagrangian solution to proven optimality, its core stays small at any size), "quadratic" for any other.
        deadline: seconds; when they have passed, the best choice and bound known are returned.

    Returns:
        The choice, with its loss, a lower bound, and which method found them.

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
        NoChoiceFound: none was found in time.
        ValueError: an unknown method, or one that does not take what the problem has.
    """
    known = registry.names("solvers")
    if method != "auto" and method not in known:
        raise ValueError(f"unknown method '{method}': use auto, {', '.join(sorted(known))}")
    name = method if method != "auto" else "ilp" if problem.separable else "quadratic"
    solver: Callable[[Problem, float], Solution] = registry.find("solvers", name)
    start = time.monotonic()
    return replace(solver(problem, deadline), seconds=time.monotonic() - start)
