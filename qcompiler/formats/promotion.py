"""Which groups of a matrix are worth the wider of two grids: those where it saves the most (weighted) squared error.

With the diagonal of the Fisher information as weights this is FGMP's choice within one matrix. Every promoted group
costs the same, so a share of groups per matrix that has equal slope everywhere is one threshold over the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcompiler.formats.base import Floats, QTensor, row_parts, spread_rows
from qcompiler.formats.promoted import FLAG, Promoted


def group_errors(matrix: Floats, tensor: QTensor, weights: Floats | None) -> npt.NDArray[np.float64]:
    """Sum of weights * error^2 over every group: float64 [scale rows, groups].

    Args:
        matrix: float32 [rows, columns].
        tensor: a rounded form of it.
        weights: of the squared errors, [columns] or [rows, columns]; None: 1.
    """
    parts = list(_error_parts(matrix, tensor, weights))
    errors = np.concatenate(parts) if parts else np.zeros((0, tensor.scale.shape[1]))
    return errors if len(tensor.scale) == len(errors) else errors.sum(0, keepdims=True)


def _error_parts(matrix: Floats, tensor: QTensor, weights: Floats | None) -> Iterator[npt.NDArray[np.float64]]:
    columns = matrix.shape[1]
    starts = np.arange(0, columns, max(1, tensor.spec.granularity.group_size(columns)))
    for rows in row_parts(matrix.shape):
        scale, zero = spread_rows(tensor.scale, tensor.zero, tensor.spec, rows, columns)
        decoded = tensor.spec.format.decode(tensor.codes[rows], scale, zero)
        squares = np.square(decoded.astype(np.float64) - matrix[rows])
        if weights is not None:
            squares *= np.broadcast_to(weights, matrix.shape)[rows]
        yield np.add.reduceat(squares, starts, axis=1)


def promote(
    fmt: Promoted, matrix: Floats, narrow: QTensor, wide: QTensor, weights: Floats | None
) -> tuple[Floats, Floats]:
    """Scales and flagged zero points, float32 [scale rows, groups]; `fmt.promoted` groups are, of equals the first.

    Args:
        fmt: the two widths.
        matrix: float32 [rows, columns].
        narrow: it, rounded to the grid of ordinary groups.
        wide: rounded to that of promoted ones.
        weights: of the squared errors, as in `group_errors`.
    """
    saved = group_errors(matrix, narrow, weights) - group_errors(matrix, wide, weights)
    chosen = np.argsort(-np.maximum(saved, 0), axis=None, kind="stable")[: fmt.promoted(saved.size)]
    flags = np.zeros(saved.shape, np.bool_)
    flags.reshape(-1)[chosen] = True
    # The wide grid holds the narrow one: where the search ended worse on it, the narrow scale is as good.
    better = flags & (saved >= 0)
    points = [np.zeros_like(q.scale) if q.zero is None else q.zero for q in (narrow, wide)]
    zero = np.where(better, points[1], points[0]) + FLAG * flags
    return np.where(better, wide.scale, narrow.scale), zero.astype(np.float32)
