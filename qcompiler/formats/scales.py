"""Which scales a matrix needs, and what is stored where float16 cannot hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcompiler.formats.base import Floats, QTensor, QuantSpec, round_scale, row_parts
from qcompiler.formats.granularity import Granularity, PerGroup, PerRowGroup, PerTensor

# Of the matrix's power, that rounding its scales may cost: what normal float16 numbers cost at most is 2.4e-7.
_COST = 1e-6


def with_scales_that_fit(matrix: Floats, specs: Sequence[QuantSpec]) -> list[QuantSpec]:
    """The specs, those whose float16 scales would be lost to under- or overflow with float32 scales.

    A scale off by a share e spoils that share of its group's numbers, so the cost is sum(e^2 * power of the group)
    over the power of the matrix. Rows of zeros, and groups too small to count, thus ask for nothing.

    Args:
        matrix: float32 [rows, columns].
        specs: any; float32 and bfloat16 scales reach as far as weights do.
    """
    seen: dict[Granularity, _Groups] = {}
    fitting: list[QuantSpec] = []
    for spec in specs:
        if spec.scale_dtype == "float16":
            if spec.granularity not in seen:
                seen[spec.granularity] = _Groups.of(matrix, spec.granularity)
            spec = spec if seen[spec.granularity].cost(spec) < _COST else replace(spec, scale_dtype="float32")
        fitting.append(spec)
    return fitting


@dataclass(frozen=True)
class _Groups:
    """Ends and powers of all groups, each [groups]."""

    low: Floats
    high: Floats
    power: npt.NDArray[np.float64]

    @staticmethod
    def of(matrix: Floats, granularity: Granularity) -> _Groups:
        if isinstance(granularity, PerRowGroup):
            return _Groups.of(np.ascontiguousarray(matrix.T), PerGroup(granularity.size))
        starts = np.arange(0, max(matrix.shape[1], 1), max(1, granularity.group_size(matrix.shape[1])))
        lows, highs, powers = [], [], []
        for rows in row_parts(matrix.shape):
            part = matrix[rows]
            lows.append(np.minimum.reduceat(part, starts, axis=1))
            highs.append(np.maximum.reduceat(part, starts, axis=1))
            powers.append(np.add.reduceat(np.square(part, dtype=np.float64), starts, axis=1))
        low, high, power = (np.concatenate(a) for a in (lows, highs, powers))
        if isinstance(granularity, PerTensor):
            low, high, power = low.min(keepdims=True), high.max(keepdims=True), power.sum(keepdims=True)
        return _Groups(low.ravel(), high.ravel(), power.ravel())

    def cost(self, spec: QuantSpec) -> float:
        """Share of the power that rounding the scales to the spec's dtype costs."""
        total = float(self.power.sum())
        if total == 0:
            return 0.0
        wanted, _ = spec.format.fit(self.low, self.high, spec.symmetric)
        wide = wanted.astype(np.float64)
        # 1 at most: a group cannot lose more than all of it
        off = np.minimum(np.abs(round_scale(wanted, spec.scale_dtype) / wide - 1), 1)
        return float(np.square(off) @ self.power) / total


def magnitude(values: npt.NDArray[np.floating]) -> np.float32:
    """The power of two next to the largest magnitude of finite numbers, 1 for zeros: dividing by it is exact.

    Squares of what is left neither overflow nor vanish.
    """
    most = float(max(values.max(initial=0), -values.min(initial=0)))
    # float32 holds the inverse of 2^126 only as a subnormal number, and nothing above 2^127
    return np.float32(2.0 ** np.clip(np.frexp(most)[1], -125, 125)) if 0 < most < np.inf else np.float32(1)


def free_magnitude(matrix: Floats, spec: QuantSpec) -> np.float32:
    """The `magnitude` to work at: 1 for float16 scales, whose rounding depends on how large they are."""
    return np.float32(1) if spec.scale_dtype == "float16" else magnitude(matrix)


def scaled(tensor: QTensor, factor: np.float32) -> QTensor:
    """The tensor that decodes to `factor` times as much."""
    if factor == 1:
        return tensor
    scale = tensor.scale * factor
    if tensor.spec.format.free_scales:  # else a power of two is all that they may be multiplied with, which is exact
        scale = round_scale(scale, tensor.spec.scale_dtype)
    return replace(tensor, scale=scale)
