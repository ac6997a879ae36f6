"""LPGNAS' search by gradient: every unit holds a softmax mixture of its options, which hardens as it is trained.

The expected loss of independent draws from the mixtures (pair terms x' G x / 2 between units included, exactly) plus
multipliers on the expected costs over budget is minimised by Adam over the logits, for several starts at once, while
the temperature of the softmax falls. The mixtures are then rounded, repaired and improved by local search.

Differences from LPGNAS: the losses are tables rather than a network in training; budgets are constraints with
multipliers (dual ascent) rather than a term with a weight; the gradient is that of the expectation itself, so Gumbel
noise would add variance only - random starts do its exploring.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.solvers.descent import Descent
from qcompiler.solvers.measured import Measured
from qcompiler.solvers.problem import Choice, Floats, Problem, Solution

_COOLED = 0.05  # the last temperature, of the first
_DECAYS = (0.9, 0.99)  # of Adam's moments
_DUAL_RATE = 0.3  # of the multipliers' ascent, per step and unit of relative excess
_SNAPSHOT = 20  # steps between two roundings
_STIFFNESS = 5.0  # of the penalty on the square of the excess


def solve_soft_mixture(
    problem: Problem,
    deadline: float = 60.0,
    *,
    steps: int = 800,
    starts: int = 8,
    rate: float = 0.1,
    temperature: float = 1.0,
    seed: int = 0,
) -> Solution:
    """Search by gradient over mixtures.

    Args:
        problem: any, pair terms included.
        deadline: seconds.
        steps: of Adam.
        starts: mixtures trained side by side: the first from even shares, the others from random ones.
        rate: Adam's step size on the logits.
        temperature: of the softmax at first; falls to a twentieth of it over the steps.
        seed: of the random starts; the same seed gives the same answer unless the deadline cuts the search.

    Raises:
        InfeasibleProblem: proven to have no feasible choice.
        NoChoiceFound: none was found.
        ValueError: arguments out of range.
    """
    if steps < 1 or starts < 1 or not rate > 0 or not temperature > 0:
        raise ValueError("at least one step and one start, a positive rate and a positive temperature are needed")
    measured = Measured(problem, deadline)
    if measured.problem.units:
        measured.offer(measured.start())
    mixture = Mixture(measured, starts, np.random.default_rng(seed))
    mixture.train(steps, rate, temperature)
    for choice in mixture.rounded():
        feasible = measured.repair(choice)
        if feasible is not None:
            measured.offer(_improved(measured, feasible, mixture))
    return measured.solution("soft-mixture")


class Mixture:
    """Shares of the options, [starts, units, options], and the multipliers of their expected costs.

    Args:
        measured: the problem.
        starts: how many are trained side by side.
        rng: draws all starts but the first.

    Attributes:
        shares: float64 [starts, units, options]: sum to 1 over the options of each unit.
        multipliers: float64 [starts, resources], of costs relative to their spread.
    """

    def __init__(self, measured: Measured, starts: int, rng: np.random.Generator) -> None:
        self.measured = measured
        problem = measured.problem
        self.allowed = problem.allowed
        self.loss = _Expected(np.where(self.allowed, problem.loss, 0.0), problem.cross)
        self.costs = [
            _Expected(np.where(self.allowed, problem.costs[name], 0.0), problem.pair_costs.get(name))
            for name in measured.names
        ]
        self.scale = self._scale()
        self.logits = rng.normal(0, 1, (starts, *problem.loss.shape))
        self.logits[0] = 0.0
        self.multipliers = np.zeros((starts, len(self.costs)))
        self.shares = self._softmax(1.0)
        self._met: dict[bytes, Choice] = {}

    def train(self, steps: int, rate: float, temperature: float) -> None:
        """Descend on the logits, ascend on the multipliers, until the last step or the deadline."""
        first, second = np.zeros_like(self.logits), np.zeros_like(self.logits)
        for step in range(steps):
            if self.measured.late:
                break
            now = temperature * _COOLED ** (step / steps)
            self.shares = self._softmax(now)
            slope = self._slope()
            slope = self.shares * (slope - (self.shares * slope).sum(axis=2, keepdims=True)) / now
            first = _DECAYS[0] * first + (1 - _DECAYS[0]) * slope
            second = _DECAYS[1] * second + (1 - _DECAYS[1]) * slope**2
            unbiased = first / (1 - _DECAYS[0] ** (step + 1))
            size = np.sqrt(second / (1 - _DECAYS[1] ** (step + 1)))
            self.logits -= rate * unbiased / (size + 1e-30)
            if step % _SNAPSHOT == 0:
                self._remember()
        self.shares = self._softmax(temperature * _COOLED)
        self._remember()

    def expected(self) -> tuple[Floats, Floats]:
        """Expected loss [starts], and expected costs relative to the budgets and spreads [starts, resources]."""
        over = [self._over(r)[0] for r in range(len(self.costs))]
        return self.loss.of(self.shares)[0], np.array(over).reshape(len(over), len(self.shares)).T

    def rounded(self) -> list[Choice]:
        """The likeliest options of every start now and then on the way, without repetition, the last first."""
        return list(self._met.values())[::-1]

    def _remember(self) -> None:
        for choice in self.shares.argmax(axis=2):
            self._met.pop(choice.tobytes(), None)
            self._met[choice.tobytes()] = choice

    def _slope(self) -> Floats:
        """Derivative by the shares of the Lagrangian; ascends on the multipliers by the way."""
        slope = self.loss.of(self.shares)[1] / self.scale
        for r in range(len(self.costs)):
            over, by_share = self._over(r)
            pressure = self.multipliers[:, r] + _STIFFNESS * np.maximum(over, 0)
            slope = slope + pressure[:, None, None] * by_share
            self.multipliers[:, r] = np.maximum(self.multipliers[:, r] + _DUAL_RATE * over, 0)
        return slope

    def _over(self, resource: int) -> tuple[Floats, Floats]:
        """(expected cost over budget [starts], its derivative by the shares), relative to the spread."""
        used, by_share = self.costs[resource].of(self.shares)
        spread = self.measured.spread[resource]
        return (used - self.measured.budget[resource]) / spread, by_share / spread

    def _scale(self) -> float:
        """Size of the losses: what an even mixture loses above each unit's best option."""
        loss = np.where(self.allowed, self.measured.problem.loss, np.inf)
        above = np.where(self.allowed, loss - loss.min(axis=1, keepdims=True), 0.0).sum(axis=1)
        return float((above / self.allowed.sum(axis=1)).sum()) or 1.0

    def _softmax(self, temperature: float) -> Floats:
        logits = np.where(self.allowed, self.logits / temperature, -np.inf)
        grown = np.exp(logits - logits.max(axis=2, keepdims=True, initial=-1e300))
        return grown / grown.sum(axis=2, keepdims=True)


