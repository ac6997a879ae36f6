"""Prices of several budgets where a linear program over all units would be too large: Kelley's cutting planes.

The dual function g(y) = sum over units of min over options (loss + y cost) - y budget is concave; each evaluation
gives a choice, and the plane through it is nowhere below g. A small program finds the highest point under all
planes seen so far, g is evaluated there, and so on (Kelley 1960). That program's own prices say in which
proportions the choices make up the solution of the linear relaxation (Dantzig and Wolfe 1960). A sample of the units
is solved first: its prices are nearly those of all, so few evaluations see all units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from qcompiler.solvers import clock
from qcompiler.solvers.problem import Choice, Floats, InfeasibleProblem, Problem

_SAMPLE = 1 << 14
_CHUNK = 1 << 14  # units at a time: their tables stay in the processor's cache
_PLANES = 150
_ACCURACY = 1e-7  # of the highest point, relative
_HIGHEST = 1e12  # price, in units of the average loss per cost; where a budget leaves no room none is high enough
_GOLDEN = 0.6180339887498949


def prices_by_cuts(problem: Problem, until: float) -> tuple[dict[str, float], Choice]:
    """Prices of the budgets that nearly maximise the dual, and the relaxation's solution rounded in proportion.

    Args:
        problem: without ties and quadratic terms.
        until: on the clock of `time.monotonic`; the best prices by then are returned.

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
    """
    near = None
    if problem.units > 4 * _SAMPLE:
        try:
            near = prices_by_cuts(_sample(problem), until)[0]
        except InfeasibleProblem:  # of the sample: that proves nothing
            near = None
    planes = _Planes(problem)
    start = np.zeros(len(planes.names)) if near is None else np.array([near[n] for n in planes.names]) / planes.unit
    low, high = start / 1.2, np.maximum(start * 1.2, 1e-3 if near else 1.0)
    point, shares = start, np.ones(1)
    for _ in range(_PLANES):
        planes.add(point)
        if planes.best > planes.worst:  # the dual is above every loss: nothing is feasible
            raise InfeasibleProblem(problem.least_costs(), problem.budgets)
        top, point, shares = planes.highest(low, high)
        up, down = point >= high * (1 - 1e-9), (point <= low * (1 + 1e-9)) & (low > 0)
        up &= high < _HIGHEST
        done = top - planes.best <= _ACCURACY * abs(planes.best) + 2 * planes.error(point)
        if (done and not (up | down).any()) or clock.now() > until:
            break
        high = np.where(up, high * 4, high)
        low = np.where(down, np.where(low > 1e-9, low / 4, 0), low)
    found = {name: float(v) for name, v in zip(planes.names, planes.prices * planes.unit, strict=True)}
    return found, _in_proportion(planes.choices, shares)


class _Planes:
    """The planes seen so far; losses are relative to their spread, costs and prices to that of each resource."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.names = problem, list(problem.budgets)
        high = np.where(problem.allowed, problem.loss, -np.inf).max(axis=1)
        self.scale = float((high - problem.loss.min(axis=1)).sum()) or 1.0
        spread = [float(np.ptp(problem.costs[name], axis=1).sum()) or 1.0 for name in self.names]
        self.unit = self.scale / np.array(spread)
        size = np.where(problem.allowed, np.abs(problem.loss), 0).max(axis=1).sum() / self.scale
        costs = [np.abs(problem.costs[n]).max(axis=1).sum() + abs(problem.budgets[n]) for n in self.names]
        self.sizes = np.array([size, *(np.array(costs) / spread)])
        self.worst = float(high.sum()) / self.scale + 1e-9 * (1 + float(size))
        self.best, self.prices = -np.inf, np.zeros(len(self.names))
        self.losses: list[float] = []
        self.excess: list[Floats] = []
        self.choices: list[npt.NDArray[Any]] = []

    def add(self, prices: Floats) -> None:
        """Evaluate the dual and keep its plane."""
        choice = self._cheapest(prices * self.unit)
        index, problem = np.arange(len(choice)), self.problem
        used = np.array([problem.costs[n][index, choice].sum() - problem.budgets[n] for n in self.names])
        self.losses.append(float(problem.loss[index, choice].sum()) / self.scale)
        self.excess.append(used * self.unit / self.scale)
        self.choices.append(choice.astype(np.min_scalar_type(problem.loss.shape[1])))
        value = self.losses[-1] + float(prices @ self.excess[-1]) - self.error(prices)
        if value > self.best:
            self.best, self.prices = value, prices

    def error(self, prices: Floats) -> float:
        """Rounding error of evaluating the dual: at high prices the losses are lost in it."""
        return 4 * np.finfo(np.float64).eps * float(self.sizes @ [1.0, *prices])

    def highest(self, low: Floats, high: Floats) -> tuple[float, Floats, Floats]:
        """The highest point under the planes with prices in a box: (its height, its prices, the planes' shares)."""
        count = len(self.names)
        rows = np.hstack([np.ones((len(self.losses), 1)), -np.array(self.excess)])
        result = linprog(
            np.array([-1.0, *[0.0] * count]),
            A_ub=rows,
            b_ub=np.array(self.losses) - self.best,
            bounds=[(None, None), *zip(low, high, strict=True)],
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if result.status != 0:  # numerical trouble: the best point known is taken to be the highest
            return self.best, self.prices, np.eye(len(self.losses))[-1]
        shares = np.maximum(-np.asarray(result.ineqlin.marginals), 0)
        return self.best + float(result.x[0]), np.clip(result.x[1:], low, high), shares / (shares.sum() or 1.0)

    def _cheapest(self, prices: Floats) -> Choice:
        """The option of every unit with the least loss plus price."""
        choice = np.zeros(self.problem.units, np.intp)
        for first in range(0, len(choice), _CHUNK):
            part = slice(first, first + _CHUNK)
            priced = self.problem.loss[part].copy()
            for name, price in zip(self.names, prices, strict=True):
                priced += price * self.problem.costs[name][part]
            choice[part] = priced.argmin(axis=1)
        return choice


def _sample(problem: Problem) -> Problem:
    """Some units, with budgets as tight as for all: as far between the least and the most that can be used."""
    units = np.sort(np.random.default_rng(0).choice(problem.units, _SAMPLE, replace=False))
    budgets: dict[str, float] = {}
    for name, budget in problem.budgets.items():
        least, most = problem.costs[name].min(axis=1), problem.costs[name].max(axis=1)
        share = (budget - least.sum()) / (float((most - least).sum()) or 1.0)
        budgets[name] = float(least[units].sum() + share * (most - least)[units].sum())
    return Problem(problem.loss[units], {n: cost[units] for n, cost in problem.costs.items()}, budgets)


def _in_proportion(choices: list[npt.NDArray[Any]], shares: Floats) -> Choice:
    """Every unit takes one of the choices, each choice as often as its share says and evenly over the units."""
    where = np.arange(len(choices[0])) * _GOLDEN % 1.0
    kept = np.flatnonzero(shares > 0)
    taken = np.searchsorted(np.cumsum(shares[kept])[:-1], where, side="right")
    mixed = np.zeros(len(where), np.intp)
    for position, plane in enumerate(kept):
        mixed = np.where(taken == position, choices[plane], mixed)
    return mixed
