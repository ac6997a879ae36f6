"""Quadratic problems as an integer program, by the assignment linearisation (RLT, Adams and Sherali 1986).

A variable y[u,b,v,c] for every pair of options of two units, and for every option b of u and every unit v

    sum_c y[u,b,v,c] = x[u,b].

Of the linearisations this is the one whose relaxation is worth having: it takes the raw matrix, indefinite or not,
where McCormick's inequalities bound a dense matrix with signs by nothing useful. y is integral where x is, so only x
is declared so. Options that no better choice can contain are left out beforehand.

Pairs beyond what a solver can take are left out too, those with the smallest range first, each for the least it may
add; terms are moved to the units by the messages of `messages` before, so that what is left in a pair is small. The
bound stays true, and what is lost to it is at most the sum of those ranges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pulp

from qcompiler.solvers import clock
from qcompiler.solvers import program as integer
from qcompiler.solvers.pairs import PairProblem, Terms
from qcompiler.solvers.problem import Choice, Floats

MOST_COLUMNS = 60_000  # y variables; above, PuLP and the first relaxation take minutes


@dataclass(frozen=True)
class Linearised:
    """What the integer program says.

    Attributes:
        choice: int [units], feasible, or None.
        bound: no choice within the budgets of the given options has a loss below this.
        optimal: whether the choice is proven the best of them.
        infeasible: proven to have none.
        dropped: how much of the bound the pairs that were left out may have taken.
        accuracy: of the bound, from the integer solver's tolerance.
    """

    choice: Choice | None
    bound: float
    optimal: bool
    infeasible: bool
    dropped: float
    accuracy: float = 0.0


def linearised(
    problem: PairProblem,
    live: npt.NDArray[np.bool_],
    deadline: float,
    messages: Floats | None = None,
    engine: str = "highs",
    most_columns: int = MOST_COLUMNS,
) -> Linearised:
    """Solve over the options in `live` (bool [units, options]).

    Args:
        problem: what to solve.
        live: options that may be chosen; at least one a unit.
        deadline: on the clock of `time.monotonic`.
        messages: float64 [units, options, units] of `messages.Dual`; zeros if None.
        engine: "highs" or "cbc".
        most_columns: of pairs of options.
    """
    loss = _shifted(problem.loss, messages)
    kept, constant, dropped = _split(problem, loss, live, most_columns)
    low = np.where(live, loss.unary, np.inf).min(axis=1)
    scale = _scale(loss, live, kept)
    accuracy = scale * integer.ACCURACY
    tighter, first = 0.0, None
    for _ in range(4):
        left = deadline - clock.now()
        if left <= 0.05:
            break
        built = _program(problem, loss, live, kept, low, scale, tighter)
        if clock.now() > deadline:
            break
        answer = integer.run(*built, live, max(0.05, deadline - clock.now()), engine)
        first = first or answer
        if answer.choice is None or problem.problem.feasible(answer.choice):
            untouched = answer is first
            bound = math.fsum([*low, constant]) + scale * first.bound - accuracy
            exact = untouched and answer.optimal and dropped == 0
            return Linearised(answer.choice, bound, exact, answer.infeasible and untouched, dropped, 2 * accuracy)
        tighter = max(4 * tighter, 1e-7)
    bound = -math.inf if first is None else math.fsum([*low, constant]) + scale * first.bound - accuracy
    return Linearised(None, bound, False, False, dropped)


def columns(live: npt.NDArray[np.bool_], problem: PairProblem) -> int:
    """How many pairs of options the full linearisation has."""
    if problem.problem.separable:
        return 0
    counts = live.sum(axis=1)
    counts = counts[counts > 1]
    return int((counts.sum() ** 2 - (counts**2).sum()) // 2)


def _shifted(loss: Terms, messages: Floats | None) -> Terms:
    """The same loss with the messages moved from the pairs to the units."""
    if messages is None or loss.pair is None:
        return loss
    pair = loss.pair - messages[:, :, :, None] - messages.transpose(2, 0, 1)[:, None]
    index = np.arange(len(pair))
    pair[index, :, index, :] = 0
    total = messages.sum(axis=2) - messages[index, :, index]
    return Terms(loss.unary + total, pair)


def _split(
    problem: PairProblem, loss: Terms, live: npt.NDArray[np.bool_], most: int
) -> tuple[list[tuple[int, int]], float, float]:
    """The pairs of units that the program holds; the constant of the others; and what they may add beyond it."""
    if loss.pair is None and all(t.pair is None for t in problem.resources):
        return [], 0.0, 0.0
    found: list[tuple[float, int, int]] = []
    constant = 0.0
    needed = {(int(u), int(v)) for t in problem.resources if t.pair is not None for u, v in _coupled(t.pair)}
    for u in range(problem.units):
        for v in range(u + 1, problem.units):
            table = None if loss.pair is None else loss.pair[u][live[u]][:, v][:, live[v]]
            low, high = (0.0, 0.0) if table is None else (float(table.min()), float(table.max()))
            if (u, v) in needed:
                found.append((math.inf, u, v))
            elif high > low:
                found.append((high - low, u, v))
            else:
                constant += low
    found.sort(key=lambda item: -item[0])
    counts, taken, kept, dropped = live.sum(axis=1), 0, list[tuple[int, int]](), 0.0
    for spread, u, v in found:
        taken += int(counts[u] * counts[v])
        if taken <= most or spread == math.inf or counts[u] == 1 or counts[v] == 1:
            kept.append((u, v))
        else:
            assert loss.pair is not None
            constant += float(loss.pair[u][live[u]][:, v][:, live[v]].min())
            dropped += spread
    return kept, constant, dropped


def _coupled(pair: Floats) -> npt.NDArray[np.intp]:
    blocks = np.abs(pair).max(axis=(1, 3))
    return np.argwhere(np.triu(blocks, 1) > 0)


def _scale(loss: Terms, live: npt.NDArray[np.bool_], kept: list[tuple[int, int]]) -> float:
    low, high = np.where(live, loss.unary, np.inf).min(axis=1), np.where(live, loss.unary, -np.inf).max(axis=1)
    largest = float((high - low).max(initial=0.0))
    if loss.pair is not None:
        for u, v in kept:
            largest = max(largest, float(np.abs(loss.pair[u][live[u]][:, v][:, live[v]]).max()))
    return largest or 1.0


def _program(
    problem: PairProblem, loss: Terms, live: npt.NDArray[np.bool_], kept: list[tuple[int, int]], low: Floats,
    scale: float, tighter: float,
) -> tuple[pulp.LpProblem, dict[tuple[int, int], pulp.LpVariable]]:  # fmt: skip
    program = pulp.LpProblem("allocation", pulp.LpMinimize)
    options = [np.flatnonzero(row).tolist() for row in live]
    x = {(u, b): pulp.LpVariable(f"x_{u}_{b}", cat=pulp.LpBinary) for u, row in enumerate(options) for b in row}
    y = {
        (u, b, v, c): pulp.LpVariable(f"y_{u}_{b}_{v}_{c}", lowBound=0)
        for u, v in kept
        for b in options[u]
        for c in options[v]
    }
    objective = [(x[u, b], float((loss.unary[u, b] - low[u]) / scale)) for u, b in x]
    if loss.pair is not None:
        objective += [(variable, float(loss.pair[key] / scale)) for key, variable in y.items()]
    program += pulp.LpAffineExpression(objective)
    for u, row in enumerate(options):
        program += pulp.LpAffineExpression([(x[u, b], 1) for b in row]) == 1
    for u, v in kept:
        for b in options[u]:
            program += pulp.LpAffineExpression([*((y[u, b, v, c], 1) for c in options[v]), (x[u, b], -1)]) == 0
        for c in options[v]:
            program += pulp.LpAffineExpression([*((y[u, b, v, c], 1) for b in options[u]), (x[v, c], -1)]) == 0
    for terms, budget in zip(problem.resources, problem.budgets, strict=True):
        least = np.where(live, terms.unary, np.inf).min(axis=1)
        extra = np.where(live, terms.unary - least[:, None], 0)
        pairs = {} if terms.pair is None else {key: float(terms.pair[key]) for key in y if terms.pair[key] != 0}
        size = max(float(extra.max(initial=0.0)), max(map(abs, pairs.values()), default=0.0)) or 1.0
        row = [(x[key], float(extra[key] / size)) for key in x] + [(y[k], value / size) for k, value in pairs.items()]
        room = (float(budget) - math.fsum(least)) / size
        program += pulp.LpAffineExpression(row) <= room - tighter * max(1.0, abs(room))
    return program, x
