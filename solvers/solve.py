"""`solve`: the front door."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from qcompiler.solvers.clock import interrupted, interruptible
from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.metropolis import solve_metropolis
from qcompiler.solvers.policy_search import solve_policy_search
from qcompiler.solvers.problem import NoChoiceFound, Problem, Solution
from qcompiler.solvers.quadratic import solve_quadratic
from qcompiler.solvers.soft_mixture import solve_soft_mixture

METHODS: dict[str, Callable[[Problem, float], Solution]] = {
    "lagrangian": solve_lagrangian,
    "ilp": solve_ilp,
    "quadratic": solve_quadratic,
    "metropolis": solve_metropolis,
    "soft-mixture": solve_soft_mixture,
    "policy-search": solve_policy_search,
}


def solve(problem: Problem, method: str = "auto", deadline: float = 60.0) -> Solution:
    """Solve an allocation problem.

    Args:
        problem: separable, or with terms between units.
        method: one of `METHODS`; "auto" takes "ilp" for a separable problem (from the
            Lagrangian solution to proven optimality, its core stays small at any size), "quadratic" for any other.
        deadline: seconds; when they have passed, or at Ctrl-C, the best choice and bound known are returned (see
            `clock`).

    Returns:
        The choice, with its loss, a lower bound, and which method found them.

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
        NoChoiceFound: none was found in time.
        KeyboardInterrupt: none was found before it came.
        ValueError: an unknown method, or one that does not take what the problem has.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f"unknown method '{method}': use auto, {', '.join(METHODS)}")
    name = method if method != "auto" else "ilp" if problem.separable else "quadratic"
    start = time.monotonic()
    with interruptible():
        try:
            found = METHODS[name](problem, deadline)
        except NoChoiceFound:
            if interrupted():
                raise KeyboardInterrupt from None
            raise
    return replace(found, seconds=time.monotonic() - start)
