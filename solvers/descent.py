"""Local search on a separable problem: repair, fill what is left of the budgets, exchange one or two units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from qcompiler.solvers import clock
from qcompiler.solvers.problem import Choice, Floats, Problem

_PAIR_MOVES = 1500  # a table of this size squared is searched for the best exchange of two units
NEAREST = 4096  # of a problem with more units, so many move
_EXCHANGES = 256  # so many of the best exchanges of one search are tried together


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
        self.price = np.array([multipliers.get(n, 0.0) for n in names])
        self.priced = np.einsum("r,rub->ub", self.price, self.cost)
        self.index = np.arange(problem.units)
        spread = np.ptp(self.cost, axis=2).sum(axis=1) if problem.units else np.ones(len(names))
        self.spread = np.where(spread > 0, spread, 1.0)

    def repair(self, choice: Choice) -> Choice | None:
        """Make a choice feasible by the moves that cost least loss per excess removed; None if stuck or late."""
        choice = choice.copy()
        for _ in range(self.problem.loss.size + 1):
            if self.problem.feasible(choice):
                return choice
            if self.problem.units > NEAREST and clock.now() > self.deadline:
                return None  # a move of a large problem takes seconds
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
        while clock.now() < self.deadline:
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
        yield from self._pairs(choice)

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

    def _pairs(self, choice: Choice) -> Iterator[Choice | None]:
        """The best exchanges of two units, all at once that fit together; then only the best one."""
        loss, cost, room = self._moves(choice)
        units, options = self._pair_candidates(choice, loss, room)
        d, s = loss[units, options], cost[:, units, options]
        total = d[:, None] + d[None, :]
        total[units[:, None] == units[None, :]] = np.inf
        for resource, left in zip(s, room, strict=True):
            total[resource[:, None] + resource[None, :] > left] = np.inf
        saving = np.flatnonzero(total < 0)
        if len(saving) > _EXCHANGES:
            saving = saving[np.argpartition(total.ravel()[saving], _EXCHANGES)[:_EXCHANGES]]
        saving = saving[np.argsort(total.ravel()[saving], kind="stable")]
        pairs = np.stack(np.divmod(saving, max(len(d), 1)), axis=1)
        chosen = _together(pairs, units, s, room)
        for moves in (chosen, chosen[:2]):
            if moves:
                yield _moved(choice, [(int(units[m]), int(options[m])) for m in moves])

    def _pair_candidates(
        self, choice: Choice, loss: Floats, room: Floats
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The moves that lose least at the current prices: only they can be part of a good exchange.

        An exchange that fits uses at most what `room` is worth more than before. So it saves loss only if its two
        moves lose less than that together, at the prices.
        """
        reduced = loss + self.priced - self.priced[self.index, choice][:, None]
        reduced[self.index, choice] = np.inf
        worth = float(self.price @ np.maximum(room, 0))
        least = float(min(reduced.min(initial=0.0), 0.0))
        order = np.flatnonzero(reduced.ravel() <= (worth - least) * (1 + 1e-9))
        if len(order) > _PAIR_MOVES:
            order = order[np.argsort(reduced.ravel()[order], kind="stable")[:_PAIR_MOVES]]
        units, options = np.unravel_index(order, reduced.shape)
        return units, options


def polished(problem: Problem, multipliers: Mapping[str, float], choice: Choice, deadline: float) -> Choice | None:
    """A choice repaired and improved; None if it cannot be made feasible.

    Of a large problem only the units move that have the cheapest moves at the prices: more of them while they are
    too few to meet the budgets.
    """
    size = NEAREST
    while size < problem.units:
        units = _nearest(problem, multipliers, choice, size)
        part = _rest_fixed(problem, units, choice)
        descent = Descent(part, multipliers, deadline)
        if (repaired := descent.repair(choice[units])) is not None:
            moved = choice.copy()
            moved[units] = descent.improve(repaired)
            if problem.feasible(moved):
                return moved
        if clock.now() > deadline:
            return None
        size *= 8
    descent = Descent(problem, multipliers, deadline)
    repaired = descent.repair(choice)
    return None if repaired is None else descent.improve(repaired)


def _nearest(problem: Problem, multipliers: Mapping[str, float], choice: Choice, size: int) -> Choice:
    """The units whose best move loses least at the prices, ascending."""
    index = np.arange(problem.units)
    priced = problem.loss + sum(price * problem.costs[name] for name, price in multipliers.items())
    reduced = priced - priced[index, choice][:, None]
    reduced[index, choice] = np.inf
    return np.sort(np.argpartition(reduced.min(axis=1), size)[:size])


def _rest_fixed(problem: Problem, units: Choice, choice: Choice) -> Problem:
    """The problem of some units, with what the others use taken off the budgets."""
    others = np.ones(problem.units, np.bool_)
    others[units] = False
    others = np.flatnonzero(others)
    spent = {name: problem.costs[name][others, choice[others]] for name in problem.budgets}
    return Problem(
        problem.loss[units],
        {name: cost[units] for name, cost in problem.costs.items()},
        {name: math.fsum([budget, *-spent[name]]) for name, budget in problem.budgets.items()},
    )


def _moved(choice: Choice, moves: list[tuple[int, int]]) -> Choice:
    moved = choice.copy()
    for unit, option in moves:
        moved[unit] = option
    return moved


def _together(pairs: npt.NDArray[np.intp], units: Choice, cost: Floats, room: Floats) -> list[int]:
    """The moves of the first pairs that share no unit and fit the room together."""
    moves: list[int] = []
    touched: set[int] = set()
    for a, b in pairs.tolist():
        left = room - cost[:, a] - cost[:, b]
        if touched.isdisjoint((int(units[a]), int(units[b]))) and (left >= 0).all():
            room = left
            moves += [a, b]
            touched |= {int(units[a]), int(units[b])}
    return moves
