"""The integer program, through PuLP: HiGHS, or CBC where HiGHS is not usable.

The Lagrangian solver goes first. Its bound removes every option that no better choice can contain
(reduced-cost fixing), so what the integer solver sees is small and of one scale: absolute tolerances of
1e-6 would otherwise merge options whose losses span ten decades.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pulp

from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.problem import Choice, Floats, InfeasibleProblem, NoChoiceFound, Problem, Solution, separable

_ACCURACY = 1e-7  # of the integer solvers' bounds, on losses scaled to 1


@dataclass(frozen=True)
class _Answer:
    choice: Choice | None
    bound: float
    optimal: bool
    infeasible: bool


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
    if engine not in ("highs", "cbc"):
        raise ValueError(f"unknown engine '{engine}'")
    start = time.monotonic()
    merged, members = separable(problem)
    try:
        known = solve_lagrangian(merged, deadline / 3)
    except NoChoiceFound:
        known = None
    if known is not None and known.status == "optimal":
        return replace(known, choice=known.choice[members], method="ilp")
    options = _useful(merged, known)
    answer = _solved(merged, options, start + deadline, engine)
    if answer.infeasible and known is None:
        raise InfeasibleProblem(merged.least_costs(), merged.budgets)
    choice = _better(merged, answer.choice, known)
    if choice is None:
        raise NoChoiceFound("time ran out before a feasible choice was found")
    objective = merged.objective(choice)
    # An infeasible core means that no choice is better than the known one.
    bound = objective if answer.infeasible else answer.bound
    bound = min(objective, max(bound, known.bound if known else -math.inf))
    proven = answer.infeasible or (answer.optimal and objective - bound <= _allowance(merged, options, objective))
    prices = known.multipliers if known else {}
    status = "optimal" if proven else "feasible"
    return Solution(choice[members], objective, bound, "ilp", status, time.monotonic() - start, prices)


def _useful(problem: Problem, known: Solution | None) -> npt.NDArray[np.bool_]:
    """Bool [units, options]: options that a choice better than the known one may contain."""
    if known is None:
        return problem.allowed
    priced = problem.loss + sum(price * problem.costs[n] for n, price in known.multipliers.items())
    reduced = priced - priced.min(axis=1, keepdims=True)
    margin = 1e-9 * max(abs(known.objective), abs(known.bound))
    useful = reduced <= known.objective - known.bound + margin
    useful[np.arange(problem.units), known.choice] = True
    return useful


def _better(problem: Problem, choice: Choice | None, known: Solution | None) -> Choice | None:
    if choice is None or (known is not None and known.objective <= problem.objective(choice)):
        return None if known is None else known.choice
    return choice


def _scale(problem: Problem, options: npt.NDArray[np.bool_]) -> float:
    low = np.where(options, problem.loss, np.inf).min(axis=1)
    high = np.where(options, problem.loss, -np.inf).max(axis=1)
    return float((high - low).max(initial=0.0)) or 1.0


def _allowance(problem: Problem, options: npt.NDArray[np.bool_], objective: float) -> float:
    return 2 * _ACCURACY * _scale(problem, options) + 1e-12 * abs(objective)


def _solved(problem: Problem, options: npt.NDArray[np.bool_], until: float, engine: str) -> _Answer:
    """Solve the program over the given options; a choice over budget by a tolerance is solved again, tighter."""
    low = np.where(options, problem.loss, np.inf).min(axis=1)
    scale = _scale(problem, options)
    tighter, first = 0.0, None
    for _ in range(4):
        left = until - time.monotonic()
        if left <= 0.05:
            break
        program, variables = _program(problem, options, (problem.loss - low[:, None]) / scale, tighter)
        answer = _run(program, variables, engine, left, options)
        first = first or answer
        if answer.choice is None or problem.feasible(answer.choice):
            bound = math.fsum(low) + scale * (first.bound - _ACCURACY)
            untouched = answer is first
            return _Answer(answer.choice, bound, answer.optimal and untouched, answer.infeasible and untouched)
        tighter = max(4 * tighter, 1e-7)
    bound = -math.inf if first is None else math.fsum(low) + scale * (first.bound - _ACCURACY)
    return _Answer(None, bound, False, False)


def _program(
    problem: Problem, options: npt.NDArray[np.bool_], loss: Floats, tighter: float
) -> tuple[pulp.LpProblem, dict[tuple[int, int], pulp.LpVariable]]:
    program = pulp.LpProblem("allocation", pulp.LpMinimize)
    keys = [(int(u), int(o)) for u, o in np.argwhere(options)]
    x = {key: pulp.LpVariable(f"x_{key[0]}_{key[1]}", cat=pulp.LpBinary) for key in keys}
    program += pulp.LpAffineExpression([(x[key], float(loss[key])) for key in keys])
    for unit in range(problem.units):
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


def _run(
    program: pulp.LpProblem,
    variables: dict[tuple[int, int], pulp.LpVariable],
    engine: str,
    seconds: float,
    options: npt.NDArray[np.bool_],
) -> _Answer:
    highs = pulp.HiGHS(msg=False, timeLimit=seconds, gapRel=0.0, gapAbs=1e-9, threads=1)
    if engine == "highs" and highs.available():
        program.solve(highs)
        # PuLP calls a HiGHS run that timed out "Optimal": the bound is asked of HiGHS itself.
        model: Any = program.solverModel
        bound = float(model.getInfo().mip_dual_bound)
    else:
        program.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, gapRel=0.0, gapAbs=1e-9, threads=1))
        bound = math.nan
    optimal = program.sol_status == pulp.LpSolutionOptimal
    infeasible = program.sol_status == pulp.LpSolutionInfeasible and program.status == pulp.LpStatusInfeasible
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return _Answer(None, bound if math.isfinite(bound) else -math.inf, False, infeasible)
    if math.isnan(bound):  # CBC tells no bound: its objective is one where it proved optimality
        bound = float(cast(float, pulp.value(program.objective))) if optimal else -math.inf
    share = np.full(options.shape, -1.0)
    for key, variable in variables.items():
        share[key] = variable.varValue or 0.0
    return _Answer(share.argmax(axis=1), bound, optimal, False)
