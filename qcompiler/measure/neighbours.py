"""Choices next to a choice: one unit (or tied group) at another option, or two of them, best prediction first.

Knows problems by their shape only (`Quadratic`): measuring is below the solvers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

Floats = npt.NDArray[np.float64]
Choice = npt.NDArray[np.intp]
_MOVES = 600  # single moves whose exchanges with one another are looked at
_SLACK = 1e-9  # of a budget: what adding up in another order may differ by


class Quadratic(Protocol):
    """What is needed of `solvers.problem.Problem`, where the attributes are explained."""

    @property
    def loss(self) -> Floats:
        """[units, options], inf where there is no option."""
        ...

    @property
    def costs(self) -> Mapping[str, Floats]:
        """By resource."""
        ...

    @property
    def budgets(self) -> Mapping[str, float]:
        """By resource."""
        ...

    @property
    def ties(self) -> tuple[tuple[int, ...], ...]:
        """Groups of units."""
        ...

    @property
    def cross(self) -> Any:
        """[units * options, units * options], dense or sparse, or None."""
        ...

    @property
    def pair_costs(self) -> Mapping[str, Any]:
        """By resource."""
        ...

    def objective(self, choice: Choice, /) -> float:
        """Loss of a choice."""
        ...

    def used(self, choice: Choice, resource: str, /) -> float:
        """What a choice costs."""
        ...

    def feasible(self, choice: Choice, /) -> bool:
        """Whether a choice meets every budget."""
        ...


def neighbours(problem: Quadratic, choice: Choice) -> Iterator[tuple[Choice, float]]:
    """Feasible choices that differ from `choice` in one unit or in two, with what they change in the objective.

    Units that are tied count as one. Least change first. In large problems only the exchanges among the 600 most
    promising single moves are among them.

    Args:
        problem: separable or quadratic.
        choice: int [units], feasible.
    """
    moves = _Moves(problem, np.asarray(choice, np.intp))
    first, second, change = moves.ranked()
    for one, two, value in zip(first, second, change, strict=True):
        made = moves.apply(int(one), int(two))
        if problem.feasible(made):
            yield made, float(value)


class _Moves:
    """All single moves from a choice: arrays with one entry a move."""

    def __init__(self, problem: Quadratic, choice: Choice) -> None:
        self._problem, self._choice = problem, choice
        self._labels = _groups(problem)
        units, options = problem.loss.shape
        fold = sparse.csr_array(
            (np.ones(units * options), (np.arange(units * options), _merged(self._labels, options))),
            shape=(units * options, (self._labels.max(initial=-1) + 1) * options),
        )
        allowed = fold.T @ np.isfinite(problem.loss).ravel() >= np.bincount(self._labels).repeat(options)
        now = self._labels * options + choice
        allowed[now] = False
        self._target = np.flatnonzero(allowed)
        self._group = self._target // options
        at = np.zeros(len(allowed) // options, np.intp)
        at[self._labels] = now
        self._source = at[self._group]
        self._options = options
        own: Floats = fold.T @ np.where(np.isfinite(problem.loss), problem.loss, 0).ravel()
        self._cross = _folded(problem.cross, fold)
        self.change = own[self._target] - own[self._source] + self._coupled(np.unique(now))
        self._keep_best()
        self._costs = {name: fold.T @ cost.ravel() for name, cost in problem.costs.items() if name in problem.budgets}

    def _coupled(self, now: Choice) -> Floats:
        """What moves change in the terms between groups, and within groups."""
        if self._cross is None:
            return np.zeros(len(self._target))
        field = np.asarray(self._cross[:, now].sum(axis=1)).ravel()
        cross, target, source = self._cross, self._target, self._source
        inner = 0.5 * (_entries(cross, target, target) + _entries(cross, source, source))
        return field[target] - field[source] - _entries(cross, target, source) + inner

    def _keep_best(self) -> None:
        """Of too many moves half the best that lower the objective, half the cheapest that raise it."""
        if len(self.change) <= _MOVES:
            return
        order = np.argsort(self.change, kind="stable")
        better = int((self.change < 0).sum())
        kept = np.concatenate([order[: min(better, _MOVES // 2)], order[better : better + _MOVES // 2]])
        for name in ("change", "_target", "_source", "_group"):
            setattr(self, name, getattr(self, name)[kept])

    def ranked(self) -> tuple[Choice, Choice, Floats]:
        """Moves and exchanges by change: positions of both moves, equal for a single one, and the change."""
        count = len(self.change)
        both = self.change[:, None] + self.change[None] + self._between()
        wrong = (self._group[:, None] == self._group[None]) | np.tri(count, dtype=bool)
        both[np.diag_indices(count)] = self.change
        wrong[np.diag_indices(count)] = False
        first, second = np.nonzero(~wrong & self._affordable())
        order = np.argsort(both[first, second], kind="stable")
        first, second = first[order], second[order]
        return first, second, both[first, second]

    def _between(self) -> Floats:
        """How much two moves together change beyond what each changes alone, [moves, moves]."""
        if self._cross is None:
            return np.zeros((len(self.change),) * 2)
        target, source = self._target, self._source
        block = [[_block(self._cross, a, b) for b in (target, source)] for a in (target, source)]
        return block[0][0] - block[0][1] - block[1][0] + block[1][1]

    def _affordable(self) -> npt.NDArray[np.bool_]:
        """Moves and exchanges within the budgets, as far as costs add up; `Quadratic.feasible` decides."""
        fine = np.ones((len(self.change),) * 2, bool)
        for name, cost in self._costs.items():
            if name in self._problem.pair_costs:
                continue
            rise = cost[self._target] - cost[self._source]
            both = rise[:, None] + rise[None]
            both[np.diag_indices(len(rise))] = rise
            budget = self._problem.budgets[name]
            fine &= self._problem.used(self._choice, name) + both <= budget + _SLACK * max(abs(budget), 1.0)
        return fine

    def apply(self, first: int, second: int) -> Choice:
        """The choice after one move, or two."""
        made = self._choice.copy()
        for move in (first, second):
            made[self._labels == self._group[move]] = self._target[move] % self._options
        return made


def _groups(problem: Quadratic) -> npt.NDArray[np.intp]:
    """Int [units]: the tied group of every unit."""
    units = len(problem.loss)
    pairs = np.array([(group[0], unit) for group in problem.ties for unit in group], np.intp).reshape(-1, 2)
    links = sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(units, units))
    return np.asarray(connected_components(links, directed=False)[1], np.intp)


def _merged(labels: npt.NDArray[np.intp], options: int) -> npt.NDArray[np.intp]:
    return (labels[:, None] * options + np.arange(options)).ravel()


def _folded(cross: Any, fold: Any) -> Any:
    if cross is None:
        return None
    folded = fold.T @ (cross @ fold)
    return np.asarray(folded) if isinstance(cross, np.ndarray) else sparse.csr_array(folded)


def _entries(matrix: Any, rows: Choice, columns: Choice) -> Floats:
    return np.asarray(matrix[rows, columns]).ravel()


def _block(matrix: Any, rows: Choice, columns: Choice) -> Floats:
    if isinstance(matrix, np.ndarray):
        return np.asarray(matrix[np.ix_(rows, columns)], np.float64)
    return np.asarray(matrix[rows][:, columns].toarray(), np.float64)
