"""`solve`: the front door."""

from __future__ import annotations

import time
from dataclasses import replace

from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.problem import Problem, Solution

_METHODS = {"auto": solve_ilp, "ilp": solve_ilp, "lagrangian": solve_lagrangian}


def solve(problem: Problem, method: str = "auto", deadline: float = 60.0) -> Solution:
    """Solve a separable problem.

    Args:
        problem: without quadratic terms.
        method: "lagrangian" (fast, gap of a fraction of a percent) or "ilp" (from that start to proven
            optimality); "auto" is "ilp", whose core stays small at any size.
        deadline: seconds.

    Raises:
        InfeasibleProblem, NoChoiceFound: see the solvers.
        ValueError: an unknown method, or quadratic terms.
    """
    if method not in _METHODS:
        raise ValueError(f"unknown method '{method}': use one of {', '.join(_METHODS)}")
    start = time.monotonic()
    return replace(_METHODS[method](problem, deadline), seconds=time.monotonic() - start)
