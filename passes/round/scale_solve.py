"""The scales (and zero points) of least tr((W - Q) H (W - Q)^T) for given codes: all groups of a row at once.

decoupleQ's second half-step (Guo et al., "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via Decoupling
Parameters into Integer and Floating Points", 2024). Its zero points are floats; ours are stored as integers, so those
of the free solution are rounded and the scales solved again for them. A row keeps what it has unless its loss falls.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qcompiler.formats import Int, QTensor, UInt, round_scale
from qcompiler.formats.base import Floats

Wide = npt.NDArray[np.float64]
_PART = 1 << 23  # numbers that are alive at a time, in the normal equations and what they are made of
_RIDGE = 1e-9  # of the mean diagonal: groups of equal codes leave their zero points undecided


def solve_scales(start: QTensor, hessian: Floats, pull: Floats) -> QTensor:
    """Scales and zero points that lower the loss, codes given; for formats with a scale of its own in every row.

    Args:
        start: codes of all columns, or of a panel of them; as in `refine.refine_codes`.
        hessian: float32 [blocks, columns, columns], of these columns.
        pull: float32 [rows, columns], (matrix - decoded) H with the errors of all panels.
    """
    blocks, columns = len(hessian), start.shape[1]
    each = start.shape[0] // blocks
    step = max(1, _PART // max(1, columns + 4 * start.scale.shape[1] ** 2))
    parts = [
        _solve_rows(_rows(start, slice(b * each + low, b * each + min(low + step, each))), hessian[b], pull)
        for b in range(blocks)
        for low in range(0, each, step)
    ]
    zero = None if start.zero is None else np.concatenate([zero for _, zero in parts])
    return replace(start, scale=np.concatenate([scale for scale, _ in parts]), zero=zero)


def _rows(tensor: QTensor, rows: slice) -> tuple[QTensor, slice]:
    zero = None if tensor.zero is None else tensor.zero[rows]
    return replace(tensor, codes=tensor.codes[rows], scale=tensor.scale[rows], zero=zero), rows


def _solve_rows(part: tuple[QTensor, slice], hessian: Floats, pull: Floats) -> tuple[Floats, Floats]:
    """Scales and zero points of some rows of one block."""
    tensor, rows = part
    pull, old = pull[rows], tensor.decode()
    goal = np.asarray(pull + old @ hessian, np.float32)  # where the gradient vanishes: new @ hessian = goal
    best, gain = tensor, np.zeros(len(old))
    for candidate in (_with_scales(tensor, hessian, goal), _with_zeros(tensor, hessian, goal)):
        if candidate is None:
            continue
        change = candidate.decode() - old
        fall = np.einsum("nk,nk->n", change, 2 * pull - change @ hessian, dtype=np.float64)
        better = (fall > gain)[:, None]
        gain = np.maximum(gain, fall)
        zero = None if best.zero is None else np.where(better, candidate.zero, best.zero)  # type: ignore[arg-type]
        best = replace(best, scale=np.where(better, candidate.scale, best.scale), zero=zero)
    return best.scale, np.zeros_like(best.scale) if best.zero is None else best.zero


def _with_scales(tensor: QTensor, hessian: Floats, goal: Floats) -> QTensor:
    """The best scales for the zero points that there are."""
    units, size = _units(tensor), tensor.spec.granularity.group_size(tensor.shape[1])
    found = _solved(_normal(units, units, hessian, size), _sums(units * goal, size))
    return replace(tensor, scale=_stored(found, tensor))


def _with_zeros(tensor: QTensor, hessian: Floats, goal: Floats) -> QTensor | None:
    """The same with other zero points, those of the joint solution rounded; None where the format has none."""
    if tensor.zero is None or not isinstance(tensor.spec.format, Int | UInt):
        return None
    units, size = _units(tensor), tensor.spec.granularity.group_size(tensor.shape[1])
    one = np.ones((1, tensor.shape[1]), np.float32)
    mixed, groups = _normal(units, one, hessian, size), tensor.scale.shape[1]
    flat = np.broadcast_to(_normal(one, one, hessian, size), mixed.shape)
    normal = np.block([[_normal(units, units, hessian, size), mixed], [mixed.swapaxes(1, 2), flat]])
    found = _solved(normal, np.concatenate([_sums(units * goal, size), _sums(goal, size)], 1))
    scale = _stored(found[:, :groups], tensor)
    zero = np.clip(np.rint(tensor.zero - found[:, groups:] / scale), *tensor.spec.format.code_range)
    return _with_scales(replace(tensor, scale=scale, zero=zero.astype(np.float32)), hessian, goal)


def _normal(left: Floats, right: Floats, hessian: Floats, size: int) -> Wide:
    """l_g H r_h for every pair of groups: [rows, groups, groups]."""
    starts = range(0, len(hessian), size)
    return np.stack([_sums((left[:, g : g + size] @ hessian[g : g + size]) * right, size) for g in starts], 1)


def _sums(values: Floats, size: int) -> Wide:
    """Sums over groups of columns, [rows, groups]."""
    return np.add.reduceat(values, np.arange(0, values.shape[1], size), axis=1, dtype=np.float64)


def _solved(normal: Wide, right: Wide) -> Wide:
    """The solution for every row; 0 where the equations do not say (a group of zeros)."""
    diagonal = np.einsum("nii->ni", normal)
    diagonal += np.where(diagonal > 0, _RIDGE * diagonal.mean(1, keepdims=True), 1)
    return np.asarray(np.linalg.solve(normal, right[..., None])[..., 0], np.float64)


def _stored(wanted: Wide, tensor: QTensor) -> Floats:
    """Scales as they will be stored; the old ones where they would not be positive."""
    return round_scale(np.where(wanted > 0, wanted, tensor.scale), tensor.spec.scale_dtype)


def _units(tensor: QTensor) -> Floats:
    """The decoded matrix at scale one."""
    return replace(tensor, scale=np.ones_like(tensor.scale)).decode()
