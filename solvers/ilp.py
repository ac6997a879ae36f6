"""The integer program, through PuLP: HiGHS, or CBC where HiGHS is not usable.

The Lagrangian solver goes first. Its bound removes every option that no better choice can contain
(reduced-cost fixing), so what the integer solver sees is small and of one scale: absolute tolerances of
1e-6 would otherwise merge options whose losses span ten decades.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pulp

from qcompiler.solvers import clock
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.problem import Choice, Floats, InfeasibleProblem, NoChoiceFound, Problem, Solution, separable
from qcompiler.solvers.program import ACCURACY, Answer, check_engine, run

_TIGHTER = (0.0, 0.0, 0.0, 0.0, 1e-7, 1e-6)  # relative, of the budgets, in the attempts to solve one program
MANY_BUDGETS = 32
LARGEST = 60_000  # variables; PuLP takes seconds to build more, and HiGHS rarely closes them


def solve_ilp(problem: Problem, deadline: float = 60.0, engine: str = "highs") -> Solution:
    """Solve to proven optimality where the deadline allows.

    Args:
        problem: without quadratic terms.
        deadline: seconds. When it passes, the best choice and bound known are returned as "feasible".
        engine: "highs" or "cbc".

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
        NoChoiceFound: time ran out before one was found.
        ValueError: quadratic terms, or an unknown engine.
    """
    check_engine(engine)
    start = time.monotonic()
    merged, members = separable(problem)
    known = _known(merged, deadline / 3)
    if known is not None and known.status == "optimal":
        return replace(known, choice=known.choice[members], method="ilp")
    options = merged.allowed if known is None else useful(merged, known, known.objective)
    if known is not None and np.count_nonzero(options[options.sum(axis=1) > 1]) > LARGEST:
        return replace(known, choice=known.choice[members], method="ilp", seconds=time.monotonic() - start)
    answer = solve_core(merged, options, start + deadline, engine)
    if answer.infeasible and known is None:
        raise InfeasibleProblem(merged.least_costs(), merged.budgets)
    choice = _better(merged, answer.choice, known)
    if choice is None:
        raise NoChoiceFound("time ran out before a feasible choice was found")
    objective = merged.objective(choice)
    # An infeasible core means that no choice is better than the known one.
    bound = objective if answer.infeasible else answer.bound
    bound = min(objective, max(bound, known.bound if known else -math.inf))
    proven = objective - bound <= allowance(merged, options, objective)
    prices = known.multipliers if known else {}
    status = "optimal" if proven else "feasible"
    return Solution(choice[members], objective, bound, "ilp", status, time.monotonic() - start, prices)


def _known(problem: Problem, deadline: float) -> Solution | None:
    """The Lagrangian solution, unless there are so many prices to find that the program alone is quicker."""
    if len(problem.budgets) > MANY_BUDGETS:
        return None
    try:
        return solve_lagrangian(problem, deadline)
    except NoChoiceFound:
        return None


def useful(problem: Problem, known: Solution, cutoff: float) -> npt.NDArray[np.bool_]:
    """Bool [units, options]: what a choice of at most the loss `cutoff` may contain, by the prices of a solution."""
    priced = problem.loss + sum(price * problem.costs[n] for n, price in known.multipliers.items())
    reduced = priced - priced.min(axis=1, keepdims=True)
    margin = 1e-9 * max(abs(cutoff), abs(known.bound))
    kept = reduced <= cutoff - known.bound + margin
    kept[np.arange(problem.units), known.choice] = True
    return kept


def _better(problem: Problem, choice: Choice | None, known: Solution | None) -> Choice | None:
    if choice is None or (known is not None and known.objective <= problem.objective(choice)):
        return None if known is None else known.choice
    return choice


def _scale(problem: Problem, options: npt.NDArray[np.bool_]) -> float:
    low = np.where(options, problem.loss, np.inf).min(axis=1)
    high = np.where(options, problem.loss, -np.inf).max(axis=1)
    return float((high - low).max(initial=0.0)) or 1.0


def allowance(problem: Problem, options: npt.NDArray[np.bool_], objective: float) -> float:
    """How far below an optimum's loss the integer solver's bound may lie."""
    return 2 * ACCURACY * _scale(problem, options) + 1e-12 * abs(objective)


def solve_core(
    problem: Problem,
    options: npt.NDArray[np.bool_],
    until: float,
    engine: str = "highs",
    excluded: Sequence[Choice] = (),
) -> Answer:
    """Solve the integer program over some of the options.

    A choice that is over budget by less than the solver's tolerance is forbidden and the program solved again; where
    there are many such, at last with tighter budgets, and then the bound is what was proven before.

    Args:
        problem: without ties and quadratic terms.
        options: bool [units, options], at least one a unit.
        until: on the clock of `time.monotonic`.
        engine: "highs" or "cbc".
        excluded: choices that are no answer ("no-good" cuts).
    """
    if (options.sum(axis=1) == 1).all():
        return _only(problem, options, excluded)
    low = np.where(options, problem.loss, np.inf).min(axis=1)
    scale = _scale(problem, options)
    cuts, bound = list(excluded), -math.inf
    for tighter in _TIGHTER:
        left = until - clock.now()
        if left <= 0.05:
            break
        program, variables = _program(problem, options, (problem.loss - low[:, None]) / scale, tighter)
        for choice in cuts:
            _exclude(program, variables, options, choice)
        answer = run(program, variables, options, left, engine)
        if not tighter:
            bound = math.fsum(low) + scale * (answer.bound - ACCURACY)
        if answer.choice is None or problem.feasible(answer.choice):
            return Answer(answer.choice, bound, answer.optimal and not tighter, answer.infeasible and not tighter)
        cuts.append(answer.choice)
    return Answer(None, bound, False, False)


def _only(problem: Problem, options: npt.NDArray[np.bool_], excluded: Sequence[Choice]) -> Answer:
    """The answer where every unit has one option."""
    choice = options.argmax(axis=1)
    if not problem.feasible(choice) or any((choice == other).all() for other in excluded):
        return Answer(None, -math.inf, False, True)
    return Answer(choice, problem.objective(choice), True, False)


def _program(
    problem: Problem, options: npt.NDArray[np.bool_], loss: Floats, tighter: float
) -> tuple[pulp.LpProblem, dict[tuple[int, int], pulp.LpVariable]]:
    """The program over the units that have more than one option left; `loss` is 0 for the others."""
    program = pulp.LpProblem("allocation", pulp.LpMinimize)
    free = np.flatnonzero(options.sum(axis=1) > 1)
    keys = [(int(free[u]), int(o)) for u, o in np.argwhere(options[free])]
    x = {key: pulp.LpVariable(f"x_{key[0]}_{key[1]}", cat=pulp.LpBinary) for key in keys}
    program += pulp.LpAffineExpression([(x[key], float(loss[key])) for key in keys])
    for unit in free.tolist():
        chosen = [(x[unit, int(o)], 1) for o in np.flatnonzero(options[unit])]
        program += pulp.LpAffineExpression(chosen) == 1
    for name, budget in problem.budgets.items():
        cost = problem.costs[name]
        least = np.where(options, cost, np.inf).min(axis=1)
        scale = float((cost - least[:, None])[options].max(initial=0.0)) or 1.0
        row = [(x[key], float((cost[key] - least[key[0]]) / scale)) for key in keys]
        room = (budget - math.fsum(least)) / scale
        program += pulp.LpAffineExpression(row) <= room - tighter * max(1.0, abs(room))
    return program, x


def _exclude(
    program: pulp.LpProblem,
    variables: dict[tuple[int, int], pulp.LpVariable],
    options: npt.NDArray[np.bool_],
    choice: Choice,
) -> None:
    """Forbid one choice, unless options that are not there forbid it already."""
    if not options[np.arange(len(options)), choice].all():
        return
    chosen = [(x, 1) for (unit, option), x in variables.items() if choice[unit] == option]
    program += pulp.LpAffineExpression(chosen) <= len(chosen) - 1
