"""From predicted losses to true ones: the best predictions are measured, and the best of them is improved.

A quadratic model ranks millions of choices for the price of a few hundred runs, but its best choice is picked among
many, so it is likelier than others to be one that the model flatters. A few whole runs find that out. All choices see
the same samples, so most of the noise is common to them; what is left of it is the unit of the margin by which another
choice than the first must be better (benchmarks/allocation compares margins).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from qcompiler.measure.neighbours import Choice, Quadratic, neighbours
from qcompiler.measure.true_loss import TrueLoss

Floats = npt.NDArray[np.float64]
_ROUND = 6  # neighbours measured at a time: they share what comes before their change


@dataclass(frozen=True, eq=False)
class Reranked:
    """What the truth says about the best predictions.

    Attributes:
        choice: int [units], the one to take.
        index: its position among the choices given.
        predicted: float64 [choices], as given.
        true: float64 [choices], their true losses.
        gain: true loss of the first choice given, less that of `choice`; at least 0.
        noise: standard error of `gain`, paired over disjoint parts of the samples.
    """

    choice: Choice
    index: int
    predicted: Floats
    true: Floats
    gain: float
    noise: float


def rerank(
    truth: TrueLoss, choices: Sequence[Choice], predicted: Sequence[float] | Floats, margin: float = 0.0
) -> Reranked:
    """Measure choices and take the best.

    Args:
        truth: of the sites that are the problem's units.
        choices: feasible ones, best prediction first.
        predicted: their losses.
        margin: another choice than the first must be better by so many standard errors of the difference.

    Raises:
        ValueError: no choices, or not one prediction for each.
    """
    if not len(choices) or len(choices) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(choices)} choices")
    true = truth.losses(list(choices))
    index = 0
    for other in np.argsort(true, kind="stable"):
        gain, noise = truth.difference(choices[0], choices[other])
        if gain > margin * noise or not np.isfinite(true[0]):
            index = int(other)
            break
    gain, noise = truth.difference(choices[0], choices[index]) if index else (0.0, 0.0)
    return Reranked(np.asarray(choices[index], np.intp), index, np.asarray(predicted, np.float64), true, gain, noise)


@dataclass(frozen=True, eq=False)
class Improved:
    """The end of a search on the true loss.

    Attributes:
        choice: int [units].
        loss: its true loss.
        runs: choices that were measured.
        steps: true losses of the choices on the way, the first one included; they fall.
    """

    choice: Choice
    loss: float
    runs: int
    steps: tuple[float, ...]


def improve(truth: TrueLoss, problem: Quadratic, choice: Choice, runs: int) -> Improved:
    """Local search on the true loss, guided by the predicted one.

    The neighbours of the choice (one unit at another option, or two units) are measured a few at a time, best
    prediction first; the best that loses less than the choice itself replaces it. The result is feasible, and
    never worse than `choice`.

    Args:
        truth: of the sites that are the problem's units.
        problem: says what is feasible, and predicts.
        choice: int [units], feasible.
        runs: choices that may be measured, that of `choice` not counted.

    Raises:
        ValueError: `choice` is not feasible.
    """
    if not problem.feasible(choice):
        raise ValueError("the choice to improve is not feasible")
    best = np.asarray(choice, np.intp)
    loss = truth.loss(best)
    seen, steps, left = {tuple(best.tolist())}, [loss], runs
    near = neighbours(problem, best)
    while left > 0:
        fresh = (made for made, _ in near if tuple(made.tolist()) not in seen)
        group = list(islice(fresh, min(_ROUND, left)))
        if not group:
            break
        left -= len(group)
        seen.update(tuple(made.tolist()) for made in group)
        losses = truth.losses(group)
        if losses.min() < loss:
            best, loss = group[int(losses.argmin())], float(losses.min())
            steps.append(loss)
            near = neighbours(problem, best)
    return Improved(best, loss, runs - left, tuple(steps))
