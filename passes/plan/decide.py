"""From a problem to the choice that is taken: solve it, run the best answers, take the one with the least true loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from qcompiler import registry
from qcompiler.measure.rerank import rerank
from qcompiler.measure.true_loss import TrueLoss, held_back
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Menu
from qcompiler.solvers.k_best import k_best
from qcompiler.solvers.problem import Choice, NoChoiceFound, Problem, Solution
from qcompiler.solvers.quadratic import solve_quadratic
from qcompiler.solvers.solve import solve

SECONDS = 4.0  # of a solver; more has not changed what is taken
SEPARABLE = ("lagrangian", "ilp")  # solvers that see no terms between units
GAP = 0.01  # between a predicted loss and its bound: predictions are no better than that
_MARGIN = 2.0  # standard errors: what is a little better on some calibration data is often worse on other data
_MARGIN_OF_ALL = 1.0  # where there is no other data
_TIMES = 2  # as many samples to run whole allocations on as to measure single losses
_MOST_WEIGHTS = 1 << 25
_WEIGHTS_OF_RUNS = 1 << 24  # weights that re-ranking may quantize in all


def solved(problem: Problem, method: str, seconds: float = SECONDS) -> Solution:
    """The solver's answer, with alternatives, within some seconds.

    Raises:
        InfeasibleProblem, NoChoiceFound: see the solvers.
    """
    if method == "quadratic" or (method == "auto" and not problem.separable):
        return solve_quadratic(problem, seconds, GAP)
    if method == "auto":
        return solve(problem, deadline=seconds)
    return registry.find("solvers", method)(problem, seconds)


def contenders(problem: Problem, solution: Solution, most: int) -> list[Solution]:
    """Distinct feasible answers worth running: that of the problem without cross terms, the solver's, the next best.

    Loss and bound of the first are those of the problem without cross terms, of all others those of the whole problem.
    """
    found = [solution]
    if most > 1 and problem.separable:
        found += [_instead(problem, solution, other.choice) for other in k_best(problem, most, SECONDS)]
    elif most > 1:
        with suppress(NoChoiceFound):
            found.insert(0, solve(replace(problem, cross=None), deadline=SECONDS))
        found += [_instead(problem, solution, choice) for choice in solution.alternatives]
    distinct: dict[bytes, Solution] = {}
    for answer in found:
        distinct.setdefault(answer.choice.tobytes(), answer)
    return [answer for answer in distinct.values() if problem.feasible(answer.choice)][:most]


def _instead(problem: Problem, solution: Solution, choice: Choice) -> Solution:
    return replace(solution, choice=choice, objective=problem.objective(choice), status="feasible")


def runs(wanted: int, weights: int) -> int:
    """How many choices to run: as many as wanted, fewer for larger models, for large ones none; on every machine alike.

    1 means none: a run holds all weights in float32, quantized.
    """
    return 1 if weights > _MOST_WEIGHTS else min(wanted, max(2, _WEIGHTS_OF_RUNS // max(weights, 1)))


def judge(model: Model, menus: Sequence[Menu], used: int) -> tuple[TrueLoss, float]:
    """Who judges whole allocations, and by how many standard errors another choice must be better than the first.

    Losses are taken on samples that nothing was measured on, where there are enough of them.

    Args:
        model: with calibration data.
        menus: of the sites that are decided.
        used: samples that the losses were measured on; 0 if none were.
    """
    sites, plans = [m.site for m in menus], [list(m.plans) for m in menus]
    rest = held_back(model, used, _TIMES) if used else None
    if rest is None:
        return TrueLoss(model, sites, plans, samples=used), _MARGIN_OF_ALL
    return TrueLoss(model, sites, plans, samples=rest.count, data=rest), _MARGIN


def reranked(truth: TrueLoss, margin: float, answers: Sequence[Solution]) -> tuple[Solution, dict[str, Any]]:
    """The answer with the least true loss, and what the runs said, for the report.

    The first, which rests on the fewest measured numbers, is left only for one that is clearly better.
    """
    predicted = [answer.objective for answer in answers]
    result = rerank(truth, [answer.choice for answer in answers], predicted, margin)
    differences = [truth.difference(answers[0].choice, answer.choice) for answer in answers]
    facts = {
        "methods": [answer.method for answer in answers],
        "predicted": predicted,
        "true": [float(v) for v in result.true],
        "gains": [gain for gain, _ in differences],
        "errors": [error for _, error in differences],
        "margin": margin,
        "taken": result.index,
        "gain": result.gain,
        "noise": result.noise,
        "samples": truth.used,
    }
    return answers[result.index], facts
