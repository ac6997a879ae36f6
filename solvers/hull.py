"""The equal-slope path: from the cheapest choice to the best one along lower convex hulls.

For one resource the linear relaxation of the multiple-choice knapsack is solved by taking, again and again,
the hull step with the most loss saved per cost (Sinha and Zoltners 1979; "equal slope" in rate allocation).
Every choice on the path is optimal for the cost that it uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcompiler.solvers.problem import Choice, Floats, Problem, separable

_CHUNK = 1 << 14  # units at a time: their tables stay in the processor's cache


class CurvePoint(NamedTuple):
    """A choice on the size-against-loss path; `bound` is proven for every choice of at most that cost."""

    cost: float
    loss: float
    bound: float


@dataclass(frozen=True, eq=False)
class Path:
    """Hull steps of all units, steepest first.

    Attributes:
        start: int [units], the cheapest option of every unit (of equally cheap ones, the best).
        unit, before, option: int [steps]: the step moves `unit` from option `before` to `option`.
        slope: float64 [steps], change of loss per cost, negative, not decreasing.
    """

    start: Choice
    unit: Choice
    before: Choice
    option: Choice
    slope: Floats

    def choices(self, stop: int) -> Choice:
        """The choice after the first `stop` steps."""
        choice = self.start.copy()
        choice[self.unit[:stop]] = self.option[:stop]  # later steps of a unit overwrite earlier ones
        return choice

    def changes(self, table: Floats) -> Floats:
        """By how much every step changes the sum over a table [units, options]: float64 [steps]."""
        width = table.shape[1]
        flat = table.ravel()
        return flat[self.unit * width + self.option] - flat[self.unit * width + self.before]


def lower_hulls(cost: Floats, loss: Floats) -> tuple[Choice, Floats]:
    """Lower convex hulls of many units at once, from the cheapest option to the one with the least loss.

    Costs rise and losses fall strictly along a hull; the slopes do not decrease. Options with infinite loss are
    left out. All units take their next step together ("gift wrapping"), so that the work is vectorised over
    them: O(units x options x the longest hull).

    Args:
        cost: float64 [units, options], finite.
        loss: float64 [units, options], finite or inf, at least one finite in a row.

    Returns:
        Int [units, options]: the options on the hull in order, then -1; float64 [units, options]: the slope of
        the step that leads to each, NaN for the first and after the last.
    """
    option = np.full(loss.shape, -1, np.intp)
    slope = np.full(loss.shape, np.nan)
    for first in range(0, len(loss), _CHUNK):
        part = slice(first, first + _CHUNK)
        _wrap(cost[part], loss[part], option[part], slope[part])
    return option, slope


def _wrap(cost: Floats, loss: Floats, option: Choice, slope: Floats) -> None:
    """`lower_hulls` of a chunk, written into `option` and `slope`."""
    exists = np.isfinite(loss)
    cheapest = np.where(exists, cost, np.inf).min(axis=1, keepdims=True)
    now = np.where(exists & (cost == cheapest), loss, np.inf).argmin(axis=1)
    option[:, 0] = now
    alive, last = np.arange(len(loss)), np.full(len(loss), -np.inf)
    for step in range(1, loss.shape[1]):
        rows = np.arange(len(alive))
        dc, dl = cost - cost[rows, now][:, None], loss - loss[rows, now][:, None]
        rate = np.full(loss.shape, np.inf)
        with np.errstate(over="ignore"):
            np.divide(dl, dc, out=rate, where=(dl < 0) & (dc > 0))
        steepest = rate.min(axis=1)
        going = steepest < np.inf
        if not going.any():
            return
        farthest = np.where(rate == steepest[:, None], cost, -np.inf).argmax(axis=1)
        alive, now, cost, loss = alive[going], farthest[going], cost[going], loss[going]
        # Rounding must not make a later step steeper than the one before it.
        last = np.clip(steepest[going], last[going], None).clip(-np.finfo(np.float64).max)
        option[alive, step], slope[alive, step] = now, last


def path(problem: Problem, resource: str) -> Path:
    """The equal-slope path of a problem without ties, for one resource; other resources are not looked at."""
    option, slope = lower_hulls(problem.costs[resource], problem.loss)
    if not option.size:
        nothing = np.zeros(0, np.intp)
        return Path(np.zeros(problem.units, np.intp), nothing, nothing, nothing, np.zeros(0))
    taken = np.flatnonzero(option[:, 1:].ravel() >= 0)
    rising = slope[:, 1:].ravel()[taken]
    order = np.argsort(rising, kind="stable")  # the steps of a unit keep their order
    unit, step = np.divmod(taken[order], option.shape[1] - 1)
    at = unit * option.shape[1] + step
    flat = option.ravel()
    return Path(option[:, 0].copy(), unit, flat[at], flat[at + 1], rising[order])


def curve(problem: Problem, resource: str) -> list[CurvePoint]:
    """The size-against-loss path of a resource, cheapest first; budgets are not looked at.

    Raises ValueError for quadratic terms.
    """
    merged, _ = separable(problem)
    steps = path(merged, resource)
    index = np.arange(merged.units)
    cost, loss = merged.costs[resource], merged.loss
    costs = np.cumsum([math.fsum(cost[index, steps.start]), *steps.changes(cost)])
    changes = np.array([math.fsum(loss[index, steps.start]), *steps.changes(loss)])
    error = 4 * np.finfo(np.float64).eps * len(changes) * float(np.abs(changes).sum())
    losses = np.cumsum(changes)
    return list(map(CurvePoint, costs.tolist(), losses.tolist(), (losses - error).tolist()))


def affordable_steps(problem: Problem, steps: Path, resource: str) -> int:
    """How many steps fit the budget of a resource before the first that does not."""
    cost = problem.costs[resource]
    room = problem.budgets[resource] - math.fsum(cost[np.arange(problem.units), steps.start])
    used: npt.NDArray[np.float64] = np.cumsum(steps.changes(cost))
    return int(np.searchsorted(used, room, side="right"))
