"""Problems with terms between units: a good choice, a true bound, and proof where it can be had.

One after the other, until the gap is closed or time is up: local search from several starts (`swap`), a bound by
messages (`messages`: best where couplings are few or strong), a bound by convex forms (`convex`: best where they are
many and weak), more local search from what the relaxations propose, and the integer program over the options that the
bounds leave (`rlt`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from qcompiler.solvers import clock
from qcompiler.solvers.convex import ConvexBound
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.messages import MessagePassing
from qcompiler.solvers.pairs import PairProblem
from qcompiler.solvers.problem import Choice, Floats, InfeasibleProblem, NoChoiceFound, Problem, Solution
from qcompiler.solvers.rlt import MOST_COLUMNS, columns, linearised
from qcompiler.solvers.swap import SwapSearch

_STARTS = 8
_ALTERNATIVES = 32
_SMALL = 3_000  # pairs of options: solved to the end before any convex form would be set up
_PROVEN = 1e-9  # relative gap at which a bound proves a choice: the accuracy of the bounds' arithmetic


def solve_quadratic(problem: Problem, deadline: float = 60.0, gap: float = 0.0, engine: str = "highs") -> Solution:
    """Solve a problem with quadratic losses or pair costs.

    Args:
        problem: any; at most `pairs.MOST_OPTIONS` options in all.
        deadline: seconds; when it passes the best choice and bound known are returned as "feasible".
        gap: relative; the search ends once the gap is at most this.
        engine: of the integer program, "highs" or "cbc".

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
        NoChoiceFound: none was found in time.
        ValueError: too many options, an unknown engine.
    """
    search = _Search(PairProblem.of(problem), deadline, max(gap, _PROVEN), engine)
    solution, members = search.run(), search.pairs.members
    others = tuple(choice[members] for choice in solution.alternatives)
    return replace(solution, choice=solution.choice[members], alternatives=others)


class _Search:
    def __init__(self, pairs: PairProblem, seconds: float, gap: float, engine: str) -> None:
        self.begin = time.monotonic()
        self.pairs, self.seconds, self.gap, self.engine = pairs, seconds, gap, engine
        self.bound, self.methods = -np.inf, list[str]()
        self.live = pairs.allowed.copy()
        self.prices: Floats = np.zeros(len(pairs.resources))
        self.messages: Floats | None = None
        self.best: tuple[float, Choice] | None = None
        self.proven = False
        self.met: dict[bytes, tuple[float, Choice]] = {}

    def run(self) -> Solution:
        if not self.pairs.units:
            return Solution(np.zeros(0, np.intp), 0.0, 0.0, "none", "optimal", 0.0)
        self._walk(list(self._starts()), 0.15)
        self._pass_messages()
        if not self._done() and columns(self.live, self.pairs) <= _SMALL:
            self._linearise(0.5)
        if not self._done():
            self._convexify()
        if not self._done():
            self._linearise(1.0)
        if self.best is None:
            raise NoChoiceFound("time ran out before a feasible choice was found")
        loss, choice = self.best
        status = "optimal" if self.proven or self._done(_PROVEN) else "feasible"
        names = list(self.pairs.problem.budgets)
        prices = {name: float(price) for name, price in zip(names, self.prices, strict=True)}
        return Solution(
            choice, loss, min(self.bound, loss), " + ".join(self.methods), status, time.monotonic() - self.begin,
            prices, self.messages, self._alternatives(choice),
        )  # fmt: skip

    def _alternatives(self, best: Choice) -> tuple[Choice, ...]:
        ranked = sorted(self.met.values(), key=lambda pair: pair[0])[: _ALTERNATIVES + 1]
        return tuple(choice for _, choice in ranked if not np.array_equal(choice, best))[:_ALTERNATIVES]

    def _until(self, share: float) -> float:
        """The moment when a share of the time that is left will have passed."""
        return time.monotonic() + share * max(0.0, self.begin + self.seconds - clock.now())

    def _done(self, gap: float | None = None) -> bool:
        if self.best is None or self.proven:
            return self.proven
        loss = self.best[0]
        return loss - self.bound <= (self.gap if gap is None else gap) * max(abs(loss), abs(self.bound))

    def _starts(self) -> Iterator[Choice]:
        """Of the problem without pairs, plain and with jittered losses; and each unit's best and thriftiest."""
        terms = self.pairs.loss
        rng = np.random.default_rng(0)
        budgets = {n: b for n, b in self.pairs.problem.budgets.items() if n not in self.pairs.problem.pair_costs}
        for number in range(_STARTS):
            jitter = np.exp(rng.normal(0, 0.5, terms.unary.shape)) if number else 1.0
            alone = Problem(terms.unary * jitter, self.pairs.problem.costs, budgets)
            try:
                found = solve_lagrangian(alone, max(0.5, 0.02 * self.seconds))
            except NoChoiceFound:
                continue
            if number == 0:
                self.prices = np.array([found.multipliers.get(n, 0.0) for n in self.pairs.problem.budgets])
            yield found.choice
        yield terms.unary.argmin(axis=1)
        if self.pairs.resources:
            share = sum(t.unary / (float(np.ptp(t.unary, axis=1).sum()) or 1.0) for t in self.pairs.resources)
            yield np.where(self.pairs.allowed, share, np.inf).argmin(axis=1)

    def _walk(self, starts: list[Choice], share: float) -> None:
        search = SwapSearch(self.pairs, self.prices, self._until(share))
        found = search.run(starts)
        self.met |= search.found
        if found is not None and (self.best is None or found[0] < self.best[0]):
            self.best = found
        if "local search" not in self.methods:
            self.methods.append("local search")

    def _raise(self, bound: float, marginals: Floats, name: str) -> None:
        """Take a bound, and drop the options that no better choice can contain."""
        if bound > self.bound:
            self.bound = bound
            self.methods = [m for m in self.methods if m == "local search"] + [name]
        if self.best is not None:
            loss, choice = self.best
            self.live &= marginals <= loss + 1e-9 * abs(loss)
            self.live[np.arange(len(choice)), choice] = True

    def _pass_messages(self) -> None:
        enough = np.inf if self.best is None else self.best[0]
        dual = MessagePassing(self.pairs, self._until(0.25), self.prices).run(enough)
        self._walk([dual.relaxed], 0.1)
        self._raise(dual.bound, dual.marginals, "messages")
        self.prices, self.messages = dual.prices, dual.messages

    def _convexify(self) -> None:
        if self.pairs.loss.pair is None:
            return
        enough = np.inf if self.best is None else self.best[0]
        found = ConvexBound(self.pairs, self.prices, self._until(0.5)).run(enough)
        self._walk([found.rounded], 0.1)
        self._raise(found.bound, found.marginals, "convex form")

    def _linearise(self, share: float) -> None:
        if columns(self.live, self.pairs) > 4 * MOST_COLUMNS and self.best is not None:
            return
        answer = linearised(self.pairs, self.live, self._until(share), self.messages, self.engine, MOST_COLUMNS)
        if answer.infeasible and self.best is None:
            raise InfeasibleProblem(self.pairs.problem.least_costs(), self.pairs.problem.budgets)
        if answer.choice is not None:
            self._walk([answer.choice], 1.0)
        # Options outside `live` lose at least as much as the known choice, which bounds what they can do.
        bound = answer.bound if self.best is None else min(answer.bound, self.best[0])
        if answer.infeasible and self.best is not None:
            bound = self.best[0]
        if bound > self.bound:
            self.bound = bound
            self.methods = ["local search", "integer program"]
        self.proven = self.best is not None and (
            answer.infeasible or (answer.optimal and self.best[0] - bound <= answer.accuracy + _PROVEN * abs(bound))
        )
