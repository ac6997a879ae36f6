"""The numerical core of GPTQ: round columns one by one, let the rest make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023.
Scales are fixed before the columns are put in order ("static groups"), so codes go back to their places and
no group index is stored. A problem is a batch of `blocks` independent ones (the groups of a convolution): the
matrix [rows, columns] is seen as [blocks, rows / blocks, columns], each block with its own Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import get_lapack_funcs

from qcompiler.errors import NotFinite
from qcompiler.formats import QTensor, spread
from qcompiler.formats.base import Floats

Order = Literal["diagonal", "natural"]
_BLOCK = 64  # columns between two updates of all later columns
_RETRIES = 8
_LEAST_DAMPING = 1e-6  # of a retry where none was asked for
_POTRF, _TRTRI = get_lapack_funcs(("potrf", "trtri"), dtype=np.float64)


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian.

    Attributes:
        hessian: float32 [blocks, columns, columns], damped, in the natural order of the columns.
        order: int [blocks, columns], the column that is rounded first, second, ...
        upper: float32 [blocks, columns, columns], U with U^T U = inverse of the ordered Hessian.
        damping: what was added to the diagonal, relative to its mean.
    """

    hessian: Floats
    order: npt.NDArray[np.intp]
    upper: Floats
    damping: float


def factorize(
    gram: npt.NDArray[Any], damping: float = 0.01, order: Order = "diagonal", noise: npt.ArrayLike = 1.0
) -> Factor:
    """Damp a Gram matrix of inputs, choose an order, and factorize its inverse.

    Args:
        gram: sum or mean of x x^T, [columns, columns] or [blocks, columns, columns].
        damping: share of the mean diagonal that is added to it; ten times as much after a failure.
        order: "diagonal" rounds the columns of the largest inputs first.
        noise: the power that rounding a column has, relative to other columns: a number, or [columns] for columns
            of several formats. Those of the largest inputs times noise go first, so that the fine ones make up for
            the coarse ones and not the other way round.

    Raises:
        ValueError: the Gram matrix is not finite.
    """
    gram = np.atleast_3d(np.asarray(gram, np.float64).T).T if np.ndim(gram) == 2 else np.asarray(gram, np.float64)
    if not np.isfinite(gram).all():
        raise NotFinite("the Gram matrix holds NaN or infinity", fix="repair the weights or the data, or use --keep")
    hessian = (gram + gram.transpose(0, 2, 1)) / 2
    diagonal = np.einsum("bii->bi", hessian)  # a view: writing to it writes to the Hessian
    mean = diagonal.mean(1, keepdims=True)
    diagonal += np.where(diagonal <= 0, np.where(mean > 0, mean, 1), 0)  # dead columns: any value does
    keys = -diagonal * np.asarray(noise, np.float64) if order == "diagonal" else np.zeros_like(diagonal)
    places = np.argsort(keys, axis=1, kind="stable")
    mean = diagonal.mean(1, keepdims=True)
    for attempt in range(_RETRIES):
        share = damping if attempt == 0 else max(damping, _LEAST_DAMPING) * 10.0**attempt
        diagonal += mean * share
        upper = _inverse_factor(
            np.take_along_axis(np.take_along_axis(hessian, places[:, :, None], 1), places[:, None, :], 2)
        )
        if upper is not None:
            return Factor(hessian.astype(np.float32), places, upper, share)
    raise ValueError("the Gram matrix stays indefinite however it is damped")


def _inverse_factor(hessian: npt.NDArray[np.float64]) -> Floats | None:
    """Upper U with U^T U = H^-1, by the Cholesky factor of H read backwards: H = R R^T, U = R^-1."""
    if len(hessian) == 1:
        lower, failed = _POTRF(hessian[0, ::-1, ::-1], lower=1)
        inverse, singular = _TRTRI(lower, lower=1) if not failed else (lower, failed)
        if failed or singular:
            return None
        inverse = inverse[None, ::-1, ::-1]
    else:  # many small ones
        try:
            inverse = np.linalg.inv(np.linalg.cholesky(hessian[:, ::-1, ::-1])[:, ::-1, ::-1])
        except np.linalg.LinAlgError:
            return None
    return inverse.astype(np.float32) if np.isfinite(inverse).all() else None


