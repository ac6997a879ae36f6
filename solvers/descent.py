"""Local search on a separable problem: repair, fill what is left of the budgets, exchange one or two units."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from qcompiler.solvers.problem import Choice, Floats, Problem

_PAIR_MOVES = 1500  # a table of this size squared is searched for the best exchange of two units


class Descent:
    """Improves choices of one problem (without ties).

    Args:
        problem: without ties and quadratic terms.
        multipliers: prices of the resources; they rank the moves.
        deadline: on the clock of `time.monotonic`.
    """

    def __init__(self, problem: Problem, multipliers: Mapping[str, float], deadline: float) -> None:
        self.problem, self.deadline = problem, deadline
        names = list(problem.budgets)
        self.cost = np.stack([problem.costs[n] for n in names]) if names else np.zeros((0, *problem.loss.shape))
        self.budget = np.array([problem.budgets[n] for n in names])
        price = np.array([multipliers.get(n, 0.0) for n in names])
        self.priced = np.einsum("r,rub->ub", price, self.cost)
        self.index = np.arange(problem.units)
        spread = np.ptp(self.cost, axis=2).sum(axis=1) if problem.units else np.ones(len(names))
        self.spread = np.where(spread > 0, spread, 1.0)

    def repair(self, choice: Choice) -> Choice | None:
        """Make a choice feasible by the moves that cost least loss per excess removed; None if stuck."""
        choice = choice.copy()
        for _ in range(self.problem.loss.size + 1):
            if self.problem.feasible(choice):
                return choice
            loss, cost, room = self._moves(choice)
            excess = np.maximum(-room, 0) / self.spread
            left = np.maximum(cost - room[:, None, None], 0) / self.spread[:, None, None]
            gain = excess.sum() - left.sum(axis=0)
            usable = (gain > 0) & np.isfinite(loss)
            if not usable.any():
                return None
            rate = np.full(gain.shape, np.inf)
            np.divide(loss, gain, out=rate, where=usable)
            unit, option = np.unravel_index(int(rate.argmin()), rate.shape)
            choice[unit] = option
        return None

    def improve(self, choice: Choice) -> Choice:
        """The best feasible choice that single moves and exchanges of two units reach."""
        best = self.problem.objective(choice)
        while time.monotonic() < self.deadline:
            found = next((c for c in self._proposals(choice) if self._better(c, best)), None)
            if found is None:
                break
            choice, best = found, self.problem.objective(found)
        return choice

    def _better(self, choice: Choice | None, best: float) -> bool:
        if choice is None or not self.problem.feasible(choice):
            return False
        return self.problem.objective(choice) < best - 1e-14 * abs(best)

    def _proposals(self, choice: Choice) -> Iterator[Choice | None]:
        yield self._single(choice)
        yield self._pair(choice)

    def _moves(self, choice: Choice) -> tuple[Floats, Floats, Floats]:
        """Change of loss [units, options] and of costs [resources, units, options] per move; room [resources]."""
        loss = self.problem.loss - self.problem.loss[self.index, choice][:, None]
        now = self.cost[:, self.index, choice]
        return loss, self.cost - now[:, :, None], self.budget - now.sum(axis=1)

    def _single(self, choice: Choice) -> Choice | None:
        loss, cost, room = self._moves(choice)
        fits = (cost <= room[:, None, None]).all(axis=0) & (loss < 0)
        if not fits.any():
            return None
        paid = np.maximum(self.priced - self.priced[self.index, choice][:, None], 0)
        rate = np.full(loss.shape, np.inf)
        np.divide(loss, paid - loss, out=rate, where=fits)  # in [-1, 0): most loss saved per price paid
        unit, option = np.unravel_index(int(rate.argmin()), rate.shape)
        return _moved(choice, [(int(unit), int(option))])

    def _pair(self, choice: Choice) -> Choice | None:
        loss, cost, room = self._moves(choice)
        units, options = self._pair_candidates(choice, loss)
        d, s = loss[units, options], cost[:, units, options]
        total = d[:, None] + d[None, :]
        total[units[:, None] == units[None, :]] = np.inf
        for resource, left in zip(s, room, strict=True):
            total[resource[:, None] + resource[None, :] > left] = np.inf
        if not total.size or not total.min() < 0:
            return None
        a, b = np.unravel_index(int(total.argmin()), total.shape)
        return _moved(choice, [(int(units[a]), int(options[a])), (int(units[b]), int(options[b]))])

    def _pair_candidates(self, choice: Choice, loss: Floats) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The moves that lose least at the current prices: only they can be part of a good exchange."""
        reduced = loss + self.priced - self.priced[self.index, choice][:, None]
        reduced[self.index, choice] = np.inf
        order = np.argsort(reduced, axis=None, kind="stable")[:_PAIR_MOVES]
        order = order[np.isfinite(reduced.ravel()[order])]
        units, options = np.unravel_index(order, reduced.shape)
        return units, options


def _moved(choice: Choice, moves: list[tuple[int, int]]) -> Choice:
    moved = choice.copy()
    for unit, option in moves:
        moved[unit] = option
    return moved
