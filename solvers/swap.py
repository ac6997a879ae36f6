"""Local search on problems with pair terms: single moves, exchanges of two units, tabu, many starts.

The quadratic form's field (what every option would add, given all other choices) is kept up to date, so a move costs
one row of the matrix and the best move one look at a table. After a local minimum the least bad move that is not tabu
is made (tabu search, Glover 1989): a single descent has lost up to 24 % on small instances.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from qcompiler.solvers import clock
from qcompiler.solvers.pairs import PairProblem, Terms
from qcompiler.solvers.problem import Choice, Floats

_EXCHANGES = 160  # moves whose exchanges with one another are looked at
_TENURE = 7
_PATIENCE = 60  # moves without a new best after which a walk ends


class SwapSearch:
    """Walks from feasible choice to feasible choice.

    Args:
        problem: what to solve.
        prices: float64 [resources]; they rank the moves that an exchange is put together from.
        deadline: on the clock of `time.monotonic`.
    """

    def __init__(self, problem: PairProblem, prices: Floats, deadline: float) -> None:
        self.problem, self.prices, self.deadline = problem, prices, deadline
        self.found: dict[bytes, tuple[float, Choice]] = {}
        self._index = np.arange(problem.units)

    def run(self, starts: Iterable[Choice]) -> tuple[float, Choice] | None:
        """The best feasible choice that walks from the starts meet, with its loss; None if none is met."""
        for start in starts:
            if clock.now() > self.deadline and self.found:
                break
            choice = self.repaired(start)
            if choice is not None:
                self._walk(choice)
        return min(self.found.values(), key=lambda pair: pair[0], default=None)

    def repaired(self, choice: Choice) -> Choice | None:
        """Make a choice feasible by the moves that cost least loss per excess removed; None if stuck."""
        choice = choice.copy()
        for _ in range(8 * self.problem.units + 1):
            used, change = self._costs(choice)
            over = np.maximum(used - self.problem.budgets, 0)
            if not over.any():
                if self.problem.problem.feasible(choice):
                    return choice
                return None
            scale = np.maximum(np.abs(self.problem.budgets), 1e-300)
            after = np.maximum((used - self.problem.budgets)[:, None, None] + change, 0) / scale[:, None, None]
            gain = (over / scale).sum() - after.sum(axis=0)
            loss = _change(self.problem.loss, choice)
            usable = (gain > 0) & self.problem.allowed
            if not usable.any():
                return None
            rate = np.where(usable, (loss - min(loss[usable].min(), 0)) / np.where(usable, gain, 1), np.inf)
            unit, option = np.unravel_index(int(rate.argmin()), rate.shape)
            choice[unit] = option
        return None

    def _costs(self, choice: Choice) -> tuple[Floats, Floats]:
        """Amounts used [resources], and how single moves change them [resources, units, options]."""
        resources = self.problem.resources
        if not resources:
            return np.zeros(0), np.zeros((0, *self.problem.allowed.shape))
        return np.array([t.of(choice) for t in resources]), np.stack([_change(t, choice) for t in resources])

    def _walk(self, choice: Choice) -> None:
        """Tabu search until it has found nothing new for a while."""
        tabu = np.full(self.problem.allowed.shape, -1)
        loss = self.problem.loss.of(choice)
        best, since = loss, 0
        self._remember(choice, loss)
        for step in range(100 * self.problem.units + 1000):
            if since > _PATIENCE or clock.now() > self.deadline:
                break
            moves = self._next(choice, tabu > step, best - loss)
            if moves is None:
                break
            for unit, option in moves:
                tabu[unit, choice[unit]] = step + _TENURE
                choice[unit] = option
            loss = self.problem.loss.of(choice)
            since += 1
            if loss < best - 1e-12 * abs(best):
                if not self.problem.problem.feasible(choice):
                    break  # rounding of incremental costs; the exact ones decide
                best, since = loss, 0
                self._remember(choice, loss)

    def _remember(self, choice: Choice, loss: float) -> None:
        self.found[choice.tobytes()] = (loss, choice.copy())

    def _next(self, choice: Choice, tabu: npt.NDArray[np.bool_], aspiration: float) -> list[tuple[int, int]] | None:
        """The feasible single move or exchange that changes the loss most to the better, tabu ones left out."""
        loss = _change(self.problem.loss, choice)
        used, cost = self._costs(choice)
        room = self.problem.budgets - used
        loss = np.where(self.problem.allowed, loss, np.inf)
        loss[self._index, choice] = np.inf
        blocked = tabu & ~(loss < aspiration)
        fits = (cost <= room[:, None, None]).all(axis=0) & ~blocked
        single = np.where(fits, loss, np.inf)
        first = int(single.argmin())
        pair, value = self._exchange(choice, np.where(blocked, np.inf, loss), cost, room)
        if min(single.flat[first], value) == np.inf:
            return None
        if single.flat[first] <= value:
            unit, option = np.unravel_index(first, single.shape)
            return [(int(unit), int(option))]
        return pair

    def _exchange(
        self, choice: Choice, loss: Floats, cost: Floats, room: Floats
    ) -> tuple[list[tuple[int, int]], float]:
        reduced = loss + np.einsum("r,rub->ub", self.prices, cost)
        order = np.argsort(reduced, axis=None)[:_EXCHANGES]
        order = order[np.isfinite(reduced.ravel()[order])]
        u, b = np.unravel_index(order, reduced.shape)
        if len(u) < 2:
            return [], np.inf
        total = loss[u, b][:, None] + loss[u, b][None] + self._together(self.problem.loss, u, b, choice)
        total[u[:, None] == u[None]] = np.inf
        for number, terms in enumerate(self.problem.resources):
            amount = cost[number, u, b]
            both = amount[:, None] + amount[None] + self._together(terms, u, b, choice)
            total[both > room[number]] = np.inf
        i, j = np.unravel_index(int(total.argmin()), total.shape)
        return [(int(u[i]), int(b[i])), (int(u[j]), int(b[j]))], float(total[i, j])

    def _together(self, terms: Terms, u: Choice, b: Choice, choice: Choice) -> Floats | float:
        """What two moves change beyond their sum."""
        if terms.pair is None:
            return 0.0
        now = choice[u]
        new_new = terms.pair[u[:, None], b[:, None], u[None], b[None]]
        new_old = terms.pair[u[:, None], b[:, None], u[None], now[None]]
        old_old = terms.pair[u[:, None], now[:, None], u[None], now[None]]
        return new_new - new_old - new_old.T + old_old


def _change(terms: Terms, choice: Choice) -> Floats:
    """How single moves change a sum [units, options]."""
    field = terms.field(choice)
    return field - field[np.arange(len(choice)), choice][:, None]
