"""Descent on tr((W - Q) H (W - Q)^T) from given codes: one code at a time, then one scale at a time.

GPTQ never looks back: a column that was rounded early stays as it is. Cyclic coordinate descent over the codes
(Behdin et al., "QuantEase", 2023) and exact line searches over the scales of the groups take it from there. No
step raises the loss, so any number of sweeps is safe. Shapes as in `gptq_core`; panels take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from qcompiler.formats import QTensor, round_scale, spread
from qcompiler.formats.base import Floats

_BLOCK = 64
_WIDE = 128
Step = Callable[[QTensor, Floats, Floats], QTensor]


def refine(
    matrix: Floats, hessian: Floats, start: Sequence[QTensor], sweeps: int, steps: Sequence[Step] | None = None
) -> list[QTensor]:
    """Better codes and scales for a matrix.

    Args:
        matrix: float32 [rows, columns].
        hessian: float32 [blocks, columns, columns], damped.
        start: codes to begin with: of all columns, or of panels of columns side by side.
        sweeps: passes over all codes and all scales.
        steps: of a sweep, each from a panel, the Hessian of its columns and the pull on them to a better panel;
            `refine_codes` and `refine_scales` if None.
    """
    found = list(start)
    ends = np.cumsum([0, *(panel.shape[1] for panel in start)])
    for step in tuple(steps or (refine_codes, refine_scales)) * sweeps:
        for place, (low, high) in enumerate(pairwise(ends.tolist())):
            error = matrix - np.concatenate([panel.decode() for panel in found], 1)
            pull = _product(error, hessian[:, :, low:high])
            found[place] = step(found[place], hessian[:, low:high, low:high], pull)
    return found


def refine_codes(start: QTensor, hessian: Floats, pull: Floats) -> QTensor:
    """One sweep over the codes: each becomes the best one, all others given.

    Args:
        start: codes of all columns or of a panel.
        hessian: float32 [blocks, columns, columns], of these columns.
        pull: float32 [rows, columns], half the negative gradient: (matrix - decoded) H, with the errors of all panels.
    """
    spec, (rows, columns) = start.spec, start.shape
    blocks = hessian.shape[0]
    shape = (blocks, rows // blocks, columns)
    diagonal = np.einsum("bii->bi", hessian)
    pull = pull.reshape(shape).transpose(2, 0, 1).copy()
    value = start.decode().reshape(shape).transpose(2, 0, 1).copy()
    codes = start.codes.reshape(shape).transpose(2, 0, 1).copy()
    scales = np.broadcast_to(spread(start.scale, spec, columns, rows), start.shape).reshape(shape).transpose(2, 0, 1)
    zeros = None
    if start.zero is not None:
        zeros = np.broadcast_to(spread(start.zero, spec, columns, rows), start.shape).reshape(shape).transpose(2, 0, 1)
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
    return replace(start, codes=np.ascontiguousarray(codes.transpose(1, 2, 0).reshape(start.shape)))


def refine_scales(start: QTensor, hessian: Floats, pull: Floats) -> QTensor:
    """One sweep over the groups: each scale becomes the best one, codes and other scales given; see `refine_codes`."""
    if not start.spec.format.free_scales:
        return start
    spec, (rows, columns) = start.spec, start.shape
    blocks, size = hessian.shape[0], start.spec.granularity.group_size(columns)
    shape = (blocks, rows // blocks, columns)
    units = _units(start).reshape(shape)
    scale, sharing = start.scale.copy(), spec.granularity.group_rows(rows)
    pull = pull.reshape(shape).copy()
    together = max(1, _WIDE // size) * size  # columns between two updates of all later columns
    for first in range(0, columns, together):
        last = min(first + together, columns)
        change = np.empty((*shape[:2], last - first), np.float32)
        for low in range(first, last, size):
            part = slice(low, min(low + size, last))
            unit, old = units[..., part], scale[:, low // size]
            slope = _together(np.einsum("bnk,bnk->bn", pull[..., part], unit), sharing)
            bend = _together(np.einsum("bnk,bnk->bn", unit @ hessian[:, part, part], unit), sharing)
            step = _step(old, slope, bend, spec.scale_dtype)
            scale[:, low // size] = old + step
            moved = np.repeat(step, sharing)[:rows].reshape(*shape[:2], 1) * unit
            change[..., part.start - first : part.stop - first] = moved
            pull[..., part.stop : last] -= moved @ hessian[:, part, part.stop : last]
        pull[..., last:] -= change @ hessian[:, first:last, last:]
    return replace(start, scale=scale)


def _together(values: Floats, sharing: int) -> Floats:
    """Sums over as many neighbouring rows as share a scale, [scale rows]."""
    flat = values.reshape(-1)
    return flat if sharing == 1 else np.add.reduceat(flat, np.arange(0, len(flat), sharing))


def _product(error: Floats, hessian: Floats) -> Floats:
    """[rows, columns] times the Hessian of each row's block."""
    blocks = error.reshape(len(hessian), -1, error.shape[1]) @ hessian
    return blocks.reshape(len(error), -1)


def _step(old: Floats, slope: Floats, bend: Floats, dtype: str) -> Floats:
    """To the least of the parabola, on the grid of stored scales; none if that is not better than no step."""
    wish = old + np.where(bend > 0, slope / np.where(bend > 0, bend, 1), 0)
    step = round_scale(np.where(wish > 0, wish, old), dtype) - old
    return np.where(step * (step * bend - 2 * slope) < 0, step, np.float32(0))


def _units(q: QTensor) -> Floats:
    """The decoded matrix at scale one."""
    return replace(q, scale=np.ones_like(q.scale)).decode()
