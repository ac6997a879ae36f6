"""Scales and zero points of a weight matrix: min-max, or the smallest (weighted) squared error, or HQQ's.

Clipping a few large weights lets the rest use a finer grid. The search is over the clipped ends; every
candidate is judged with the scale as it will be stored (`round_scale`), and min-max is always among the
candidates, so "mse" is never worse than "minmax". A least-squares step, which gives the best scale for given
codes in closed form, follows the search. "hqq" lets few weights be far off (see `hqq`). Works for every format whose
`decode` is linear in the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import NotFinite
from qcompiler.formats.base import Floats, QTensor, QuantSpec, round_scale, row_parts, spread_rows
from qcompiler.formats.granularity import PerChannel, PerGroup, PerRowGroup, PerTensor
from qcompiler.formats.hqq import half_quadratic
from qcompiler.formats.moments import Moments, diagonal
from qcompiler.formats.progressive import Progressive
from qcompiler.formats.progressive_fit import fit_progressive
from qcompiler.formats.promoted import Promoted
from qcompiler.formats.promotion import promote
from qcompiler.formats.scales import free_magnitude

Method = Literal["minmax", "mse", "hqq"]
METHODS: tuple[Method, ...] = ("minmax", "mse", "hqq")
_SHRINK = tuple(float(f) for f in np.geomspace(1.0, 0.35, 15)[1:])
_NUDGE = (0.85, 0.94, 1.06)  # one end at a time, relative to the best joint shrink
_REFITS = 2
_REPAIR = "repair the weights or the data, or keep what reads them float: --keep"
_CHUNK = 1 << 15  # elements that are searched at a time: a few such temporaries stay in the cache


def fit(
    matrix: Floats,
    spec: QuantSpec,
    method: Method = "mse",
    importance: npt.NDArray[np.floating] | None = None,
) -> tuple[Floats, Floats | None]:
    """Scales (and zero points) for quantizing a matrix.

    Args:
        matrix: float32 [rows, columns].
        spec: format, granularity, symmetry, dtype of the scales.
        method: "minmax" covers every weight; "mse" minimises sum(importance * error^2) in each group; "hqq"
            sum(importance * |error|^0.7), from min-max on.
        importance: non-negative weights of the squared errors, [columns] or [rows, columns]; or [products, columns,
            columns], the second moments H of the inputs of the rows (split evenly over the products): "mse" then
            minimises e^T H e within each group of columns, and all else takes its diagonal. They also say which groups
            of a `Promoted` format are promoted.

    Returns:
        scale float32 [scale rows, groups], already rounded to `spec.scale_dtype`, and zero (integer-valued
        float32 of the same shape), or None for a symmetric spec. Of `Promoted` formats flags are in zero.

    Raises:
        ValueError: the matrix is not two-dimensional or not finite, or importance does not fit it.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}': use {', '.join(METHODS)}")
    matrix = _checked(matrix)
    weights = _checked_importance(importance, matrix)
    if weights is not None and weights.ndim == 3 and not _in_groups(spec, method):
        weights = diagonal(weights, len(matrix))
    if isinstance(spec.granularity, PerRowGroup):
        return _fit_turned(matrix, spec, method, weights)
    if isinstance(spec.format, Progressive):
        with np.errstate(over="ignore"):  # as below
            return fit_progressive(matrix, spec, method, weights)
    if isinstance(spec.format, Promoted):
        narrow, wide = (replace(spec, format=fmt) for fmt in (spec.format.narrow, spec.format.wide))
        forms = [quantize(matrix, one, method, weights) for one in (narrow, wide)]
        return promote(spec.format, matrix, forms[0], forms[1], weights)
    unit = free_magnitude(matrix, spec)
    if unit != 1:
        matrix = matrix / unit
    grid = spec.granularity.grid(*matrix.shape)
    scale, zero = np.ones(grid, np.float32), np.zeros(grid, np.float32)
    for rows, groups, columns in _tiles(matrix.shape, spec):
        with np.errstate(over="ignore"):  # the squared error of weights beyond 1e19; infinity compares rightly
            best = _search(*_blocks(matrix, weights, rows, groups, columns), spec, method)
        shape = scale[rows, groups].shape
        scale[rows, groups] = best.scale.reshape(shape)
        zero[rows, groups] = best.zero.reshape(shape)
    if unit != 1:
        scale = round_scale(scale * unit, spec.scale_dtype)
    return scale, None if spec.symmetric else zero


