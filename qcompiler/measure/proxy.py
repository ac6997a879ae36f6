"""Losses from Gram matrices alone: what GPTQ's rounding is expected to leave at each column (BAQ).

With H = 2 E[x x^T], damped, and d_j the diagonal of the upper Cholesky factor of H^-1, the error that rounding column
j leaves after all later columns have compensated it is sum_i dw_ij^2 / (2 d_j^2). A grid of 2^b levels over the range
r_i of a row has an average squared error of r_i^2 2^(-2b) / 12, so column j loses c_j 2^(-2b) with
c_j = sum_i r_i^2 / (24 d_j^2) (BAQ, arXiv 2506.05664). One forward pass of the data serves all formats; but a layer's
output error says nothing about what the layers behind make of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.formats import QuantSpec
from qcompiler.formats.granularity import Granularity, PerChannel, PerGroup, PerRowGroup, PerTensor
from qcompiler.graph.sites import Site
from qcompiler.measure.experiment import Menus
from qcompiler.measure.gram import Gram, grams
from qcompiler.measure.sensitivity import Sensitivity, separable
from qcompiler.measure.stream import calibration_of
from qcompiler.model import Model

Floats = npt.NDArray[np.float64]
_ATTEMPTS = 6


def inverse_squares(gram: npt.NDArray[Any], damping: float = 0.01) -> Floats:
    """1 / d_j^2 of every column, d_j = [upper Cholesky factor of H^-1]_jj: float64 [groups, columns].

    With the order of rows and columns reversed, H's own (lower) Cholesky factor holds 1 / d_j: nothing is inverted.

    Args:
        gram: E[x x^T], float [groups, columns, columns]; H is twice that.
        damping: share of H's mean diagonal that is added to it, ten times as much after each failure.

    Raises:
        ValueError: it is not finite, or stays indefinite.
    """
    if not np.isfinite(gram).all():
        raise ValueError("the Gram matrix holds NaN or infinity")
    found = np.empty(gram.shape[:2])
    for group, matrix in enumerate(gram):
        reversed_h = 2 * np.asarray(matrix, np.float64)[::-1, ::-1]
        mean = float(np.trace(reversed_h)) / len(matrix) or 1.0  # without any input every column is as good
        for attempt in range(_ATTEMPTS):
            damped = reversed_h + np.eye(len(matrix)) * (mean * damping * 10.0**attempt)
            try:
                found[group] = np.square(np.diag(np.linalg.cholesky(damped)))[::-1]
                break
            except np.linalg.LinAlgError:
                continue
        else:
            raise ValueError("the Gram matrix stays indefinite however it is damped")
    return found


def column_costs(
    matrix: npt.NDArray[np.float32],
    curvature: Floats,
    granularity: Granularity | None = None,
) -> Floats:
    """c_j of every column, so that b bits lose about c_j 2^(-2b): float64 [columns].

    Args:
        matrix: the weight [rows, columns].
        curvature: `inverse_squares`, [groups, columns]; the rows are split evenly among the groups.
        granularity: over which part r is taken: a row if None, as in BAQ.
    """
    ranges = _ranges(np.asarray(matrix, np.float64), granularity or PerChannel())
    return _by_group(np.square(ranges), curvature) / 24


def saliences(matrix: npt.NDArray[np.float32], curvature: Floats, group: int = 128) -> Floats:
    """SliM-LLM's salience of groups of neighbouring columns: sum w_ij^2 / d_j^2, float64 [ceil(columns / group)].

    Args:
        matrix: the weight [rows, columns].
        curvature: `inverse_squares`, [groups of rows, columns].
        group: columns in a group; the last one holds what is left.
    """
    each = _by_group(np.square(np.asarray(matrix, np.float64)), curvature)
    return np.add.reduceat(each, np.arange(0, len(each), group))


def site_curvature(site: Site, found: Mapping[str, Gram], damping: float = 0.01) -> Floats:
    """`inverse_squares` of a site's input; of a look-up, whose rows count equally, 2 / rows for every column."""
    if site.name not in found:
        return np.full((1, site.columns), 2.0 / site.rows)
    return inverse_squares(found[site.name].matrix, damping)


def proxy_sensitivity(
    model: Model,
    sites: Sequence[Site],
    candidates: Menus,
    *,
    limit: int | None = None,
    damping: float = 0.01,
) -> Sensitivity:
    """The loss sum_j c_j 2^(-2b) of every candidate, without cross terms.

    Args:
        model: float, with calibration data; the Gram matrices are cached if it has a cache.
        sites: of `model`.
        candidates: as in `sensitivities`; the ranges are those of each format's granularity.
        limit: samples, all if None.
        damping: of the Hessian.
    """
    begin = time.monotonic()
    data = calibration_of(model)
    found = grams(model, sites, limit)
    known = {site.name: site_curvature(site, found, damping) for site in sites}
    costs: dict[tuple[str, Granularity], float] = {}

    def loss(site: Site, spec: QuantSpec) -> tuple[float, float]:
        key = (site.name, spec.granularity)
        if key not in costs:
            costs[key] = float(column_costs(site.matrix(), known[site.name], spec.granularity).sum())
        return costs[key] * 2.0 ** (-2 * spec.bits), 0.0

    used = data.count if limit is None else min(limit, data.count)
    return separable(sites, candidates, loss, "proxy", samples=used, begin=begin)


def _by_group(values: Floats, curvature: Floats) -> Floats:
    """Column sums of values / d^2, each group of rows with its own d."""
    split = values.reshape(len(curvature), -1, values.shape[1]).sum(1)
    return (split * curvature).sum(0)


def _ranges(matrix: Floats, granularity: Granularity) -> Floats:
    """Max - min over what shares a scale, for every weight: [rows, columns]."""
    if isinstance(granularity, PerTensor):
        return np.full(matrix.shape, np.ptp(matrix))
    if isinstance(granularity, PerRowGroup):
        return _ranges(matrix.T, PerGroup(granularity.size)).T
    size = granularity.group_size(matrix.shape[1])
    starts = np.arange(0, matrix.shape[1], size)
    spread = np.maximum.reduceat(matrix, starts, axis=1) - np.minimum.reduceat(matrix, starts, axis=1)
    return np.repeat(spread, size, axis=1)[:, : matrix.shape[1]]