class _Expected:
    """Expectation of sum(table) + x' M x / 2 over independent draws, and its derivative by the shares."""

    def __init__(self, table: Floats, matrix: Any) -> None:
        self.matrix = matrix
        self.table = table
        if matrix is None:
            return
        units, options = table.shape
        self.table = table + 0.5 * np.asarray(matrix.diagonal()).reshape(units, options)
        rows = np.arange(units * options).reshape(units, options)
        first, second = np.repeat(rows, options, axis=1).ravel(), np.tile(rows, (1, options)).ravel()
        self.within = np.asarray(matrix[first, second]).reshape(units, options, options)

    def of(self, shares: Floats) -> tuple[Floats, Floats]:
        """([starts], [starts, units, options])."""
        linear = np.einsum("uo,suo->s", self.table, shares)
        if self.matrix is None:
            return linear, np.broadcast_to(self.table, shares.shape)
        flat = shares.reshape(len(shares), -1)
        between = np.asarray((self.matrix @ flat.T).T).reshape(shares.shape)
        between = between - np.einsum("uop,sup->suo", self.within, shares)
        return linear + 0.5 * np.einsum("suo,suo->s", between, shares), self.table + between


def _improved(measured: Measured, choice: Choice, mixture: Mixture) -> Choice:
    """Local search: exchanges of two units in either case, with the multipliers as prices where all adds up."""
    if measured.problem.separable:
        prices = mixture.multipliers.mean(axis=0) * mixture.scale / measured.spread
        by_name = dict(zip(measured.names, map(float, prices), strict=True))
        return Descent(measured.problem, by_name, measured.until).improve(choice)
    return measured.improved(choice)