def gptq_round(matrix: Floats, factor: Factor, grids: Sequence[QTensor]) -> list[QTensor]:
    """Codes for given scales and zero points.

    Minimises tr((W - Q) H (W - Q)^T) greedily. Rows do not depend on each other.

    Args:
        matrix: float32 [rows, columns].
        factor: of its Hessian.
        grids: spec, scale and zero of its panels: one for all columns, or several that lie side by side (then there is
            one block). The codes in them are not looked at.

    Returns:
        The panels with new codes.
    """
    blocks, columns = factor.order.shape
    shape = (blocks, matrix.shape[0] // blocks, columns)
    places = factor.order.T[:, :, None]

    def ordered(values: Sequence[Floats]) -> Floats:  # panels of [rows, columns] -> [columns, blocks, rows / blocks]
        wide = np.concatenate([np.broadcast_to(v, g.shape) for v, g in zip(values, grids, strict=True)], 1)
        wide = wide.reshape(shape).transpose(2, 0, 1)
        return np.take_along_axis(wide, np.broadcast_to(places, wide.shape), 0)

    widths = [grid.shape[1] for grid in grids]
    work = ordered(np.split(np.asarray(matrix, np.float32), np.cumsum(widths)[:-1], 1))
    grid = _Grid(
        [grids[i] for i in np.repeat(np.arange(len(grids)), widths)[factor.order[0]]],
        ordered([spread(g.scale, g.spec, w, g.shape[0]) for g, w in zip(grids, widths, strict=True)]),
        ordered([np.zeros((1, 1), np.float32) if g.zero is None else spread(g.zero, g.spec, w, g.shape[0])
                 for g, w in zip(grids, widths, strict=True)]),
    )  # fmt: skip
    codes = np.empty(work.shape, np.result_type(*(g.codes.dtype for g in grids)))
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = _round_block(work, factor.upper, codes, grid, slice(first, last))
        if last < columns:
            later = factor.upper[:, first:last, last:].transpose(0, 2, 1) @ errors.transpose(1, 0, 2)
            work[last:] -= later.transpose(1, 0, 2)
    back = np.empty_like(codes)
    np.put_along_axis(back, np.broadcast_to(places, codes.shape), codes, 0)
    panels = np.split(back.transpose(1, 2, 0).reshape(matrix.shape), np.cumsum(widths)[:-1], 1)
    return [
        replace(g, codes=np.ascontiguousarray(panel, g.codes.dtype)) for g, panel in zip(grids, panels, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Grid:
    """What the columns are rounded to, in the order in which they are: the panel, scales and zeros of each."""

    panels: list[QTensor]
    scales: Floats
    zeros: Floats


def _round_block(work: Floats, upper: Floats, codes: npt.NDArray[Any], grid: _Grid, block: slice) -> Floats:
    """Round the columns of a block in turn; returns their errors / U_ii, [block, blocks, rows / blocks]."""
    errors = np.empty_like(work[block])
    for i in range(block.start, block.stop):
        panel, scale = grid.panels[i], grid.scales[i]
        zero = None if panel.zero is None else grid.zeros[i]
        codes[i] = panel.spec.format.encode(work[i], scale, zero)
        error = (work[i] - panel.spec.format.decode(codes[i], scale, zero)) / upper[:, i, i, None]
        errors[i - block.start] = error
        work[i + 1 : block.stop] -= upper[:, i, i + 1 : block.stop].T[:, :, None] * error
    return errors


def hessian_loss(error: Floats, hessian: Floats) -> npt.NDArray[np.float64]:
    """e^T H e of each row: error [rows, columns], hessian [blocks, columns, columns] -> float64 [rows]."""
    parts = error.reshape(hessian.shape[0], -1, hessian.shape[-1])
    return np.einsum("bij,bij->bi", parts @ hessian, parts, dtype=np.float64).reshape(-1)
