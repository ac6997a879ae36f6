"""What allocation tells the plan and the report: the solution, the curve around it, every site's options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler.formats.varied import plain
from qcompiler.passes.plan.candidates import Menu, site_bits
from qcompiler.passes.plan.ledger import Ledger
from qcompiler.passes.plan.losses import Losses
from qcompiler.passes.plan.variants import variant_of
from qcompiler.plan import SitePlan
from qcompiler.solvers.hull import path
from qcompiler.solvers.problem import Problem, Solution, without_ties

_CURVE_POINTS = 100


def solution_facts(
    budgets: Sequence[str], ledger: Ledger, problem: Problem, solution: Solution, size: int
) -> dict[str, Any]:
    """What the plan carries of its solution.

    Args:
        budgets: as they were given.
        ledger: that the problem was made from.
        problem: that the solution answers.
        solution: the answer.
        size: stored bytes of the whole model under the plan.
    """
    bits = ledger.average(problem.used(solution.choice, "bits"))
    return {
        "budgets": list(budgets),
        "predicted_loss": solution.objective,
        "lower_bound": solution.bound if math.isfinite(solution.bound) else None,
        "gap": solution.gap if math.isfinite(solution.gap) else None,
        "method": solution.method,
        "status": solution.status,
        "prices": dict(solution.multipliers),
        "seconds": solution.seconds,
        "bits_per_weight": bits if ledger.weights else None,
        "stored_bytes": size,
        "chosen": [bits, solution.objective],
        "curve": _curve(ledger, problem),
    }


def gap_text(solution: Solution) -> str:
    """How far the loss may be from the least possible one, in words."""
    return f"gap {solution.gap:.2%}" if math.isfinite(solution.gap) else f"no bound ({solution.method})"


def _curve(ledger: Ledger, problem: Problem) -> list[list[float]]:
    """Average bits and predicted loss along the equal-slope path; terms between sites counted, not optimised."""
    if not ledger.menus:
        return []
    merged, members = without_ties(problem)
    steps = path(replace(merged, cross=None, pair_costs={}), "bits")
    stops = np.unique(np.linspace(0, len(steps.unit), _CURVE_POINTS).round().astype(int))
    points: list[list[float]] = []
    for stop in stops:
        choice = steps.choices(int(stop))[members]
        loss = problem.objective(choice)
        if not points or loss < points[-1][1]:
            points.append([ledger.average(problem.used(choice, "bits")), loss])
    return points


def site_table(ledger: Ledger, losses: Losses, solution: Solution) -> list[dict[str, Any]]:
    """One row a site, for the report: what was chosen, and what every option would have cost and lost."""
    rows = zip(ledger.menus, losses.rows, losses.noise, solution.choice, strict=True)
    return [_row(m, row, noise, int(o)) for m, row, noise, o in rows]


def _row(m: Menu, losses: Sequence[float], noise: Sequence[float], chosen: int) -> dict[str, Any]:
    def option(plan: SitePlan, loss: float, error: float) -> dict[str, Any]:
        assert plan.weight is not None
        stored = site_bits(m.site, plan)
        finite = loss if math.isfinite(loss) else None
        facts = {
            "spec": str(plain(plan.weight)),
            "variant": variant_of(plan),
            "width": plan.weight.bits,
            "bits": stored,
            "loss": finite,
        }
        return {**facts, "noise": error if math.isfinite(error) else None}

    options = [option(*facts) for facts in zip(m.plans, losses, noise, strict=True)]
    site = m.site
    activation = m.plans[chosen].activation_text
    facts = {"site": site.name, "op": site.op, "weights": site.count, "activation": activation}
    return {
        **facts,
        **options[chosen],
        "bytes": -(-int(options[chosen]["bits"]) // 8),
        "chosen": chosen,
        "options": options,
    }
