"""From a problem to the choice that is taken: solve it, run the best answers, take the one with the least true loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler import registry
from qcompiler.measure.rerank import rerank
from qcompiler.measure.true_loss import TrueLoss
from qcompiler.solvers.k_best import k_best
from qcompiler.solvers.problem import Choice, NoChoiceFound, Problem, Solution
from qcompiler.solvers.quadratic import solve_quadratic
from qcompiler.solvers.solve import solve

SECONDS = 30.0  # of a solver
SEPARABLE = ("lagrangian", "ilp")  # solvers that see no terms between units
GAP = 0.005  # between a predicted loss and its bound: predictions are no better than that
_WEIGHTS_OF_RUNS = 1 << 28  # weights that re-ranking may quantize in all


def solved(problem: Problem, method: str) -> Solution:
    """The solver's answer, with alternatives.

    Raises:
        InfeasibleProblem, NoChoiceFound: see the solvers.
    """
    if method == "quadratic" or (method == "auto" and not problem.separable):
        return solve_quadratic(problem, SECONDS, GAP)
    if method == "auto":
        return solve(problem, deadline=SECONDS)
    return registry.find("solvers", method)(problem, SECONDS)


def contenders(problem: Problem, solution: Solution, most: int) -> list[Choice]:
    """Distinct feasible choices worth running, the solver's own first, then the one that sees no cross terms."""
    found = [solution.choice]
    if most > 1 and problem.separable:
        found += [other.choice for other in k_best(problem, most, SECONDS / 3)]
    elif most > 1:
        alone = replace(problem, cross=None)
        with suppress(NoChoiceFound):
            found.append(solve(alone, deadline=SECONDS / 3).choice)
        found += solution.alternatives
    distinct = {choice.tobytes(): choice for choice in (np.asarray(c, np.intp) for c in found)}
    return [choice for choice in distinct.values() if problem.feasible(choice)][:most]


def runs(wanted: int, weights: int) -> int:
    """How many choices to run: as many as wanted, fewer (but two) for large models, the same on every machine."""
    return min(wanted, max(2, _WEIGHTS_OF_RUNS // max(weights, 1)))


def reranked(problem: Problem, solution: Solution, truth: TrueLoss, choices: Sequence[Choice]) -> tuple[Solution, Any]:
    """The solution with the choice of least true loss, and what the runs said, for the report."""
    predicted = [problem.objective(choice) for choice in choices]
    result = rerank(truth, choices, predicted)
    facts = {
        "predicted": predicted,
        "true": [float(v) for v in result.true],
        "taken": result.index,
        "gain": result.gain,
        "noise": result.noise,
        "samples": truth.used,
    }
    if result.index == 0:
        return solution, facts
    objective = problem.objective(result.choice)
    changed = replace(solution, choice=result.choice, objective=objective, status="feasible")
    return changed, facts
