"""Factors U V of low rank that take from a weight what its rounding loses: one search for all low-rank methods.

They differ in what an error costs (`Metric`), in what is approximated first (the rounding error, or the weight itself),
and in how often the rest is rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import eigh
from scipy.sparse.linalg import LinearOperator, eigsh

from qcompiler.formats import QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.fit import encode, fit

FactorBits = Literal[8, 16]
Judge = Callable[[Floats, Floats], float]  # (W - U V, the same rounded) -> cost


@dataclass(frozen=True, eq=False)
class Metric:
    """What an error D of a weight costs: tr(D M D^T).

    Attributes:
        moments: M, float32 [columns, columns], or its diagonal [columns].
    """

    moments: Floats

    @staticmethod
    def plain(columns: int) -> Metric:
        """The squared error of the weight (LoRC, 2303.08302; SVDQuant, 2411.05007)."""
        return Metric(np.ones(columns, np.float32))

    @staticmethod
    def inputs(moments: Floats) -> Metric:
        """The squared error of the output, by the second moments of the input (QERA, 2410.06040)."""
        return Metric(moments / np.float32(moments.diagonal().max(initial=0) or 1.0))

    @staticmethod
    def slim(magnitude: np.ndarray) -> Metric:
        """SLiM's saliency (2410.09615): columns weigh as mean |x|, lifted by the smallest of them to be invertible.

        Args:
            magnitude: [columns], mean |x|. Dead columns are lifted by the smallest that is not 0.
        """
        alive = magnitude[magnitude > 0]
        if not alive.size:
            return Metric.plain(len(magnitude))
        lifted = (magnitude + alive.min()) / alive.max()
        return Metric(np.square(lifted).astype(np.float32))

    def weigh(self, array: Floats) -> Floats:
        """Array M, for an array [..., columns]."""
        product: Floats = array * self.moments if self.moments.ndim == 1 else array @ self.moments
        return product

    def cost(self, error: Floats) -> float:
        """What an error [rows, columns] costs."""
        return float(np.einsum("rk,rk->", self.weigh(error), error, dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Factors:
    """U float32 [rows, rank] and V [rank, columns], as they are stored.

    Attributes:
        left, right: numbers of float16; or whole numbers of int8, and such numbers times the steps.
        steps: float32 [rank], of the rows of V where both are int8 (those of U are in them); None: float16.
    """

    left: Floats
    right: Floats
    steps: Floats | None = None

    @staticmethod
    def zero(rows: int, columns: int, rank: int) -> Factors:
        """Those that change nothing."""
        return Factors(np.zeros((rows, rank), np.float32), np.zeros((rank, columns), np.float32))

    def product(self) -> Floats:
        """U V, float32 [rows, columns]."""
        return np.asarray(self.left @ self.right, np.float32)


@dataclass(frozen=True)
class Rounding:
    """How matrices that lie one upon the other are rounded to nearest: (rows, format) of each, from the top."""

    parts: Sequence[tuple[int, QuantSpec]]

    def fitted(self, matrix: Floats) -> Callable[[Floats], Floats]:
        """Rounding with the scales of least squared error for `matrix`, [all rows, columns]."""
        grids = [(rows, spec, *fit(matrix[rows], spec, "mse")) for rows, spec in self._places()]

        def rounded(other: Floats) -> Floats:
            return np.concatenate([encode(other[r], spec, scale, zero).decode() for r, spec, scale, zero in grids])

        return rounded

    def _places(self) -> list[tuple[slice, QuantSpec]]:
        ends = np.cumsum([rows for rows, _ in self.parts])
        return [(slice(end - rows, end), spec) for end, (rows, spec) in zip(ends.tolist(), self.parts, strict=True)]


@dataclass(frozen=True)
class Search:
    """How factors are searched.

    Attributes:
        sweeps: of V, U and scales, at most; the search ends with the first one that is no better.
        repeats: of U in a sweep, with the same V and scales.
        of_weight: the first factors are those of the weight itself, not of its rounding error.
        bits: of a stored number of the factors, 8 or 16.
    """

    sweeps: int = 3
    repeats: int = 5
    of_weight: bool = False
    bits: FactorBits = 16


def search(
    matrix: Floats, rounding: Rounding, metric: Metric, rank: int, how: Search, judge: Judge | None = None
) -> tuple[Factors, list[float]] | None:
    """Factors such that rounding W - U V costs least.

    W - U V is rounded anew, which makes an error anew, of which U V are made anew.

    Args:
        matrix: W, float32 [rows, columns].
        rounding: of it.
        metric: what U V approximate best.
        rank: less than rows and columns.
        how: see `Search`.
        judge: what rounding costs; by default the metric of what it loses.

    Returns:
        The best factors, and the cost of each sweep; None if there are none (nothing is lost, or float16 cannot hold
        them).
    """
    cost = judge or (lambda rest, rounded: metric.cost(rest - rounded))
    rounded = np.zeros_like(matrix) if how.of_weight else rounding.fitted(matrix)(matrix)
    best: Factors | None = None
    costs: list[float] = []
    for _ in range(how.sweeps):
        found = _sweep(matrix, matrix - rounded, rounding, metric, rank, how)
        if found is None:
            break
        factors, rounded = found
        costs.append(cost(matrix - factors.product(), rounded))
        if not costs[-1] < min(costs[:-1], default=np.inf):
            break
        best = factors
    return None if best is None else (best, costs)


def _sweep(
    matrix: Floats, error: Floats, rounding: Rounding, metric: Metric, rank: int, how: Search
) -> tuple[Factors, Floats] | None:
    """Factors of an error, and what is left of the matrix rounded; U again for the error that this makes."""
    right = _directions(error, metric, rank)
    factors = None if right is None else _fitted(error, right, metric, how.bits)
    if right is None or factors is None:
        return None
    rest = matrix - factors.product()
    grid = rounding.fitted(rest)
    rounded = grid(rest)
    for _ in range(how.repeats - 1):
        again = _fitted(matrix - rounded, right, metric, how.bits)
        if again is None:
            break
        factors = again
        rounded = grid(matrix - factors.product())
    return factors, rounded


def approximate(error: Floats, metric: Metric, rank: int, bits: FactorBits = 16) -> Factors | None:
    """The U V of a rank that leave the least cost of error - U V; None if there are none in float16 (or int8)."""
    right = _directions(error, metric, rank)
    return None if right is None else _fitted(error, right, metric, bits)


def _directions(error: Floats, metric: Metric, rank: int) -> Floats | None:
    """V float32 [rank, columns] of the U V that leaves the least cost of error - U V; None for no finite error.

    With u the largest eigenvectors of error M error^T that is u^T error; its rows are scaled to a largest element of 1.
    """
    size = np.abs(error).max(initial=0)
    if not (np.isfinite(size) and size > 0):
        return None
    unit = error / size
    vectors = _by_gram(unit, metric, rank) if metric.moments.ndim == 1 else _by_products(unit, metric, rank)
    if vectors is None:
        return None
    right = vectors.T @ unit
    reach = np.abs(right).max(1, keepdims=True)
    return np.divide(right, reach, out=np.zeros_like(right), where=reach > 0)


def _by_gram(error: Floats, metric: Metric, rank: int) -> Floats | None:
    """The largest eigenvectors of error M error^T for a diagonal M, through the smaller of the two Gram matrices."""
    scaled = error * np.sqrt(metric.moments)
    wide = scaled.shape[0] <= scaled.shape[1]
    gram = scaled @ scaled.T if wide else scaled.T @ scaled
    if not gram.any():
        return None
    _, vectors = eigh(gram, subset_by_index=(len(gram) - rank, len(gram) - 1))
    return np.asarray(vectors if wide else scaled @ vectors, np.float32)


def _by_products(error: Floats, metric: Metric, rank: int) -> Floats | None:
    """The largest eigenvectors of error M error^T, of which nothing but products with vectors is computed."""

    def apply(vector: Floats) -> Floats:
        return np.asarray(error @ metric.weigh(error.T @ vector), np.float32)

    rows = len(error)
    first = apply(np.random.default_rng(0).normal(size=rows).astype(np.float32))
    if not (np.any(first) and np.isfinite(first).all()):
        return None
    operator = LinearOperator((rows, rows), matvec=apply, dtype=np.float32)  # type: ignore[call-arg]
    _, vectors = eigsh(operator, k=rank, v0=first, tol=1e-3)  # type: ignore[arg-type]
    return np.asarray(vectors, np.float32)


def _fitted(error: Floats, right: Floats, metric: Metric, bits: FactorBits) -> Factors | None:
    """The U of least cost for directions V [rank, columns] whose largest elements are 1, both as they are stored.

    None where they overflow.
    """
    narrow = bits == 8
    right = _codes(right, 1)[0] if narrow else right.astype(np.float16).astype(np.float32)
    weighted = metric.weigh(right)
    inverse = np.linalg.pinv(weighted @ right.T, rcond=1e-6, hermitian=True)
    left = np.asarray(error @ weighted.T @ inverse, np.float32)
    if not np.isfinite(left).all():
        return None
    return _with_steps(left, right) if narrow else _halved(left, right)


def _with_steps(left: Floats, right: Floats) -> Factors:
    """U in int8 beside V in whole numbers; its steps go into V."""
    codes, steps = _codes(left, 0)
    return Factors(codes, right * steps.T, steps[0])


def _codes(matrix: Floats, axis: int) -> tuple[Floats, Floats]:
    """Whole numbers up to 127 along an axis, and their steps (1 where all are 0), which keep it with length 1."""
    reach = np.abs(matrix).max(axis, keepdims=True, initial=0) / np.float32(127)
    steps = np.where(reach > 0, reach, np.float32(1))
    return np.rint(matrix / steps), steps


def _halved(left: Floats, right: Floats) -> Factors | None:
    """Both in float16: for its range a power of two is moved from U to V, half of what U is larger."""
    reach = np.abs(left).max(0, initial=0)
    shift = np.exp2(np.round(np.log2(np.where(reach > 0, reach, 1)) / 2)).astype(np.float32)
    with np.errstate(over="ignore"):
        stored = [(a.astype(np.float16)).astype(np.float32) for a in (left / shift, right * shift[:, None])]
    return Factors(*stored) if all(np.isfinite(a).all() for a in stored) else None
