"""AMED's random walk over choices, for losses and costs that do not add up (a simulator's latency, a true loss).

Every unit keeps a score for each of its options, an exponential average of log10(reference loss / loss) over the
states that contained it, and proposes options by softmax(score / T), accepted with min(1, p_new / p_now).

Differences from AMED (RamorayDrake/AMED), which searches during training:

- the reference is the moving (geometric) mean of the losses of recent states, not the first state's: with a fixed one
  every option once tried scores above those not yet tried, and on additive toys of 60 units a walk at T = 0.1 ended
  six times as high;
- its released default makes the average forget all but the last state (EMA=True is eta = 1); here 0 < eta < 1;
- AMED adds latency to the loss by weight; budgets are hard here: a state over budget is repaired, else rejected;
- AMED lets all units move at a step and walks on wherever that leads. Here a few units move, and the state as a whole
  is tested by the same rule, at a temperature that falls. `whole_walk=True` is AMED's own walk.
"""

from __future__ import annotations

import math

import numpy as np

from qcompiler.solvers.measured import CostOf, LossOf, Measured
from qcompiler.solvers.problem import Choice, Floats, Problem, Solution

_COOLED = 0.01  # the last temperature, of the first
_MEMORY = 0.1  # weight of the newest state in the reference
_FLOOR = 1e-6  # of the first state's loss: losses are told apart down to here


def solve_metropolis(
    problem: Problem,
    deadline: float = 60.0,
    *,
    loss: LossOf | None = None,
    cost: CostOf | None = None,
    steps: int = 4000,
    eta: float = 0.2,
    temperature: float = 0.3,
    whole_walk: bool = False,
    seed: int = 0,
) -> Solution:
    """Search by Metropolis-Hastings; the best feasible choice met is returned.

    Args:
        problem: any, pair terms included. Where `loss` or `cost` are given, its tables only guide repairs.
        deadline: seconds.
        loss: measured loss of a choice [units]; `problem.objective` if None. No choice is measured twice.
        cost: measured costs of a choice, by resource; `problem.used` if None.
        steps: states to visit.
        eta: weight of the newest state in a score, 0 < eta < 1.
        temperature: of the units' proposals and tests, in decades of loss; that of the state's test falls from it to
            a hundredth over the steps.
        whole_walk: let all units move at every step and accept every state within the budgets, as AMED does.
        seed: of the random numbers; the same seed gives the same answer unless the deadline cuts the walk.

    Returns:
        A solution whose bound is that of the tables, -inf where `loss` is given.

    Raises:
        InfeasibleProblem: proven by the tables to have no feasible choice.
        NoChoiceFound: none was met.
        ValueError: arguments out of range, or a measurement that is not a number.
    """
    if not 0 < eta < 1 or not temperature > 0 or steps < 1:
        raise ValueError("0 < eta < 1, a positive temperature and at least one step are needed")
    measured = Measured(problem, deadline, loss, cost)
    walk = _Walk(measured, eta, whole_walk, np.random.default_rng(seed))
    for step in range(steps):
        if measured.late or walk.movable.size == 0:
            break
        walk.step(temperature, temperature * _COOLED ** (step / steps))
    return measured.solution("metropolis")


class _Walk:
    """The state: a choice, its gain over the first state in decades, the recent mean of that, and the scores."""

    def __init__(self, measured: Measured, eta: float, whole: bool, rng: np.random.Generator) -> None:
        self.measured, self.eta, self.whole, self.rng = measured, eta, whole, rng
        allowed = measured.problem.allowed
        self.movable = np.flatnonzero(allowed.sum(axis=1) > 1)
        self.scores = np.where(allowed, 0.0, -np.inf)
        self.index = np.arange(measured.problem.units)
        self.choice = measured.start()
        loss, self.over = measured.measure(self.choice)
        measured.offer(self.choice)
        # Losses are counted from the proven bound, or as they are where there is none and all are positive (AMED).
        self.zero = measured.bound if math.isfinite(measured.bound) else min(0.0, loss - abs(loss))
        self.first = max(loss - self.zero, 1e-300)
        self.gain = self.mean = self._gain(loss)

    def step(self, temperature: float, cooled: float) -> None:
        """Propose a state at one temperature, learn its score, test it at the cooled one."""
        proposed = self._proposal(temperature)
        loss, over = self.measured.measure(proposed)
        if over > 0 and self.measured.best is not None:
            repaired = self.measured.repair(proposed)
            if repaired is None:
                return
            proposed, (loss, over) = repaired, self.measured.measure(repaired)
        self.measured.offer(proposed)
        gain = self._gain(loss)
        self._learn(proposed, gain)
        if self._accepted(gain, over, cooled):
            self.choice, self.gain, self.over = proposed, gain, over

    def _accepted(self, gain: float, over: float, cooled: float) -> bool:
        if self.over > 0 or over > 0:  # no feasible state yet: towards the budgets
            return over <= self.over
        if self.whole:
            return True
        return math.log(self.rng.random() + 1e-300) < (gain - self.gain) / cooled

    def _proposal(self, temperature: float) -> Choice:
        """Options by softmax(scores / T), each tested against the unit's present one."""
        logits = self.scores / temperature
        drawn = np.where(np.isfinite(logits), logits + self.rng.gumbel(size=logits.shape), -np.inf).argmax(axis=1)
        ratio = logits[self.index, drawn] - logits[self.index, self.choice]
        moves = np.log(self.rng.random(len(drawn)) + 1e-300) < ratio
        if not self.whole:
            few = self.rng.random(len(drawn)) < 2 / len(self.movable)
            few[self.rng.choice(self.movable)] = True
            moves &= few
        return np.where(moves, drawn, self.choice)

    def _gain(self, loss: float) -> float:
        above = max(loss - self.zero, _FLOOR * self.first)
        return math.log10(self.first) - math.log10(above) if math.isfinite(above) else -300.0

    def _learn(self, choice: Choice, gain: float) -> None:
        """S <- (1 - eta) S + eta log10(reference / loss), at the options of a state."""
        held: Floats = self.scores[self.index, choice]
        self.scores[self.index, choice] = (1 - self.eta) * held + self.eta * (gain - self.mean)
        self.mean = (1 - _MEMORY) * self.mean + _MEMORY * gain
