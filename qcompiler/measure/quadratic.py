"""Cross terms of a quadratic loss model: bounded, made convex, and checked for sense.

All functions see G float64 [n, n], symmetric, as `Sensitivity.cross` gives it: unit s has the entries
starts[s] .. starts[s + 1], and a choice x (one entry a unit) is predicted to lose 1/2 x^T G x. Entries between
options of one unit therefore never count; the functions that change them change no prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_LEAST_RELIABLE = 0.5


def bounds(diagonal: Floats) -> Floats:
    """The largest cross terms that a convex loss can have, sqrt(G_aa G_bb): float64 [n, n].

    0 where the diagonal is negative or infinite.
    """
    root = np.sqrt(np.where(np.isfinite(diagonal), np.maximum(diagonal, 0), 0))
    return np.outer(root, root)


def clip_cross(gram: Floats) -> Floats:
    """G with a diagonal of at least 0 and every cross term within `bounds`: what noise cannot have made true."""
    diagonal = np.maximum(np.diag(gram), 0)
    bound = bounds(diagonal)
    clipped = np.clip(gram, -bound, bound)
    np.fill_diagonal(clipped, diagonal)
    return clipped


def fill_within(starts: Integers, gram: Floats, correlation: float = 0.95) -> Floats:
    """G with correlation * sqrt(G_aa G_bb) between the options of a unit, where zeros make it less convex than it is.

    The errors of one weight at two widths resemble each other. No prediction changes.
    """
    filled, bound = gram.copy(), bounds(np.diag(gram))
    for low, high in pairwise(starts):
        own = slice(low, high)
        filled[own, own] = correlation * bound[own, own]
    np.fill_diagonal(filled, np.diag(gram))
    return filled


def reliability(starts: Integers, sketches: npt.NDArray[np.float32], parts: int = 16) -> Floats:
    """How far the products of sketches are more than chance: a factor for each entry, one a pair of units.

    It is the James-Stein factor 1 - noise / power over all candidates of the two units: 1 where disjoint parts agree,
    and taken for 0 where more than half of the power may be noise. What is returned is the nearest positive
    semidefinite matrix with ones on the diagonal: a Gram matrix times that, entry by entry, stays positive semidefinite
    (Schur).

    Args:
        starts: int64 [units + 1], as in `Sensitivity.cross`.
        sketches: float32 [candidates of all units, width], of length 1, the samples side by side.
        parts: disjoint parts of the width that are compared.

    Returns:
        float64 [candidates, candidates], symmetric; 1 within a unit.
    """
    count, units = len(sketches), len(starts) - 1
    parts = max(1, min(parts, sketches.shape[1]))
    total, squares = np.zeros((count, count)), np.zeros((count, count))
    for part in np.array_split(np.arange(sketches.shape[1]), parts):
        product = parts * (sketches[:, part] @ sketches[:, part].T).astype(np.float64)
        total += product
        squares += product**2
    mean = total / parts
    noise = (squares / parts - mean**2) / max(parts - 1, 1)
    member = np.repeat(np.arange(units), np.diff(starts))
    power = _by_units(mean**2, member, units)
    factor = np.zeros((units, units))
    np.divide(power - _by_units(noise, member, units), power, out=factor, where=power > 0)
    factor = np.where(factor < _LEAST_RELIABLE, 0, np.minimum(factor, 1))
    np.fill_diagonal(factor, 1)
    factor = project_psd(factor)
    size = np.sqrt(np.maximum(factor.diagonal(), 1e-300))
    return (factor / np.outer(size, size))[member][:, member]


def _by_units(entries: Floats, member: Integers, units: int) -> Floats:
    """Sums of the entries of each pair of units."""
    rows = np.zeros((units, entries.shape[1]))
    np.add.at(rows, member, entries)
    sums = np.zeros((units, units))
    np.add.at(sums.T, member, rows.T)
    return sums


def project_psd(gram: Floats) -> Floats:
    """The nearest positive semidefinite matrix: negative eigenvalues become 0. Predictions change (CLADO's repair).

    `fill_within` first, or far more is taken away than noise.
    """
    values, vectors = np.linalg.eigh(gram)
    projected = (vectors * np.maximum(values, 0)) @ vectors.T
    return (projected + projected.T) / 2


def shift_psd(gram: Floats) -> tuple[Floats, float]:
    """G + c I that is positive semidefinite, and c >= 0.

    Every prediction rises by the same c * units / 2, so the best choice stays the best.
    """
    shift = max(0.0, -float(np.linalg.eigvalsh(gram)[0]))
    return gram + shift * np.eye(len(gram)), shift


def predicted(gram: Floats, chosen: Integers) -> float:
    """1/2 x^T G x for the entries chosen, one a unit."""
    return float(gram[np.ix_(chosen, chosen)].sum() / 2)


def unconstrained(starts: Integers, gram: Floats, widest: Sequence[int]) -> Integers:
    """The best choice found where nothing is scarce: entries int64 [units].

    Coordinate descent from the widest formats, the least single losses, and every option of equal rank.

    Args:
        starts: of the units in G.
        gram: finite.
        widest: for each unit the position of its widest option, which is preferred where nothing else is better.
    """
    wide = starts[:-1] + np.asarray(widest, np.int64)
    found = [_descend(starts, gram, start, wide) for start in _starting_points(starts, gram, wide)]
    return min(found, key=lambda chosen: predicted(gram, chosen))


def narrower_units(starts: Integers, gram: Floats, widest: Sequence[int], tolerance: float = 0.0) -> dict[int, float]:
    """CLADO's sanity check: with no budget the widest formats everywhere should be best.

    Returns:
        The units for which the model prefers less, and how much it claims to gain by it. Empty if G is sane; if not,
        the model bends where it should not (2 bits, too few samples): project it, or do not trust it.

    Args:
        starts: of the units in G.
        gram: finite.
        widest: for each unit the position of its widest option.
        tolerance: gains up to this much do not count.
    """
    chosen = unconstrained(starts, gram, widest)
    gains: dict[int, float] = {}
    for unit, entry in enumerate(chosen):
        wide = int(starts[unit]) + widest[unit]
        costs = _costs(gram, chosen, unit)
        gain = float(costs[wide] - costs[entry])
        if entry != wide and gain > tolerance:
            gains[unit] = gain
    return gains


def _starting_points(starts: Integers, gram: Floats, wide: Integers) -> Iterator[Integers]:
    yield wide
    diagonal = np.diag(gram)
    yield np.array([low + np.argmin(diagonal[low:high]) for low, high in pairwise(starts)], np.int64)
    for rank in range(int(np.diff(starts).max(initial=0))):
        yield np.minimum(starts[:-1] + rank, starts[1:] - 1)


def _descend(starts: Integers, gram: Floats, start: Integers, wide: Integers) -> Integers:
    chosen, better = start.copy(), True
    while better:
        better = False
        for unit, (low, high) in enumerate(pairwise(starts)):
            costs = _costs(gram, chosen, unit)
            best = int(low + np.argmin(costs[low:high]))
            best = int(wide[unit]) if costs[wide[unit]] <= costs[best] else best
            # equal up to rounding is no better: it could go round in circles
            if costs[best] < costs[chosen[unit]] - 1e-12 * abs(costs[chosen[unit]]):
                chosen[unit], better = best, True
    return chosen


def _costs(gram: Floats, chosen: Integers, unit: int) -> Floats:
    """What each entry would add if it were the choice of this unit (only its own entries mean anything)."""
    others = np.delete(chosen, unit)
    return np.diag(gram) / 2 + gram[:, others].sum(1)
