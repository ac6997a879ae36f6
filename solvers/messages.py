"""A lower bound for problems with pair terms, by messages between units: no integer program, no relaxation solver.

Any amounts m[u, b, v] may be moved from the pair terms of (u, v) to option b of u without changing the loss of any
choice. After moving, the minimum over each unit and the minimum over each pair add up to a bound; with prices on the
budgets,

    bound = sum_u min_b (unary'[u, b] + prices cost[u, b]) + sum_{u<v} min_{b,c} pair'[u, b, v, c] - prices budget,

whatever m and the prices are, so whoever has them can verify it in one pass (`bound`). The best m gives the bound of
the assignment (RLT) linearisation's linear program. It is approached by sequential reweighted message passing
(SRMP, Kolmogorov 2015, on pairs the same as TRW-S, 2006): each unit in turn collects what its pairs hold and hands
its own terms on to the units behind it; every step raises the bound or leaves it. Prices follow by the secant of what
the units' best options use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompiler.solvers import clock
from qcompiler.solvers.pairs import PairProblem, Terms
from qcompiler.solvers.problem import Choice, Floats

_SWEEPS = 12  # between two looks at the prices
_STALLED = 1e-5  # relative rise of the bound over as many sweeps at which it has converged


@dataclass(frozen=True, eq=False)
class Dual:
    """Messages and prices, and what they prove.

    Attributes:
        bound: no choice within the budgets has a loss below this.
        messages: float64 [units, options, units]: m[u, b, v].
        prices: float64 [resources], not negative.
        marginals: float64 [units, options]: a choice that takes this option loses at least this much.
        relaxed: int [units], every unit's best option at these prices; may exceed the budgets.
    """

    bound: float
    messages: Floats
    prices: Floats
    marginals: Floats
    relaxed: Choice


def bound(problem: PairProblem, messages: Floats, prices: Floats) -> float:
    """The bound that messages and prices prove, lowered by the rounding error of computing it."""
    terms = problem.priced(prices)
    pair = _closed(terms, problem.allowed)
    unary = terms.unary if pair is None else terms.unary + _received(messages)
    total = unary.min(axis=1).sum() - prices @ problem.budgets
    magnitude = np.abs(np.where(problem.allowed, unary, 0)).max(axis=1, initial=0).sum() + abs(prices @ problem.budgets)
    if pair is not None:
        for u in range(1, problem.units):
            left = _residual(pair, messages, u)[:, :u]
            total += left.min(axis=(0, 2)).sum()
            magnitude += np.abs(np.where(np.isfinite(left), left, 0)).max(axis=(0, 2)).sum()
    return float(total - 8 * np.finfo(np.float64).eps * problem.units * magnitude)


def _received(messages: Floats) -> Floats:
    """What every option gets from all pairs of its unit [units, options]; a unit has no pair with itself."""
    index = np.arange(len(messages))
    return messages.sum(axis=2) - messages[index, :, index]


def _closed(terms: Terms, allowed: npt.NDArray[np.bool_]) -> Floats | None:
    """The pair terms, infinite at missing options."""
    if terms.pair is None or allowed.all():
        return terms.pair
    pair = terms.pair.copy()
    pair[~allowed] = np.inf
    pair[:, :, ~allowed] = np.inf
    return pair


def _residual(pair: Floats, messages: Floats, u: int) -> Floats:
    """What is left in the pairs of unit u: [options, units, options]."""
    left = pair[u] - messages[:, :, u]
    left -= messages[u][:, :, None]
    return left


class MessagePassing:
    """Raises the bound of one problem step by step.

    Args:
        problem: with or without pair terms.
        deadline: on the clock of `time.monotonic`.
        prices: float64 [resources] to start from.
    """

    def __init__(self, problem: PairProblem, deadline: float, prices: Floats) -> None:
        self.problem, self.deadline = problem, deadline
        self.messages = np.zeros((*problem.allowed.shape, problem.units))
        self.prices = prices.copy()
        self.best: Dual | None = None

    def run(self, enough: float = np.inf, rounds: int = 60) -> Dual:
        """Pass messages and follow the prices until nothing rises, `enough` is reached, or time is up."""
        last, step = -np.inf, 1.0
        for _ in range(rounds):
            found = self._sweeps()
            if self.best is None or found.bound > self.best.bound:
                self.best = found
            rise = found.bound - last
            if self.best.bound >= enough or clock.now() > self.deadline:
                break
            if abs(rise) <= _STALLED * abs(found.bound) and step < 0.02:
                break
            if rise < 0 or abs(rise) <= 10 * _STALLED * abs(found.bound):
                step *= 0.6
            last = found.bound
            self._follow_prices(found.relaxed, step)
        assert self.best is not None
        return self.best

    def _sweeps(self) -> Dual:
        terms = self.problem.priced(self.prices)
        pair = _closed(terms, self.problem.allowed)
        order = range(self.problem.units)
        if pair is not None:
            for number in range(_SWEEPS):
                for u in order if number % 2 == 0 else reversed(order):
                    self._visit(terms.unary[u], pair, u, forward=number % 2 == 0)
                if clock.now() > self.deadline:
                    break
        return self._dual(terms.unary, pair)

    def _visit(self, own: Floats, pair: Floats, u: int, forward: bool) -> None:
        """Collect at u what its pairs hold, and hand the rest on to the units after it (before, backwards)."""
        units = self.problem.units
        collected = _residual(pair, self.messages, u).min(axis=2)  # [options, units]
        collected[:, u] = 0
        collected[~self.problem.allowed[u]] = 0
        message = self.messages[u]
        message += collected
        own = own + message.sum(axis=1)
        own = np.where(self.problem.allowed[u], own - own.min(), 0)
        share = own / (max(u, units - 1 - u) + 1)
        if forward:
            message[:, u + 1 :] -= share[:, None]
        else:
            message[:, :u] -= share[:, None]

    def _dual(self, own: Floats, pair: Floats | None) -> Dual:
        """What the messages prove, with all that pairs hold brought to the units for marginals and choice."""
        proven = bound(self.problem, self.messages, self.prices)
        unary = own + _received(self.messages)
        marginals = unary.copy()
        if pair is not None:
            for u in range(self.problem.units):
                left = _residual(pair, self.messages, u).min(axis=2)
                left[:, u] = 0
                least = left[self.problem.allowed[u]].min(axis=0)  # of every pair, counted in the bound already
                marginals[u] += (left - least).sum(axis=1)
        excess = marginals - unary.min(axis=1, keepdims=True)
        excess = np.where(self.problem.allowed, excess, np.inf)
        return Dual(proven, self.messages.copy(), self.prices.copy(), proven + excess, excess.argmin(axis=1))

    def _follow_prices(self, relaxed: Choice, step: float) -> None:
        """Raise the price of what is overdrawn and lower that of what is left over, in proportion."""
        for number, terms in enumerate(self.problem.resources):
            used, budget = terms.of(relaxed), self.problem.budgets[number]
            spread = float(np.ptp(terms.unary, axis=1).sum()) or 1.0
            change = np.clip((used - budget) / spread * 6, -0.7, 0.7) * step
            floor = 1e-12 * float(np.abs(np.where(self.problem.allowed, self.problem.loss.unary, 0)).max()) / spread
            price = self.prices[number]
            self.prices[number] = max(price, floor) * np.exp(change) if used > budget or price > floor else 0.0
