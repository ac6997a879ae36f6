"""Descent on tr((W - Q) H (W - Q)^T) from given codes: one code at a time, then one scale at a time.

GPTQ never looks back: a column that was rounded early stays as it is. Cyclic coordinate descent over the codes
(Behdin et al., "QuantEase", 2023) and exact line searches over the scales of the groups take it from there. No
step raises the loss, so any number of sweeps is safe. Shapes as in `gptq_core`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qcompiler.formats import PerTensor, QTensor, round_scale, spread
from qcompiler.formats.base import Floats

_BLOCK = 64
_WIDE = 128


def refine(matrix: Floats, hessian: Floats, start: QTensor, sweeps: int) -> QTensor:
    """Better codes and scales for a matrix.

    Args:
        matrix: float32 [rows, columns].
        hessian: float32 [blocks, columns, columns], damped.
        start: codes to begin with.
        sweeps: passes over all codes and all scales.
    """
    result = start
    for _ in range(sweeps):
        result = refine_scales(matrix, hessian, refine_codes(matrix, hessian, result))
    return result


def refine_codes(matrix: Floats, hessian: Floats, start: QTensor) -> QTensor:
    """One sweep over the codes: each becomes the best one, all others given."""
    spec, columns = start.spec, matrix.shape[1]
    blocks = hessian.shape[0]
    shape = (blocks, matrix.shape[0] // blocks, columns)
    diagonal = np.einsum("bii->bi", hessian)
    current = start.decode().reshape(shape)
    pull = ((matrix.reshape(shape) - current) @ hessian).transpose(2, 0, 1).copy()  # -gradient / 2
    value = current.transpose(2, 0, 1).copy()
    codes = start.codes.reshape(shape).transpose(2, 0, 1).copy()
    scales = np.broadcast_to(spread(start.scale, spec, columns), matrix.shape).reshape(shape).transpose(2, 0, 1)
    zeros = None
    if start.zero is not None:
        zeros = np.broadcast_to(spread(start.zero, spec, columns), matrix.shape).reshape(shape).transpose(2, 0, 1)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        change = np.empty((last - first, *shape[:2]), np.float32)
        for i in range(first, last):
            zero = None if zeros is None else zeros[i]
            codes[i] = spec.format.encode(value[i] + pull[i] / diagonal[:, i, None], scales[i], zero)
            change[i - first] = spec.format.decode(codes[i], scales[i], zero) - value[i]
            pull[i + 1 : last] -= hessian[:, i, i + 1 : last].T[:, :, None] * change[i - first]
        rest = hessian[:, first:last, last:].transpose(0, 2, 1) @ change.transpose(1, 0, 2)
        pull[last:] -= rest.transpose(1, 0, 2)
    return replace(start, codes=np.ascontiguousarray(codes.transpose(1, 2, 0).reshape(matrix.shape)))


def refine_scales(matrix: Floats, hessian: Floats, start: QTensor) -> QTensor:
    """One sweep over the groups: each scale becomes the best one, codes and other scales given."""
    if isinstance(start.spec.granularity, PerTensor):
        return start  # one scale for all rows: the fit has found it
    spec, columns = start.spec, matrix.shape[1]
    blocks, size = hessian.shape[0], start.spec.granularity.group_size(columns)
    shape = (blocks, matrix.shape[0] // blocks, columns)
    units = _units(start).reshape(shape)
    scale = start.scale.copy().reshape(blocks, shape[1], -1)
    pull = (matrix.reshape(shape) - start.decode().reshape(shape)) @ hessian
    together = max(1, _WIDE // size) * size  # columns between two updates of all later columns
    for first in range(0, columns, together):
        last = min(first + together, columns)
        change = np.empty((*shape[:2], last - first), np.float32)
        for low in range(first, last, size):
            part = slice(low, min(low + size, last))
            unit, old = units[..., part], scale[..., low // size]
            slope = np.einsum("bnk,bnk->bn", pull[..., part], unit)
            bend = np.einsum("bnk,bnk->bn", unit @ hessian[:, part, part], unit)
            step = _step(old, slope, bend, spec.scale_dtype)
            scale[..., low // size] = old + step
            moved = step[..., None] * unit
            change[..., part.start - first : part.stop - first] = moved
            pull[..., part.stop : last] -= moved @ hessian[:, part, part.stop : last]
        pull[..., last:] -= change @ hessian[:, first:last, last:]
    return replace(start, scale=scale.reshape(start.scale.shape))


def _step(old: Floats, slope: Floats, bend: Floats, dtype: str) -> Floats:
    """To the least of the parabola, on the grid of stored scales; none if that is not better than no step."""
    wish = old + np.where(bend > 0, slope / np.where(bend > 0, bend, 1), 0)
    step = round_scale(np.where(wish > 0, wish, old), dtype) - old
    return np.where(step * (step * bend - 2 * slope) < 0, step, np.float32(0))


def _units(q: QTensor) -> Floats:
    """The decoded matrix at scale one."""
    return replace(q, scale=np.ones_like(q.scale)).decode()