def _in_groups(spec: QuantSpec, method: Method) -> bool:
    """Whether errors of one group of a row can be judged together."""
    plain = not isinstance(spec.format, Progressive | Promoted)
    return method == "mse" and plain and isinstance(spec.granularity, PerGroup | PerChannel)


def _fit_turned(
    matrix: Floats, spec: QuantSpec, method: Method, weights: Floats | None
) -> tuple[Floats, Floats | None]:
    """Groups of rows: those of the columns of the transposed matrix."""
    assert isinstance(spec.granularity, PerRowGroup)
    turned = None if weights is None else np.broadcast_to(weights, matrix.shape).T
    found = fit(matrix.T, replace(spec, granularity=PerGroup(spec.granularity.size)), method, turned)
    scale, zero = (None if part is None else np.ascontiguousarray(part.T) for part in found)
    assert scale is not None
    return scale, zero


def quantize(
    matrix: Floats,
    spec: QuantSpec,
    method: Method = "mse",
    importance: npt.NDArray[np.floating] | None = None,
) -> QTensor:
    """`fit`, then round every weight to its nearest code. Arguments and errors as in `fit`."""
    scale, zero = fit(matrix, spec, method, importance)
    return encode(matrix, spec, scale, zero)


def encode(matrix: Floats, spec: QuantSpec, scale: Floats, zero: Floats | None) -> QTensor:
    """Round a matrix [rows, columns] to the nearest codes of given scales and zeros [scale rows, groups]."""
    matrix = np.asarray(matrix, np.float32)
    codes = np.empty(matrix.shape, spec.format.encode(matrix[:0], np.ones((0, 1), np.float32), None).dtype)
    for rows in row_parts(matrix.shape):
        scales, zeros = spread_rows(scale, zero, spec, rows, matrix.shape[1])
        codes[rows] = spec.format.encode(matrix[rows], scales, zeros)
    return QTensor(spec, codes, scale, zero)


