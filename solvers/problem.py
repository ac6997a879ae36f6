"""The allocation problem as arrays, and what a solver answers.

Units choose one option each; the losses of the chosen options add up (plus, for later, quadratic terms between
units), and so do their costs in every resource, which must stay within the budgets. Nothing here knows what
a layer or a bit is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

Floats = npt.NDArray[np.float64]
Choice = npt.NDArray[np.intp]


class InfeasibleProblem(ValueError):
    """It is proven that no choice meets the budgets.

    Attributes:
        least: the smallest possible cost of each budgeted resource, each taken alone.
    """

    def __init__(self, least: Mapping[str, float], budgets: Mapping[str, float]) -> None:
        self.least = dict(least)
        facts = ", ".join(f"{name}: at least {least[name]:g}, budget {budgets[name]:g}" for name in budgets)
        super().__init__(f"no choice meets the budgets ({facts})")


class NoChoiceFound(RuntimeError):
    """A heuristic found no feasible choice, and none is proven absent."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one option per unit: least total loss within the budgets.

    Attributes:
        loss: float64 [units, options]; may be negative; inf where a unit has no such option.
        costs: resource -> float64 [units, options], finite.
        budgets: resource -> the most that may be used of it; resources without a budget are only counted.
        ties: groups of units that must choose the same option index.
        cross: None, or a symmetric sparse matrix [units * options, units * options] of quadratic terms: the
            objective is then sum(loss) + x' cross x / 2. No solver here takes it yet; they refuse.
    """

    loss: Floats
    costs: Mapping[str, Floats]
    budgets: Mapping[str, float]
    ties: tuple[tuple[int, ...], ...] = ()
    cross: Any = None

    def __post_init__(self) -> None:
        loss = _frozen(self.loss)
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "costs", {name: _frozen(cost) for name, cost in self.costs.items()})
        if loss.ndim != 2 or np.isnan(loss).any() or (loss == -np.inf).any():
            raise ValueError("loss must be [units, options], finite or +inf")
        for name, cost in self.costs.items():
            if cost.shape != loss.shape or not np.isfinite(cost).all():
                raise ValueError(f"cost '{name}' must be finite and of the shape of loss, {loss.shape}")
        for name, budget in self.budgets.items():
            if name not in self.costs or not math.isfinite(budget):
                raise ValueError(f"budget '{name}' must be finite and name a cost")
        if not all(0 <= unit < len(loss) for group in self.ties for unit in group):
            raise ValueError("ties name a unit that does not exist")
        empty = np.flatnonzero(~self.allowed.any(axis=1))
        if empty.size:
            raise ValueError(f"unit {empty[0]} has no option")

    @staticmethod
    def ragged(
        loss: Sequence[Sequence[float]],
        costs: Mapping[str, Sequence[Sequence[float]]],
        budgets: Mapping[str, float],
        ties: tuple[tuple[int, ...], ...] = (),
    ) -> Problem:
        """A problem whose units have different numbers of options, given as one list a unit."""
        width = max((len(row) for row in loss), default=1)
        padded = {name: _padded(rows, width, 0.0) for name, rows in costs.items()}
        return Problem(_padded(loss, width, np.inf), padded, budgets, ties)

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.loss)

    @property
    def allowed(self) -> npt.NDArray[np.bool_]:
        """Bool [units, options]: which options exist."""
        return np.isfinite(self.loss)

    def objective(self, choice: Choice) -> float:
        """Total loss of a choice [units], quadratic terms included."""
        index = np.arange(self.units)
        linear = math.fsum(self.loss[index, choice])
        if self.cross is None:
            return linear
        chosen = index * self.loss.shape[1] + choice
        return linear + 0.5 * float(sparse.csr_array(self.cross)[chosen][:, chosen].sum())

    def used(self, choice: Choice, resource: str) -> float:
        """What a choice costs of a resource, correctly rounded (exact for integers below 2^53)."""
        return math.fsum(self.costs[resource][np.arange(self.units), choice])

    def feasible(self, choice: Choice) -> bool:
        """Whether a choice meets every budget, without tolerance."""
        return all(self.used(choice, name) <= budget for name, budget in self.budgets.items())

    def least_costs(self) -> dict[str, float]:
        """The smallest possible cost of each budgeted resource, each taken alone (ties not looked at)."""
        masked = {name: np.where(self.allowed, self.costs[name], np.inf) for name in self.budgets}
        return {name: math.fsum(cost.min(axis=1)) for name, cost in masked.items()}


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver answers.

    Attributes:
        choice: int [units], the option of every unit.
        objective: its loss.
        bound: no feasible choice has a loss below this.
        method: which solver.
        status: "optimal" only where that is proven (up to the accuracy of double precision, or of the
            integer solver), else "feasible".
        seconds: wall time.
        multipliers: resource -> price >= 0, the dual vector with which `certificate.check` recomputes a bound.
    """

    choice: Choice
    objective: float
    bound: float
    method: str
    status: str
    seconds: float
    multipliers: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def gap(self) -> float:
        """(objective - bound) / max(|objective|, |bound|), at least 0."""
        scale = max(abs(self.objective), abs(self.bound))
        return max(0.0, (self.objective - self.bound) / scale) if scale > 0 else 0.0


def separable(problem: Problem) -> tuple[Problem, Choice]:
    """Merge tied units into one: (a problem without ties, int [units] -> merged unit).

    Raises ValueError for quadratic terms, which the separable solvers do not take, and for ties between
    units that share no option.
    """
    if problem.cross is not None:
        raise ValueError("this solver takes no quadratic terms between units")
    if not problem.ties:
        return problem, np.arange(problem.units)
    pairs = [(group[0], unit) for group in problem.ties for unit in group[1:]]
    rows, columns = [p[0] for p in pairs], [p[1] for p in pairs]
    links = sparse.coo_array((np.ones(len(pairs)), (rows, columns)), shape=(problem.units, problem.units))
    count, labels = connected_components(links, directed=False)
    merged = replace(
        problem,
        loss=_added(problem.loss, labels, count),
        costs={name: _added(cost, labels, count) for name, cost in problem.costs.items()},
        ties=(),
    )
    return merged, labels.astype(np.intp)


def _added(rows: Floats, labels: npt.NDArray[Any], count: int) -> Floats:
    total = np.zeros((count, rows.shape[1]))
    np.add.at(total, labels, rows)
    return total


def _frozen(values: npt.ArrayLike) -> Floats:
    array = np.array(values, np.float64)
    array.setflags(write=False)
    return array


def _padded(rows: Sequence[Sequence[float]], width: int, fill: float) -> Floats:
    table = np.full((len(rows), width), fill)
    for unit, row in enumerate(rows):
        table[unit, : len(row)] = row
    return table
