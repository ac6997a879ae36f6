"""Which groups of a matrix are worth the wider of two grids: those where it saves the most (weighted) squared error.

With the diagonal of the Fisher information as weights this is FGMP's choice within one matrix. Every promoted group
costs the same, so a share of groups per matrix that has equal slope everywhere is one threshold over the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcompiler.formats.base import Floats, QTensor, row_parts, spread_rows
from qcompiler.formats.promoted import Promoted


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
    """Scales and flags, float32 [scale rows, groups]; exactly `fmt.promoted` groups have flag 1, of equals the first.

    Args:
        fmt: the two widths.
        matrix: float32 [rows, columns].
        narrow: it, rounded to the grid of ordinary groups.
        wide: rounded to that of promoted ones.
        weights: of the squared errors, as in `group_errors`.
    """
    saved = group_errors(matrix, narrow, weights) - group_errors(matrix, wide, weights)
    # The wide grid holds the narrow one: where the search for its scale ended worse, the narrow scale is as good.
    scale = np.where(saved < 0, narrow.scale, wide.scale)
    flags = np.zeros(saved.shape, np.float32)
    chosen = np.argsort(-np.maximum(saved, 0), axis=None, kind="stable")[: fmt.promoted(saved.size)]
    flags.reshape(-1)[chosen] = 1
    return np.where(flags > 0, scale, narrow.scale).astype(np.float32), flags
