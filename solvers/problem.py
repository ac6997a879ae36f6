"""The allocation problem as arrays, and what a solver answers.

Units choose one option each. The losses of the chosen options add up, and so do their costs in every resource,
which must stay within the budgets; two options chosen together may add a loss (errors of two layers that line up) or a
cost (a conversion between two formats) of their own. Nothing here knows what a layer or a bit is.

What else one may want is a resource with a budget: costs may be negative, so "as many units at option a as at b" is
two resources with costs of +1 and -1 and budgets of 0; a pair that must not be chosen is a pair cost of 1 with a budget
of 0; memory at every cut of a schedule is one resource a cut.
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
_LARGEST = 1e150  # of a loss: squares and sums of a million of them stay finite


class InfeasibleProblem(ValueError):
    """It is proven that no choice meets the budgets.

    Attributes:
        least: the smallest possible cost of each budgeted resource, each taken alone.
    """

    def __init__(self, least: Mapping[str, float], budgets: Mapping[str, float]) -> None:
        self.least = dict(least)
        over = [name for name in budgets if least[name] > budgets[name]]
        facts = ", ".join(f"{name}: at least {least[name]:g}, budget {budgets[name]:g}" for name in over or budgets)
        what = "no choice meets the budgets" if over else "each budget can be met alone, not together"
        super().__init__(f"{what} ({facts})")


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
        cross: None, or a symmetric matrix [units * options, units * options], dense or sparse, of quadratic terms:
            the objective is sum(loss) + x' cross x / 2, where x is 1 at unit * options + option if chosen.
        pair_costs: resource -> a symmetric sparse matrix of that shape: what two options cost if both are chosen,
            each pair counted once. The resource is in `costs` as well.
    """

    loss: Floats
    costs: Mapping[str, Floats]
    budgets: Mapping[str, float]
    ties: tuple[tuple[int, ...], ...] = ()
    cross: Any = None
    pair_costs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        loss = _frozen(self.loss)
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "costs", {name: _frozen(cost) for name, cost in self.costs.items()})
        if loss.ndim != 2 or np.isnan(loss).any() or (loss == -np.inf).any():
            raise ValueError("loss must be [units, options], finite or +inf")
        if not np.abs(loss[np.isfinite(loss)]).max(initial=0.0) < _LARGEST:
            raise ValueError(f"a loss is beyond {_LARGEST:g}: sums of such numbers overflow; scale the losses")
        names: list[object] = [*self.costs]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"resources are called by strings, not {names}")
        for name, cost in self.costs.items():
            if cost.shape != loss.shape or not np.isfinite(cost).all():
                raise ValueError(f"cost '{name}' must be finite and of the shape of loss, {loss.shape}")
            if not np.abs(cost).max(initial=0.0) < _LARGEST:
                raise ValueError(f"a cost '{name}' is beyond {_LARGEST:g}: sums of such numbers overflow; scale it")
        for name, budget in self.budgets.items():
            if name not in self.costs or not math.isfinite(budget):
                raise ValueError(f"budget '{name}' must be finite and name a cost")
        if not all(0 <= unit < len(loss) for group in self.ties for unit in group):
            raise ValueError("ties name a unit that does not exist")
        empty = np.flatnonzero(~self.allowed.any(axis=1))
        if empty.size:
            raise ValueError(f"unit {empty[0]} has no option")
        if self.cross is not None:
            object.__setattr__(self, "cross", _symmetric(self.cross, loss.size, "cross"))
        if not set(self.pair_costs) <= set(self.costs):
            raise ValueError(f"pair costs of {sorted(set(self.pair_costs) - set(self.costs))}: no such resource")
        pairs = {n: sparse.csr_array(_symmetric(m, loss.size, f"pair cost '{n}'")) for n, m in self.pair_costs.items()}
        object.__setattr__(self, "pair_costs", pairs)

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

    @property
    def separable(self) -> bool:
        """Whether there are no terms between units."""
        return self.cross is None and not self.pair_costs

    def objective(self, choice: Choice) -> float:
        """Total loss of a choice [units], quadratic terms included."""
        linear = math.fsum(self.loss[np.arange(self.units), choice])
        return linear if self.cross is None else linear + 0.5 * self._between(self.cross, choice)

    def used(self, choice: Choice, resource: str) -> float:
        """What a choice costs of a resource, correctly rounded (exact for integers below 2^53)."""
        own = math.fsum(self.costs[resource][np.arange(self.units), choice])
        pairs = self.pair_costs.get(resource)
        return own if pairs is None else own + 0.5 * self._between(pairs, choice)

    def _between(self, matrix: Any, choice: Choice) -> float:
        """Sum of a matrix's entries at the chosen options."""
        chosen = np.arange(self.units) * self.loss.shape[1] + choice
        return float(matrix[np.ix_(chosen, chosen)].sum() if isinstance(matrix, np.ndarray) else _sum(matrix, chosen))

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
        messages: with pair terms, float64 [merged units, options, merged units] that go with the prices
            (`messages.bound`).
        alternatives: other good choices met on the way, best first.
    """

    choice: Choice
    objective: float
    bound: float
    method: str
    status: str
    seconds: float
    multipliers: Mapping[str, float] = field(default_factory=dict[str, float])
    messages: Floats | None = None
    alternatives: tuple[Choice, ...] = ()

    @property
    def gap(self) -> float:
        """(objective - bound) / max(|objective|, |bound|), at least 0; inf where there is no bound."""
        if not math.isfinite(self.bound):
            return math.inf
        scale = max(abs(self.objective), abs(self.bound))
        return max(0.0, (self.objective - self.bound) / scale) if scale > 0 else 0.0


def separable(problem: Problem) -> tuple[Problem, Choice]:
    """`without_ties`, for solvers that take no terms between units: they raise ValueError."""
    if not problem.separable:
        raise ValueError("this solver takes no terms between units (quadratic loss, pair costs)")
    return without_ties(problem)


def without_ties(problem: Problem) -> tuple[Problem, Choice]:
    """Merge tied units into one: (a problem without ties, int [units] -> merged unit).

    Terms between units that are merged become part of the merged unit's own loss and costs.

    Raises ValueError for ties between units that share no option.
    """
    if not problem.ties:
        return problem, np.arange(problem.units)
    pairs = [(group[0], unit) for group in problem.ties for unit in group[1:]]
    rows, columns = [p[0] for p in pairs], [p[1] for p in pairs]
    links = sparse.coo_array((np.ones(len(pairs)), (rows, columns)), shape=(problem.units, problem.units))
    count, labels = connected_components(links, directed=False)
    fold = _folding(labels, count, problem.loss.shape[1])
    merged = replace(
        problem,
        loss=_added(problem.loss, labels, count),
        costs={name: _added(cost, labels, count) for name, cost in problem.costs.items()},
        ties=(),
        cross=None if problem.cross is None else _folded(problem.cross, fold),
        pair_costs={name: _folded(matrix, fold) for name, matrix in problem.pair_costs.items()},
    )
    return merged, labels.astype(np.intp)


def _folding(labels: npt.NDArray[Any], count: int, options: int) -> Any:
    """Sparse 0/1 matrix [units * options, merged * options]."""
    rows = np.arange(len(labels) * options)
    columns = (labels[:, None] * options + np.arange(options)).ravel()
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(rows), count * options))


def _folded(matrix: Any, fold: Any) -> Any:
    folded = fold.T @ (matrix @ fold)
    return np.asarray(folded) if isinstance(matrix, np.ndarray) else sparse.csr_array(folded)


def _sum(matrix: Any, chosen: Choice) -> float:
    return sparse.csr_array(matrix)[chosen][:, chosen].sum()


def _symmetric(matrix: Any, size: int, name: str) -> Any:
    """The matrix as float64, dense or CSR; ValueError unless it is finite, symmetric and of the right size."""
    dense = isinstance(matrix, np.ndarray)
    found: Any = np.array(matrix, np.float64) if dense else sparse.csr_array(matrix, dtype=np.float64)
    values = found if dense else found.data
    if found.shape != (size, size):
        raise ValueError(f"{name} must be [units * options] squared, ({size}, {size}), not {found.shape}")
    if not np.abs(values).max(initial=0.0) < _LARGEST:  # NaN is not
        raise ValueError(f"{name} must be finite, and below {_LARGEST:g}")
    difference = found - found.T
    largest = np.abs(values).max(initial=0.0)
    if np.abs(difference if dense else difference.data).max(initial=0.0) > 1e-9 * largest:
        raise ValueError(f"{name} must be symmetric")
    if dense:
        found.setflags(write=False)
    return found


def _added(rows: Floats, labels: npt.NDArray[Any], count: int) -> Floats:
    total = np.zeros((count, rows.shape[1]))
    np.add.at(total, labels, rows)
    return total


def _frozen(values: npt.ArrayLike) -> Floats:
    if np.iscomplexobj(values):
        raise ValueError("losses and costs are real numbers")
    array = np.array(values, np.float64)
    array.setflags(write=False)
    return array


def _padded(rows: Sequence[Sequence[float]], width: int, fill: float) -> Floats:
    table = np.full((len(rows), width), fill)
    for unit, row in enumerate(rows):
        table[unit, : len(row)] = row
    return table
