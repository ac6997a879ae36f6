"""What searches that measure whole choices share: measuring, repair, the best choice seen, and a true bound.

A choice may be measured by the caller (a simulator's latency, a model's loss); the problem's tables then only predict
which single moves help, and the measurements judge.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler.solvers import clock
from qcompiler.solvers.certificate import dual_bound
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.problem import (
    Choice,
    Floats,
    InfeasibleProblem,
    NoChoiceFound,
    Problem,
    Solution,
    without_ties,
)

LossOf = Callable[[Choice], float]
CostOf = Callable[[Choice], Mapping[str, float]]
_FIRST_MOVES = 64
_PROVEN = 1e-12  # relative gap that double precision cannot resolve


class Measured:
    """A problem, how its choices are measured, and the best feasible one seen.

    Args:
        problem: what to solve. Ties are merged: `problem` of this class has none.
        deadline: seconds from now.
        loss: loss of a choice [units of the caller's problem]; `problem.objective` if None.
        cost: what a choice costs of every budgeted resource; `problem.used` if None.

    Raises:
        InfeasibleProblem: proven by the tables (never where `cost` is given: the tables are estimates then).
    """

    def __init__(
        self, problem: Problem, deadline: float, loss: LossOf | None = None, cost: CostOf | None = None
    ) -> None:
        self.began = time.monotonic()
        self.until = self.began + deadline
        self.original = problem
        self.problem, self.members = without_ties(problem)
        self._loss, self._cost = loss, cost
        self._known: dict[bytes, tuple[float, float, Floats]] = {}
        self.names = list(problem.budgets)
        self.budget = np.array([problem.budgets[n] for n in self.names])
        self.cost = np.array([self.problem.costs[n] for n in self.names]).reshape(
            len(self.names), *self.problem.loss.shape
        )
        low, high = (np.where(self.problem.allowed, self.cost, fill) for fill in (np.inf, -np.inf))
        spread = (high.max(axis=2, initial=-np.inf) - low.min(axis=2, initial=np.inf)).sum(axis=1)
        self.spread = np.where(spread > 0, spread, np.maximum(np.abs(self.budget), 1.0))
        self._terms = [_Pairs(self.problem.cross, self.problem.loss.shape)]
        self._terms += [_Pairs(self.problem.pair_costs.get(n), self.problem.loss.shape) for n in self.names]
        self._index = np.arange(self.problem.units)
        self.estimate = lower_estimate(self.problem)
        self.bound, self.multipliers = self._bound()
        self.best: Choice | None = None
        self.best_loss = math.inf

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return clock.now() >= self.until

    def measure(self, choice: Choice) -> tuple[float, float]:
        """(loss, how far over the budgets: 0 if feasible, else relative to the spread of costs)."""
        loss, over, _ = self._measured(choice)
        return loss, over

    def start(self) -> Choice:
        """The uniform choice of least loss within the budgets; else a repaired one; else one that costs little."""
        allowed = self.problem.allowed
        share = np.where(allowed, (self.cost / self.spread[:, None, None]).sum(axis=0), np.inf)
        cheapest = share.argmin(axis=1)
        uniform = [np.where(allowed[:, o], o, cheapest) for o in range(allowed.shape[1])]
        losses = [loss if over == 0 else math.inf for loss, over in map(self.measure, uniform)]
        if losses and min(losses) < math.inf:
            return uniform[int(np.argmin(losses))]
        repaired = self.repair(cheapest)
        return cheapest if repaired is None else repaired

    def repair(self, choice: Choice) -> Choice | None:
        """Make a choice feasible by the moves that lose least per excess removed; None if stuck.

        The tables predict the moves' changes; the excess itself is measured, and has to fall with every move.
        """
        choice = choice.copy()
        last = math.inf
        while True:
            _, over, room = self._measured(choice)
            if over == 0:
                return choice
            loss, cost = self.changes(choice)
            excess = np.maximum(-room, 0) / self.spread
            left = np.maximum(cost - room[:, None, None], 0) / self.spread[:, None, None]
            gain = excess.sum() - left.sum(axis=0)
            usable = (gain > 1e-15) & np.isfinite(loss)
            if over >= last or not usable.any():
                return None
            last = over
            rate = np.where(usable, loss / np.where(usable, gain, 1.0), np.inf)
            unit, option = np.unravel_index(int(rate.argmin()), rate.shape)
            choice[unit] = option

    def changes(self, choice: Choice) -> tuple[Floats, Floats]:
        """Change of loss [units, options] and of costs [resources, units, options] by every single move (tables)."""
        tables = [self.problem.loss, *self.cost]
        changed = [
            table - table[self._index, choice][:, None] + terms.changes(choice)
            for table, terms in zip(tables, self._terms, strict=True)
        ]
        return changed[0], np.array(changed[1:]).reshape(len(self.names), *self.problem.loss.shape)

    def improved(self, choice: Choice) -> Choice:
        """A feasible choice that no single move and none of the likeliest moves with its best answer makes better."""
        while not self.late:
            loss, cost = self.changes(choice)
            loss[self._index, choice] = np.inf
            _, _, room = self._measured(choice)
            fits = (cost <= room[:, None, None]).all(axis=0)
            better = self._moved(choice, np.where(fits, loss, np.inf), self.measure(choice)[0])
            if better is None:
                better = self._answered(choice, loss)
            if better is None:
                break
            choice = better
        return choice

    def _answered(self, choice: Choice, loss: Floats) -> Choice | None:
        """A better choice two moves away: a move that loses little or saves much, then the best one after it."""
        now = self.measure(choice)[0]
        for unit, option in _least(loss, _FIRST_MOVES):
            if self.late:
                return None
            moved = choice.copy()
            moved[unit] = option
            then, cost = self.changes(moved)
            then[unit] = np.inf
            then[self._index, moved] = np.inf
            _, _, room = self._measured(moved)
            fits = (cost <= room[:, None, None]).all(axis=0)
            better = self._moved(moved, np.where(fits, then, np.inf), now)
            if better is not None:
                return better
        return None

    def _moved(self, choice: Choice, loss: Floats, than: float) -> Choice | None:
        """The choice after the most promising move, if that is feasible and loses less than `than`."""
        for unit, option in _least(loss, 1):
            moved = choice.copy()
            moved[unit] = option
            found, over = self.measure(moved)
            if over == 0 and found < than - 1e-14 * abs(than):
                return moved
        return None

    def offer(self, choice: Choice) -> tuple[float, float, float]:
        """Remember a choice if it is feasible and the best so far.

        Returns:
            Its loss; how far over the budgets it is (as `measure`); what it leaves of the tightest budget, relative to
            the spread of costs (negative if over, inf without budgets).
        """
        loss, over, room = self._measured(choice)
        if over == 0 and loss < self.best_loss:
            self.best, self.best_loss = choice.copy(), loss
        return loss, over, float((room / self.spread).min(initial=math.inf))

    def solution(self, method: str) -> Solution:
        """The best choice seen; NoChoiceFound if there is none."""
        if self.best is None:
            raise NoChoiceFound("the search met no choice within the budgets")
        objective = self.best_loss
        bound = min(self.bound, objective)
        proven = objective - bound <= _PROVEN * max(abs(objective), abs(bound))
        status = "optimal" if proven and self._loss is None else "feasible"
        seconds = time.monotonic() - self.began
        return Solution(self.best[self.members], objective, bound, method, status, seconds, self.multipliers)

    def _measured(self, choice: Choice) -> tuple[float, float, Floats]:
        if self._loss is None and self._cost is None:
            return self._measure_now(choice)
        key = choice.astype(np.int32).tobytes()
        if key not in self._known:
            self._known[key] = self._measure_now(choice)
        return self._known[key]

    def _measure_now(self, choice: Choice) -> tuple[float, float, Floats]:
        """(loss, excess, what is left of every budget)."""
        whole = choice[self.members]
        loss = self.problem.objective(choice) if self._loss is None else float(self._loss(whole))
        if self._cost is None:
            used = np.array([self.problem.used(choice, name) for name in self.names])
        else:
            found = self._cost(whole)
            if not set(self.names) <= set(found):
                raise ValueError(f"the cost measured names {sorted(found)}, the budgets {self.names}")
            used = np.array([float(found[name]) for name in self.names])
        if math.isnan(loss) or not np.isfinite(used).all():
            raise ValueError(f"measured a loss of {loss} and costs of {used.tolist()}: they must be numbers")
        room = self.budget - used
        return loss, float((np.maximum(used - self.budget, 0) / self.spread).sum()), room

    def _bound(self) -> tuple[float, dict[str, float]]:
        """A true lower bound of the loss, and the prices that prove it (none for pair terms or measured costs)."""
        relaxed = self.estimate if self._cost is None else replace(self.estimate, budgets={})
        prices: Mapping[str, float] = {}
        try:
            prices = solve_lagrangian(relaxed, 0.0).multipliers
        except InfeasibleProblem as proof:
            raise InfeasibleProblem(proof.least, self.original.budgets) from None
        except NoChoiceFound:  # several budgets: no prices, but no price at all proves a bound too
            pass
        if self._loss is not None:
            return -math.inf, {}
        bound = dual_bound(relaxed, prices)
        if not self.problem.separable:
            bound -= 1e-12 * float(np.abs(np.where(relaxed.allowed, relaxed.loss, 0)).max(axis=1, initial=0).sum())
        return bound, dict(prices) if self.problem.separable and self._cost is None else {}


def _least(table: Floats, count: int) -> list[tuple[int, int]]:
    """Positions of the least finite entries, least first."""
    order = np.argsort(table, axis=None, kind="stable")[:count]
    order = order[np.isfinite(table.ravel()[order])]
    return [(int(i) // table.shape[1], int(i) % table.shape[1]) for i in order]


class _Pairs:
    """Exact changes of x' M x / 2 by single moves."""

    def __init__(self, matrix: Any, shape: tuple[int, ...]) -> None:
        self.matrix, self.shape = matrix, shape
        if matrix is None:
            return
        units, options = shape
        rows = np.arange(units * options).reshape(units, options)
        first, second = np.repeat(rows, options, axis=1).ravel(), np.tile(rows, (1, options)).ravel()
        self.within = np.asarray(matrix[first, second]).reshape(units, options, options)
        self.diagonal = np.diagonal(self.within, axis1=1, axis2=2)

    def changes(self, choice: Choice) -> Floats | float:
        """[units, options]."""
        if self.matrix is None:
            return 0.0
        units, options = self.shape
        index = np.arange(units)
        field = np.asarray(self.matrix[index * options + choice].sum(axis=0)).reshape(units, options)
        first = field - field[index, choice][:, None]
        curvature = self.diagonal + self.diagonal[index, choice][:, None] - 2 * self.within[index, :, choice]
        return first + 0.5 * curvature


def lower_estimate(problem: Problem) -> Problem:
    """A separable problem whose losses and costs are never above those of `problem` (without ties) for any choice.

    Every option pays half of each pair term with the other unit's option that makes it least. What is infeasible
    here is infeasible there, and a bound here is a bound there.
    """
    if problem.separable:
        return problem
    allowed = problem.allowed
    loss, costs, budgets = problem.loss, dict(problem.costs), dict(problem.budgets)
    if problem.cross is not None:
        loss = np.where(allowed, loss, 0) + _least_halves(problem.cross, allowed)
        loss = np.where(allowed, loss, np.inf)
    for name, matrix in problem.pair_costs.items():
        costs[name] = costs[name] + np.where(allowed, _least_halves(matrix, allowed), 0)
        if name in budgets:  # so that rounding errors prove nothing infeasible
            budgets[name] += 1e-12 * float(np.abs(costs[name]).max(axis=1, initial=0).sum())
    return Problem(loss, costs, budgets)


def _least_halves(matrix: Any, allowed: Any) -> Floats:
    """Half of the least sum of pair terms that each option can have, [units, options]."""
    units, options = allowed.shape
    least = np.zeros((units, options))
    for u in range(units):
        rows = matrix[u * options : (u + 1) * options]
        block = (rows if isinstance(rows, np.ndarray) else rows.toarray()).reshape(options, units, options)
        by_unit = np.where(allowed, block, np.inf).min(axis=2)
        by_unit[:, u] = np.diagonal(block[:, u])
        least[u] = 0.5 * by_unit.sum(axis=1)
    return least
