"""Scales and zero points of both levels of `Progressive`, by trying all group scales that there are."""

from __future__ import annotations

import numpy as np

from qcompiler.formats.base import Floats, QuantSpec, round_scale, row_parts
from qcompiler.formats.granularity import PerTensor
from qcompiler.formats.hqq import POWER
from qcompiler.formats.progressive import Progressive

_POWERS = {"mse": 2.0, "hqq": POWER}
_DIGITS = np.float32(1 << 16)
_SMALLEST = np.float32(2.0**-24)  # step of subnormal float16


def fit_progressive(matrix: Floats, spec: QuantSpec, method: str, weights: Floats | None) -> tuple[Floats, Floats]:
    """Products of both scales, and zero points: float32 [scale rows, groups] each; arguments as in `fit`."""
    assert isinstance(spec.format, Progressive)
    if isinstance(spec.granularity, PerTensor):
        flat = None if weights is None else np.broadcast_to(weights, matrix.shape).reshape(1, -1)
        return _fit_rows(matrix.reshape(1, -1), spec, method, flat, matrix.size)
    size = max(1, spec.granularity.group_size(matrix.shape[1]))
    parts = [
        _fit_rows(matrix[rows], spec, method, _of(weights, matrix, rows), size) for rows in row_parts(matrix.shape)
    ]
    if not parts:
        empty = np.ones(spec.granularity.grid(*matrix.shape), np.float32)
        return empty, empty
    scale, zero = (np.concatenate(each) for each in zip(*parts, strict=True))
    return scale, zero


def _of(weights: Floats | None, matrix: Floats, rows: slice) -> Floats | None:
    return None if weights is None else np.broadcast_to(weights, matrix.shape)[rows]


def row_scales(matrix: Floats, dtype: str, protective: int) -> Floats:
    """The first level, [rows, 1]: the largest weight becomes `protective`, or one more by the rounding of the scale."""
    reach = np.abs(matrix).max(1, keepdims=True, initial=0)
    part, power = np.frexp(np.where(reach > 0, reach / np.float32(protective), np.float32(1)))
    few = np.ldexp(np.rint(part * _DIGITS) / _DIGITS, power)  # so that products with group scales are exact
    scale = round_scale(few, dtype)
    return np.where(reach > (protective + 1) * scale, round_scale(scale + _SMALLEST, dtype), scale)


def _fit_rows(matrix: Floats, spec: QuantSpec, method: str, weights: Floats | None, size: int) -> tuple[Floats, Floats]:
    assert isinstance(spec.format, Progressive)
    outer = row_scales(matrix, spec.scale_dtype, spec.format.protective)
    starts = np.arange(0, matrix.shape[1], size)
    unit = matrix / outer
    low = np.minimum(np.minimum.reduceat(unit, starts, axis=1), 0)
    high = np.maximum(np.maximum.reduceat(unit, starts, axis=1), 0)
    inner, zero = _minmax(spec.format, low, high)
    if method != "minmax":
        inner, zero = _searched(unit, spec, (low, inner, zero), _POWERS[method], weights)
    return outer * inner, zero


def _minmax(fmt: Progressive, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """The paper's rule: round((high - low) / 15), the zero point that puts `low` at the smallest code."""
    inner = np.clip(np.rint((high - low) / fmt.grid.hi), 1, fmt.largest_scale).astype(np.float32)
    return inner, np.clip(np.rint(-low / inner), *fmt.zero_range(inner)).astype(np.float32)


def _searched(
    unit: Floats, spec: QuantSpec, start: tuple[Floats, Floats, Floats], power: float, weights: Floats | None
) -> tuple[Floats, Floats]:
    """All scales, each with the zero points next to where `low` is the smallest code and to where half of it is."""
    low, inner, zero = start
    fmt = spec.format
    assert isinstance(fmt, Progressive)
    best = _error(unit, spec, (inner, zero), power, weights)
    for number in range(1, fmt.largest_scale + 1):
        scale = np.full_like(low, number)
        for share, step in ((1, -1), (1, 0), (1, 1), (0.75, 0)):
            point = np.clip(np.rint(-share * low / scale) + step, *fmt.zero_range(scale)).astype(np.float32)
            error = _error(unit, spec, (scale, point), power, weights)
            better = error < best
            best = np.where(better, error, best)
            inner, zero = np.where(better, scale, inner), np.where(better, point, zero)
    return inner, zero


def _error(unit: Floats, spec: QuantSpec, grid: tuple[Floats, Floats], power: float, weights: Floats | None) -> Floats:
    """Sum of weights * |error|^power of every group, [rows, groups]."""
    columns = unit.shape[1]
    size = columns if grid[0].shape[1] == 1 else spec.granularity.group_size(columns)
    scale, zero = (np.repeat(values, size, axis=1)[:, :columns] for values in grid)
    error = np.abs(spec.format.decode(spec.format.encode(unit, scale, zero), scale, zero) - unit)
    error = np.square(error) if power == 2 else error**power
    return np.add.reduceat(error if weights is None else error * weights, np.arange(0, columns, size), axis=1)
