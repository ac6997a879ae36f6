"""Active measurement: the cross terms on which a decision hinges, so that only these are measured exactly.

Sketches give every cross term at no further price, with an error. Whether one choice beats another depends on few of
them: the pairs of options that are in one of both choices and not in the other. Where their errors together could
outweigh the predicted difference, the most uncertain of them are worth a run of the model each, with both sites
quantized: G[a,b] = p - d_a - d_b. Solve again with these, and look again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from qcompiler.measure.neighbours import Choice, Quadratic
from qcompiler.measure.true_loss import FLOAT, TrueLoss

Floats = npt.NDArray[np.float64]
Pair = tuple[int, int, int, int]  # a unit, its option, a later unit, its option


def sketch_uncertainty(problem: Quadratic, share: float = 0.15, known: Iterable[Pair] = ()) -> Floats:
    """How far cross terms from sketches may be wrong, float64 [units * options, units * options].

    Args:
        problem: its `loss` is that of single changes.
        share: of the bound sqrt(G_aa G_bb) = 2 sqrt(loss_a loss_b); measured on digits nets: see
            benchmarks/allocation.
        known: pairs that were measured: 0.
    """
    units, options = problem.loss.shape
    size = np.sqrt(np.clip(np.where(np.isfinite(problem.loss), problem.loss, 0), 0, None)).ravel()
    found = 2 * share * np.outer(size, size)
    for unit in range(units):
        own = slice(unit * options, (unit + 1) * options)
        found[own, own] = 0
    for u, a, v, b in known:
        found[u * options + a, v * options + b] = found[v * options + b, u * options + a] = 0
    return found


def deciding_pairs(
    problem: Quadratic,
    choice: Choice,
    others: Sequence[Choice],
    uncertainty: Floats,
    confidence: float = 2.0,
) -> list[Pair]:
    """The pairs whose errors could make another choice better than `choice`, those that matter most first.

    Two choices are told apart if the difference of their objectives is above `confidence` standard deviations of it,
    the errors of cross terms being independent. For each choice that is not, the most uncertain terms in which both
    differ are listed, as many as it takes that knowing them tells the choices apart.

    Args:
        problem: quadratic.
        choice: int [units], the best found.
        others: its rivals: the next best ones, its neighbours.
        uncertainty: float64 [units * options, units * options], standard deviations of the cross terms; 0 where a
            pair is measured.
        confidence: in standard deviations.
    """
    options = problem.loss.shape[1]
    at_stake: dict[Pair, float] = {}
    best = problem.objective(choice)
    for other in others:
        pairs = [
            *_terms(choice, other, options, uncertainty),
            *_terms(other, choice, options, uncertainty),
        ]
        pairs.sort(key=lambda item: -item[1])
        gap, rest = abs(problem.objective(other) - best), sum(variance for _, variance in pairs)
        for pair, variance in pairs:
            if variance <= 0 or confidence * np.sqrt(max(rest, 0.0)) <= gap:
                break
            at_stake[pair] = at_stake.get(pair, 0.0) + variance
            rest -= variance
    return sorted(at_stake, key=lambda pair: -at_stake[pair])


def _terms(choice: Choice, other: Choice, options: int, uncertainty: Floats) -> Iterator[tuple[Pair, float]]:
    """The pairs of options in `choice` that are not in `other`, with the variance of each."""
    index = np.arange(len(choice)) * options + choice
    differ = choice != other
    for u in np.flatnonzero(differ):
        for v in range(len(choice)):
            if v != u and not (differ[v] and v < u):
                low, high = sorted((int(u), v))
                variance = float(uncertainty[index[low], index[high]]) ** 2
                yield (low, int(choice[low]), high, int(choice[high])), variance


def pair_terms(truth: TrueLoss, pairs: Sequence[Pair]) -> Floats:
    """The cross terms p - d_a - d_b of pairs, float64 [pairs]: all other sites float.

    NaN where an option alone makes the output infinite.
    """

    def only(changes: dict[int, int]) -> list[int]:
        return [changes.get(site, FLOAT) for site in range(truth.sites)]

    both = truth.losses([only({u: a, v: b}) for u, a, v, b in pairs])
    first = truth.losses([only({u: a}) for u, a, _, _ in pairs])
    second = truth.losses([only({v: b}) for _, _, v, b in pairs])
    with np.errstate(invalid="ignore"):
        return both - first - second


def with_terms(cross: Any, options: int, pairs: Sequence[Pair], terms: Floats) -> Any:
    """A copy of a matrix of cross terms (dense or sparse) in which some pairs have other values.

    Args:
        cross: symmetric, [units * options, units * options].
        options: of every unit.
        pairs: to replace.
        terms: float64 [pairs]; those that are not finite are left out.
    """
    dense = isinstance(cross, np.ndarray)
    found: Any = np.array(cross, np.float64) if dense else sparse.lil_array(cross, dtype=np.float64)
    for (u, a, v, b), term in zip(pairs, terms, strict=True):
        if np.isfinite(term):
            found[u * options + a, v * options + b] = found[v * options + b, u * options + a] = term
    return found if dense else sparse.csr_array(found)
