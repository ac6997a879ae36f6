"""HQQ: scales and zero points of the least sum |error|^p with p < 1, without any data, by half-quadratic splitting.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. A power below 1 lets few large
weights be far off where that brings the many closer. Half-quadratic splitting alternates two closed forms: the errors
to tolerate are those that survive a shrinkage (generalised soft thresholding); scale and zero point are the least
squares of what is left.

Two things differ from the paper, where only the zero point moves and is a float. Ours are stored as integers, and from
min-max a step of less than one half never moves one: so the scale is fitted with it, for the zero point rounded
(alone, for a symmetric format). And the penalty is in units of a group's own step: weights times two give the same
codes.
"""

from __future__ import annotations

import numpy as np

from qcompiler.formats.base import Floats, QuantSpec, round_scale

POWER = 0.7
ITERATIONS = 20
_PENALTY, _GROWTH = 10.0, 1.01
_LEAST = np.float32(1e-8)  # steps: of smaller errors nothing survives, and their power would overflow


def half_quadratic(
    block: Floats, weight: Floats | None, spec: QuantSpec, scale: Floats, zero: Floats, iterations: int = ITERATIONS
) -> tuple[Floats, Floats]:
    """Better scales and zero points, [groups, 1] each; of every group the best that was met, so never worse ones.

    Args:
        block: float32 [groups, width], weights that share a scale in a row.
        weight: of the errors, of the same shape; None: 1.
        spec: how they are stored.
        scale: to begin with, rounded as they are stored, float32 [groups, 1].
        zero: to begin with, integer-valued, [groups, 1]; a symmetric spec has no use for them.
        iterations: none leaves all as it is.
    """
    best = scale, zero, power_error(block, weight, spec, scale, zero)
    for i in range(iterations):
        scale, zero = _step(block, weight, spec, (scale, zero), _PENALTY * _GROWTH**i)
        error = power_error(block, weight, spec, scale, zero)
        better = error < best[2]
        new = scale, zero, error
        best = tuple(np.where(better, b, a) for a, b in zip(best, new, strict=True))
    return best[0], best[1]


def power_error(block: Floats, weight: Floats | None, spec: QuantSpec, scale: Floats, zero: Floats) -> Floats:
    """Sum of weight * |error|^POWER over every group, [groups, 1]."""
    offset = None if spec.symmetric else zero
    error = np.abs(spec.format.decode(spec.format.encode(block, scale, offset), scale, offset) - block) ** POWER
    return np.asarray((error if weight is None else error * weight).sum(1, keepdims=True), np.float32)


def _step(
    block: Floats, weight: Floats | None, spec: QuantSpec, grid: tuple[Floats, Floats], penalty: float
) -> tuple[Floats, Floats]:
    """Round, shrink, and fit scale and zero point to what is left."""
    (scale, zero), fmt = grid, spec.format
    offset, one = None if spec.symmetric else zero, np.ones_like(scale)
    codes = fmt.encode(block, scale, offset)
    tolerated = _shrink((block - fmt.decode(codes, scale, offset)) / scale, penalty) * scale
    target = np.asarray(block - tolerated, np.float32)
    if not spec.symmetric:
        units = fmt.decode(codes, one, np.zeros_like(scale))
        slope = _fitted(units - _mean(units, weight), target, weight, scale)
        point = np.rint(_mean(units, weight) - _mean(target, weight) / slope)
        zero = np.clip(point, *fmt.code_range).astype(np.float32)
    units = fmt.decode(codes, one, None if spec.symmetric else zero)
    return round_scale(_fitted(units, target, weight, scale), spec.scale_dtype), zero


def _shrink(error: Floats, penalty: float) -> Floats:
    """argmin_e |e|^POWER + penalty / (2 POWER) (e - error)^2, to first order, as in the paper."""
    size = np.maximum(np.abs(error), _LEAST)
    return np.asarray(np.sign(error) * np.maximum(size - size ** (POWER - 1) / np.float32(penalty), 0), np.float32)


def _fitted(units: Floats, target: Floats, weight: Floats | None, scale: Floats) -> Floats:
    """The factor of least squares, [groups, 1]; the old scale where there is none, or none above zero."""
    weighted = units if weight is None else units * weight
    power = np.einsum("ij,ij->i", weighted, units)[:, None]
    product = np.einsum("ij,ij->i", weighted, target)[:, None]
    usable = (power > 0) & (product > 0)
    return np.where(usable, product / np.where(usable, power, np.float32(1)), scale)


def _mean(values: Floats, weight: Floats | None) -> Floats:
    """The weighted mean of every group, [groups, 1]; 0 where nothing weighs anything."""
    if weight is None:
        return values.mean(1, keepdims=True)
    total = weight.sum(1, keepdims=True)
    return np.einsum("ij,ij->i", values, weight)[:, None] / np.where(total > 0, total, 1)
