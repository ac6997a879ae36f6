"""Where to cut sorted columns into panels: as BAQ's closed form says it loses least.

If the columns of a panel share their bits, n_p of N with mean cost A_p, and the average of the bits is given, the
optimum loses N * prod A_p^(n_p / N), times what does not depend on the cut (BAQ with groups, `solvers.baq`). So the
best panels have the least sum of n_p log A_p, which dynamic programming finds exactly. What the cut costs to store
is worth 4^bits of loss: that many bits a weight would be left for all columns otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """How to cut.

    Attributes:
        columns: of each panel, in order; one entry if it is not worth cutting.
        gain: bits a weight that the cut is worth by the closed form, what it costs to store taken off.
    """

    columns: tuple[int, ...]
    gain: float


def best_sizes(costs: npt.ArrayLike, most: int, align: int, overhead: float = 0.0, least: float = 0.0) -> Sizes:
    """The panels for which equal-loss bits lose least.

    Args:
        costs: >= 0, of each column in the order in which they are cut: b bits lose cost * 4^-b.
        most: panels at most.
        align: all panels but the last have a multiple of this many columns, the last has at least as many.
        overhead: bits a weight that cutting costs, in however many panels.
        least: bits a weight that every further panel must be worth.
    """
    c = np.asarray(costs, np.float64)
    ends = _ends(len(c), align)
    table = _spans(c, ends)
    best = np.full((most + 1, len(ends)), np.inf)
    before = np.zeros((most + 1, len(ends)), np.intp)
    best[0, 0] = 0.0
    for panels in range(1, most + 1):
        total = best[panels - 1][:, None] + table
        before[panels] = np.argmin(total, axis=0)
        best[panels] = total.min(axis=0)
    whole = best[1, -1]
    gains = [0.0, *((whole - best[p, -1]) / (2 * len(c)) - overhead for p in range(2, most + 1))]
    count = 1 + int(np.argmax([gain - least * p for p, gain in enumerate(gains)]))
    places = [len(ends) - 1]
    for panels in range(count, 0, -1):
        places.append(int(before[panels, places[-1]]))
    return Sizes(tuple(int(n) for n in np.diff(ends[places[::-1]])), float(gains[count - 1]))


def equal_sizes(columns: int, most: int, align: int) -> tuple[int, ...]:
    """As many panels as there may be, of one size up to the alignment."""
    units = columns // align
    count = max(1, min(most, units))
    sizes = [align * (units // count + (place < units % count)) for place in range(count)]
    return (*sizes[:-1], columns - sum(sizes[:-1]))


def _ends(columns: int, align: int) -> npt.NDArray[np.intp]:
    """Where a panel may end: 0, align, 2 align, ..., and the last column."""
    inner = np.arange(align, columns - align + 1, align)
    return np.array([0, *inner, columns], np.intp)


def _spans(costs: Floats, ends: npt.NDArray[np.intp]) -> Floats:
    """Columns times log2 of their mean cost from each end to each later one, [ends, ends]; inf where none is later."""
    sums = np.concatenate([[0.0], np.cumsum(costs)])[ends]
    count = (ends[None, :] - ends[:, None]).astype(np.float64)
    smallest = (float(costs.max(initial=0.0)) or 1.0) * 1e-12  # columns without input: any bits will do
    mean = (sums[None, :] - sums[:, None]) / np.where(count > 0, count, 1) + smallest
    return np.where(count > 0, count * np.log2(np.maximum(mean, smallest)), np.inf)
