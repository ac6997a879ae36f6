"""The whole path of size against loss: the least predicted loss at every size, with what is proven about it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler.passes.plan.decide import GAP
from qcompiler.passes.plan.ledger import Ledger
from qcompiler.progress import Progress
from qcompiler.solvers.pareto import pareto
from qcompiler.solvers.problem import Problem, Solution
from qcompiler.solvers.quadratic import solve_quadratic
from qcompiler.solvers.solve import solve

_SECONDS = 6.0  # of a point; with GAP most take less than one


def solved_path(ledger: Ledger, problem: Problem, points: int, progress: Progress) -> list[dict[str, Any]]:
    """Solve for evenly spread sizes, from the cheapest options to those that lose least.

    Args:
        ledger: what the problem was made from.
        problem: its budgets in bits and bytes are not looked at, others hold.
        points: how many sizes.
        progress: shows how far and how long.

    Returns:
        Ascending in size: bits (average), bytes (of everything stored), loss (predicted), bound, gap (None where
        nothing is proven). A larger size never loses more.
    """
    others = {name: value for name, value in problem.budgets.items() if name not in ("bits", "bytes")}
    free = replace(problem, budgets=others)
    low = np.where(problem.allowed, problem.costs["bits"], np.inf).min(axis=1).sum()
    high = problem.used(_one(free).choice, "bits")
    amounts = np.floor(np.linspace(low, max(low, high), points))
    ticks = iter(progress.track(amounts.tolist(), "sizes"))

    def timed(at: Problem) -> Solution:
        next(ticks, None)
        return _one(at)

    found = pareto(free, "bits", amounts.tolist(), timed)
    next(ticks, None)  # the end of the bar
    return [
        {
            "bits": ledger.average(point.used),
            "bytes": int(problem.used(point.choice, "bytes")) + ledger.fixed_bytes,
            "loss": point.loss,
            "bound": point.bound if math.isfinite(point.bound) else None,
            "gap": point.gap if math.isfinite(point.bound) else None,
        }
        for point in found
    ]


def _one(problem: Problem) -> Solution:
    return solve(problem, deadline=_SECONDS) if problem.separable else solve_quadratic(problem, _SECONDS, GAP)
