"""BAQ's closed form: bits that make every weight's loss equal, generalised to group sizes, bounds and whole bits.

Groups lose c_g 2^(-slope R_g), in all; the mean of R_g over the weights is limited. The problem is convex, and its
optimum equalises the loss per weight, c_g 2^(-slope R_g) / n_g, over the groups that no bound holds.

Source: BAQ (CSU-ModelCompression/BAQ), which has one column a group, equal sizes, slope 2 (1.95 in the released code)
and rounds the number of levels, not the bits. Bounds, sizes and whole bits are ours.
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcompiler.solvers.problem import Floats, InfeasibleProblem

Ints = npt.NDArray[np.int64]
Rounding = Literal["none", "integer", "levels"]


@dataclass(frozen=True, eq=False)
class BitAllocation:
    """Bits of every group, and how good they are.

    Attributes:
        bits: float64 [groups]: log2 of the number of levels.
        loss: sum of c_g 2^(-slope bits_g).
        bound: no bits, whole or not, within the bounds and the average lose less (the closed form's loss).
        average: mean bits of a weight; what the budget limits, and what the paper reports.
        container_average: mean bits of a weight where every group is stored in a whole number of bits.
        method: "baq-none", "baq-integer" or "baq-levels".
        seconds: wall time.
    """

    bits: Floats
    loss: float
    bound: float
    average: float
    container_average: float
    method: str
    seconds: float

    @property
    def gap(self) -> float:
        """(loss - bound) / loss, at least 0."""
        return max(0.0, (self.loss - self.bound) / self.loss) if self.loss > 0 else 0.0

    @property
    def levels(self) -> Ints:
        """int64 [groups]: levels that the bits stand for; 1 is a pruned group. Exact for rounded bits."""
        return level_counts(self.bits)


def allocate_bits(
    coefficients: npt.ArrayLike,
    weights: npt.ArrayLike,
    average: float,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    slope: float = 2.0,
    rounding: Rounding = "integer",
) -> BitAllocation:
    """Bits of least loss within an average, with the bound that the closed form proves.

    Args:
        coefficients: c_g >= 0, [groups].
        weights: n_g > 0, [groups]: weights a group.
        average: the most bits a weight may take in the mean over the weights.
        low: fewest bits, a number or [groups].
        high: most bits, a number or [groups].
        slope: the loss of a group falls by 2^slope a bit.
        rounding: "none" leaves the real bits, "integer" gives whole bits, "levels" a whole number of levels.

    Raises:
        InfeasibleProblem: the average is below the mean of `low`.
        ValueError: arguments out of range.
    """
    start = time.monotonic()
    c, n, least, most = _checked(coefficients, weights, average, low, high, slope)
    real = _clipped(c, n, average, least, most, slope)
    if rounding == "none":
        bits = real
    elif rounding == "integer":
        bits = integer_bits(c, n, average, least, most, slope)
    elif rounding == "levels":
        bits = level_bits(c, n, average, least, most, slope)
    else:
        raise ValueError(f"unknown rounding '{rounding}': use none, integer or levels")
    loss, bound = _loss(c, bits, slope), _loss(c, real, slope)
    bound = min(bound * (1 - 1e-13), loss)  # the closed form is exact up to rounding errors
    seconds = time.monotonic() - start
    return BitAllocation(bits, loss, bound, mean_bits(bits, n), container_bits(bits, n), f"baq-{rounding}", seconds)


def equal_loss_bits(
    coefficients: npt.ArrayLike,
    weights: npt.ArrayLike,
    average: float,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    slope: float = 2.0,
) -> Floats:
    """Real bits [groups] of least loss: clip(log2(c_g / (n_g mu)) / slope, low, high), mu found exactly.

    Groups of zero loss get `low`. Arguments and errors as in `allocate_bits`.
    """
    c, n, least, most = _checked(coefficients, weights, average, low, high, slope)
    return _clipped(c, n, average, least, most, slope)


def integer_bits(
    coefficients: npt.ArrayLike,
    weights: npt.ArrayLike,
    average: float,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    slope: float = 2.0,
) -> Floats:
    """Whole bits [groups] by greedy marginal gains: always one more bit where it saves most loss per weight.

    Optimal for groups of one size, else within the gain of one bit of one group. The greedy order's start is read off
    the closed form: its bits rounded down are what the greedy would have given so far. `low` and `high` must be whole.
    Other arguments and errors as in `allocate_bits`.
    """
    c, n, least, most = _checked(coefficients, weights, average, low, high, slope)
    if (least != np.floor(least)).any() or (most != np.floor(most)).any():
        raise ValueError("bounds of whole bits must be whole")
    real = _clipped(c, n, average, least, most, slope)
    bits = np.floor(real)
    if math.fsum(n * bits) > _budget(n, average):  # rounding errors have made 2.999... a 3
        bits = np.maximum(np.floor(real - 1e-9), least)
    room = _budget(n, average) - math.fsum(n * bits)
    gain = np.where(bits < most, c * np.exp2(-slope * bits) / n, 0.0)
    order = np.argsort(-gain, kind="stable")
    order = order[gain[order] > 0]
    fits = int(np.searchsorted(np.cumsum(n[order]), room, side="right"))
    bits[order[:fits]] += 1
    return _filled(bits, c, n, most, slope, room - math.fsum(n[order[:fits]]))


def level_bits(
    coefficients: npt.ArrayLike,
    weights: npt.ArrayLike,
    average: float,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    slope: float = 2.0,
) -> Floats:
    """log2 of whole numbers of levels [groups]: the paper's round(2^R), kept within the average.

    Where rounding up takes too much, the groups that lose least per bit given back are rounded down instead. A group
    may leave its bounds by that rounding, to a neighbouring number of levels. `low` must not be negative. Other
    arguments and errors as in `allocate_bits`.
    """
    c, n, least, most = _checked(coefficients, weights, average, low, high, slope)
    if (least < 0).any():
        raise ValueError("there is no number of levels below 0 bits")
    real = _clipped(c, n, average, least, most, slope)
    up = np.log2(level_counts(real))
    down = np.log2(np.maximum(np.floor(np.exp2(real)), 1.0))
    saved = n * (up - down)
    harm = c * (np.exp2(-slope * down) - np.exp2(-slope * up))
    raised = np.flatnonzero(saved > 0)
    raised = raised[np.argsort(harm[raised] / saved[raised], kind="stable")]
    over = math.fsum(n * up) - _budget(n, average)
    lowered = int(np.searchsorted(np.cumsum(saved[raised]), over)) + 1 if over > 0 else 0
    up[raised[:lowered]] = down[raised[:lowered]]
    return up


def level_counts(bits: npt.ArrayLike) -> Ints:
    """The paper's levels, round(2^R) and at least 1: int64 [groups]; 1 prunes the group to its zero point."""
    return np.maximum(np.rint(np.exp2(np.asarray(bits, np.float64))), 1).astype(np.int64)


def mean_bits(bits: npt.ArrayLike, weights: npt.ArrayLike) -> float:
    """Mean bits of a weight: with bits = log2(levels) what the paper reports, reached by mixed-radix packing only."""
    n = np.asarray(weights, np.float64)
    return math.fsum(n * np.asarray(bits, np.float64)) / math.fsum(n)


def container_bits(bits: npt.ArrayLike, weights: npt.ArrayLike) -> float:
    """Mean bits of a weight stored in a whole number of bits a group."""
    return mean_bits(np.ceil(np.asarray(bits, np.float64)), weights)


def _checked(
    coefficients: npt.ArrayLike,
    weights: npt.ArrayLike,
    average: float,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    slope: float,
) -> tuple[Floats, Floats, Floats, Floats]:
    c, n = np.array(coefficients, np.float64), np.array(weights, np.float64)
    if c.ndim != 1 or not c.size or n.shape != c.shape:
        raise ValueError(f"coefficients and weights must be of one length, not {c.shape} and {n.shape}")
    if not (np.isfinite(c).all() and (c >= 0).all()):
        raise ValueError("coefficients must be finite and not negative")
    if not (np.isfinite(n).all() and (n > 0).all()):
        raise ValueError("weights must be finite and positive")
    if not (math.isfinite(average) and 0 < slope < math.inf):
        raise ValueError("average must be finite and slope positive")
    least, most = (np.broadcast_to(np.asarray(b, np.float64), c.shape) for b in (low, high))
    if not (np.isfinite(least).all() and np.isfinite(most).all() and (least <= most).all()):
        raise ValueError("bounds must be finite, low not above high")
    floor = math.fsum(n * least)
    if floor > _budget(n, average) + 1e-12 * abs(floor):
        raise InfeasibleProblem({"bits": floor / math.fsum(n)}, {"bits": average})
    return c, n, least, most


def _budget(n: Floats, average: float) -> float:
    return average * math.fsum(n)


def _position(c: Floats, n: Floats, slope: float) -> Floats:
    """log2(c / n) / slope: bits without bounds, up to what is the same for all; -inf where nothing is lost."""
    with np.errstate(divide="ignore"):
        return (np.log2(c) - np.log2(n)) / slope


def _clipped(c: Floats, n: Floats, average: float, low: Floats, high: Floats, slope: float) -> Floats:
    """clip(position - t, low, high) with the t that spends the budget.

    Bits taken fall piecewise linearly in t; the breakpoints are sorted, and t is solved for on its piece from the
    groups that are free there, so that no rounding error of the running sums is left in it.
    """
    position, budget = _position(c, n, slope), _budget(n, average)
    lossy = np.isfinite(position)
    if math.fsum(n * np.where(lossy, high, low)) <= budget:
        return np.where(lossy, high, low)
    a, m, least, most = position[lossy], n[lossy], low[lossy], high[lossy]
    at = np.concatenate([a - most, a - least])
    order = np.argsort(at, kind="stable")
    at = at[order]
    falling = np.cumsum(np.concatenate([m, -m])[order])[:-1]  # weights whose bits fall between two breakpoints
    taken = math.fsum(n * np.where(lossy, high, low)) - np.concatenate([[0.0], np.cumsum(falling * np.diff(at))])
    piece = min(max(int(np.searchsorted(-taken, -budget, side="left")) - 1, 0), len(at) - 2)
    middle = 0.5 * (at[piece] + at[piece + 1])
    free = (a - most < middle) & (middle < a - least)
    if not free.any():
        return np.where(lossy, np.clip(position - middle, low, high), low)
    held = math.fsum((m * np.where(a - most >= middle, most, least))[~free]) + math.fsum((n * low)[~lossy])
    threshold = (math.fsum(m[free] * a[free]) - (budget - held)) / math.fsum(m[free])
    return np.where(lossy, np.clip(position - threshold, low, high), low)


def _filled(bits: Floats, c: Floats, n: Floats, high: Floats, slope: float, room: float) -> Floats:
    """The greedy's end: bits that still fit, the largest gain per weight first."""
    if (n != np.floor(n)).any():
        room -= 1e-12 * math.fsum(n * np.maximum(np.abs(bits), 1))  # sums of fractions are rounded
    able = np.flatnonzero((bits < high) & (n <= room) & (c > 0))
    gain = c[able] * np.exp2(-slope * bits[able]) / n[able]
    heap = [(-float(g), int(i)) for g, i in zip(gain, able, strict=True)]
    heapq.heapify(heap)
    smallest = float(n[able].min(initial=math.inf))
    while heap and room >= smallest:
        negative, group = heapq.heappop(heap)
        if n[group] > room:
            continue
        bits[group] += 1
        room -= float(n[group])
        if bits[group] < high[group]:
            heapq.heappush(heap, (negative * 2.0**-slope, group))
    return bits


def _loss(c: Floats, bits: Floats, slope: float) -> float:
    return math.fsum(c * np.exp2(-slope * bits))
