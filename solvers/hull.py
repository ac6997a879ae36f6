"""The equal-slope path: from the cheapest choice to the best one along lower convex hulls.

For one resource the linear relaxation of the multiple-choice knapsack is solved by taking, again and again,
the hull step with the most loss saved per cost (Sinha and Zoltners 1979; "equal slope" in rate allocation).
Every choice on the path is optimal for the cost that it uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcompiler.solvers.problem import Choice, Floats, Problem, separable


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
        unit, option: int [steps]: the step moves `unit` to `option`.
        slope: float64 [steps], change of loss per cost, negative, not decreasing.
    """

    start: Choice
    unit: Choice
    option: Choice
    slope: Floats

    def choices(self, stop: int) -> Choice:
        """The choice after the first `stop` steps."""
        choice = self.start.copy()
        choice[self.unit[:stop]] = self.option[:stop]  # later steps of a unit overwrite earlier ones
        return choice


def lower_hull(cost: Floats, loss: Floats) -> list[int]:
    """Indices of the lower convex hull of points, from the cheapest to the one with the least loss.

    Options with infinite loss are left out. Costs rise and losses fall strictly along the result, and so do
    the steepnesses.
    """
    hull: list[int] = []
    for point in np.lexsort((loss, cost)):
        p = int(point)
        if not math.isfinite(loss[p]) or (hull and loss[p] >= loss[hull[-1]]):
            continue
        while len(hull) > 1 and _slope(cost, loss, hull[-2], hull[-1]) >= _slope(cost, loss, hull[-1], p):
            hull.pop()
        hull.append(p)
    return hull


def _slope(cost: Floats, loss: Floats, a: int, b: int) -> float:
    return float((loss[b] - loss[a]) / (cost[b] - cost[a]))


def path(problem: Problem, resource: str) -> Path:
    """The equal-slope path of a problem without ties, for one resource; other resources are not looked at."""
    start = np.zeros(problem.units, np.intp)
    steps: list[tuple[float, int, int]] = []
    for unit, (cost, loss) in enumerate(zip(problem.costs[resource], problem.loss, strict=True)):
        hull = lower_hull(cost, loss)
        start[unit] = hull[0]
        steps += [(_slope(cost, loss, a, b), unit, b) for a, b in pairwise(hull)]
    steps.sort(key=lambda step: step[0])  # stable: the steps of a unit keep their order
    columns = list(zip(*steps, strict=True)) or [(), (), ()]
    slope = np.array(columns[0], np.float64)
    return Path(start, np.array(columns[1], np.intp), np.array(columns[2], np.intp), slope)


def curve(problem: Problem, resource: str) -> list[CurvePoint]:
    """The size-against-loss path of a resource, cheapest first; budgets are not looked at.

    Raises ValueError for quadratic terms.
    """
    merged, _ = separable(problem)
    steps = path(merged, resource)
    index = np.arange(merged.units)
    cost, loss = merged.costs[resource], merged.loss
    now = steps.start.copy()
    dc, dl = [math.fsum(cost[index, now])], [math.fsum(loss[index, now])]
    for unit, option in zip(steps.unit, steps.option, strict=True):
        dc.append(float(cost[unit, option] - cost[unit, now[unit]]))
        dl.append(float(loss[unit, option] - loss[unit, now[unit]]))
        now[unit] = option
    error = 4 * np.finfo(np.float64).eps * len(dl) * float(np.abs(dl).sum())
    costs, losses = np.cumsum(dc).tolist(), np.cumsum(dl).tolist()
    return [CurvePoint(c, v, v - error) for c, v in zip(costs, losses, strict=True)]


def affordable_steps(problem: Problem, steps: Path, resource: str) -> int:
    """How many steps fit the budget of a resource before the first that does not."""
    cost, now = problem.costs[resource], steps.start.copy()
    room = problem.budgets[resource] - math.fsum(cost[np.arange(problem.units), now])
    extra: list[float] = []
    for unit, option in zip(steps.unit, steps.option, strict=True):
        extra.append(float(cost[unit, option] - cost[unit, now[unit]]))
        now[unit] = option
    used: npt.NDArray[np.float64] = np.cumsum(extra) if extra else np.zeros(0)
    return int(np.searchsorted(used, room, side="right"))