def _checked(matrix: Floats) -> Floats:
    matrix = np.ascontiguousarray(matrix, np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"a matrix [rows, columns] is needed, not shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise NotFinite("the matrix holds NaN or infinity", fix=_REPAIR)
    return matrix


def _checked_importance(importance: npt.NDArray[np.floating] | None, matrix: Floats) -> Floats | None:
    if importance is None:
        return None
    weights = np.asarray(importance, np.float32)
    moments = weights.ndim == 3 and weights.shape[1:] == 2 * matrix.shape[1:] and len(matrix) % len(weights) == 0
    if not moments and weights.shape not in (matrix.shape, matrix.shape[1:]):
        raise ValueError(f"importance of shape {weights.shape} does not fit a matrix of shape {matrix.shape}")
    lowest = np.einsum("pkk->pk", weights) if moments else weights
    if not np.isfinite(weights).all() or (weights.size and lowest.min() < 0):
        raise NotFinite("importance must be finite and not negative", fix=_REPAIR)
    return weights


def _tiles(shape: tuple[int, ...], spec: QuantSpec) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, groups, columns) of parts that hold whole groups, all of one width."""
    rows, columns = shape
    if isinstance(spec.granularity, PerTensor):
        yield slice(None), slice(0, 1), slice(None)
        return
    size = max(1, spec.granularity.group_size(columns))
    full = columns // size
    step = max(1, _CHUNK // max(columns, 1))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        if full:
            yield part, slice(0, full), slice(0, full * size)
        if full * size < columns:
            yield part, slice(full, full + 1), slice(full * size, columns)


def _blocks(
    matrix: Floats, weights: Floats | None, rows: slice, groups: slice, columns: slice
) -> tuple[Floats, Floats | Moments | None]:
    """A tile as [groups, width], with its importance."""
    part = matrix[rows, columns]
    count = groups.stop - groups.start
    if rows != slice(None):
        count *= part.shape[0]
    shape = (count, part.size // max(count, 1))
    if weights is None:
        return part.reshape(shape), None
    if weights.ndim == 3:
        products = np.arange(len(matrix))[rows] // (len(matrix) // len(weights))
        return part.reshape(shape), Moments.of(weights, products, groups.stop - groups.start, columns)
    return part.reshape(shape), np.broadcast_to(weights, matrix.shape)[rows, columns].reshape(shape)


class _Best:
    """The best scale and zero of each group so far: block [groups, width], scale and zero [groups, 1]."""

    def __init__(self, block: Floats, weight: Floats | Moments | None, spec: QuantSpec) -> None:
        self.block, self.spec, self.weight = block, spec, weight
        self.low = block.min(1, keepdims=True, initial=0.0)
        self.high = block.max(1, keepdims=True, initial=0.0)
        scale, zero = spec.format.fit(self.low, self.high, spec.symmetric)
        self.scale: Floats = round_scale(scale, spec.scale_dtype)
        self.zero: Floats = np.zeros_like(self.scale) if zero is None else zero  # not used if symmetric
        self.error: Floats | None = None
        self.ends = np.ones((2, *self.scale.shape), np.float32)  # factors of low and high

    def _judge(self, scale: Floats, zero: Floats) -> Floats:
        fmt, offset = self.spec.format, None if self.spec.symmetric else zero
        error = fmt.decode(fmt.encode(self.block, scale, offset), scale, offset) - self.block
        return np.einsum("ij,ij->i", error, self._weighed(error))[:, None]

    def _weighed(self, error: Floats) -> Floats:
        if isinstance(self.weight, Moments):
            return self.weight.times(error)
        return error if self.weight is None else error * self.weight

    def offer(self, scale: Floats, zero: Floats, ends: Floats | None = None) -> None:
        """Take a candidate wherever it is better than what is there."""
        if self.error is None:
            self.error = self._judge(self.scale, self.zero)
        scale = round_scale(scale, self.spec.scale_dtype)
        error = self._judge(scale, zero)
        better = error < self.error
        self.scale, self.error = np.where(better, scale, self.scale), np.where(better, error, self.error)
        self.zero = np.where(better, zero, self.zero)
        if ends is not None:
            self.ends = np.where(better, ends, self.ends)

    def offer_ends(self, ends: Floats) -> None:
        """Try the grid over [low * ends[0], high * ends[1]]."""
        scale, zero = self.spec.format.fit(self.low * ends[0], self.high * ends[1], self.spec.symmetric)
        self.offer(scale, self.zero if zero is None else zero, ends)

    def offer_refit(self) -> None:
        """Try the least-squares scale for the present codes."""
        fmt, offset = self.spec.format, None if self.spec.symmetric else self.zero
        units = fmt.decode(fmt.encode(self.block, self.scale, offset), np.ones_like(self.scale), offset)
        weighted = self._weighed(units)
        power = np.einsum("ij,ij->i", weighted, units)[:, None]
        product = np.einsum("ij,ij->i", weighted, self.block)[:, None]
        usable = (power > 0) & (product > 0)
        self.offer(np.where(usable, product / np.where(usable, power, 1), self.scale), self.zero)


def _search(block: Floats, weight: Floats | Moments | None, spec: QuantSpec, method: Method) -> _Best:
    best = _Best(block, weight, spec)
    if method == "minmax":
        return best
    if method == "hqq":
        assert not isinstance(weight, Moments)
        best.scale, best.zero = half_quadratic(block, weight, spec, best.scale, best.zero)
        return best
    half = 1 << (spec.bits - 1)
    # (half - 1) / half: the largest weight on the most negative code, which symmetric min-max never uses
    for factor in (*_SHRINK, (half - 1) / half):
        best.offer_ends(np.full_like(best.ends, factor))
    if not spec.symmetric:
        for end in (0, 1, 0, 1):
            centre = best.ends.copy()
            for nudge in _NUDGE:
                ends = centre.copy()
                ends[end] = np.minimum(ends[end] * np.float32(nudge), 1)
                best.offer_ends(ends)
    for _ in range(_REFITS):
        best.offer_refit()
        if not spec.symmetric:
            _shift_zero(best)
    return best


def _shift_zero(best: _Best) -> None:
    """Try the neighbouring zero points at the present scale."""
    lowest, highest = best.spec.format.code_range
    centre, scale = best.zero.copy(), best.scale.copy()
    for step in (-1, 1):
        best.offer(scale, np.clip(centre + np.float32(step), lowest, highest).astype(np.float32))
