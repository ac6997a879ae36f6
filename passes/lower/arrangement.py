"""Where the numbers of a matrix [rows, columns] lie in the tensors of a graph, and its scales beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.formats import PerRowGroup, PerTensor, QTensor
from qcompiler.graph.sites import Site


def needs_matrix(site: Site, tensor: QTensor) -> bool:
    """Whether DequantizeLinear cannot express the scales in the tensor's own layout."""
    if site.layout == "conv-transpose" and site.groups > 1:
        return True
    if not is_blocked(tensor):
        return False
    return site.layout in ("conv", "conv-transpose") or (site.layout == "rows-first" and len(site.shape) != 2)


def is_blocked(tensor: QTensor) -> bool:
    """Whether there is more than one scale a row, or one for several rows of each column."""
    return tensor.scale.shape[1] > 1 or isinstance(tensor.spec.granularity, PerRowGroup)


@dataclass(frozen=True)
class Arrangement:
    """How [rows, columns] becomes the stored tensor.

    Attributes:
        site: whose weight it is.
        as_matrix: whether it is stored as a matrix and reshaped when it is decoded (`needs_matrix`).
    """

    site: Site
    as_matrix: bool

    @property
    def batched(self) -> bool:
        """Whether the weight is a batch of matrices."""
        return self.site.layout == "columns-first" and len(self.site.shape) > 2

    def codes(self, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[rows, columns] in the layout in which codes are stored."""
        return matrix if self.as_matrix else self.site.from_matrix(matrix)

    def turn(self, stored: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a matrix (of codes, of zero points) is reshaped to, and how that is transposed, to become `stored`."""
        order = list(range(len(stored)))
        if not self.as_matrix and self.site.layout == "columns-first" and len(stored) > 1:
            order[-2:] = order[:-3:-1]
        elif not self.as_matrix and self.site.layout == "conv-transpose" and len(stored) > 1:
            order[:2] = 1, 0
        return tuple(stored[axis] for axis in order), tuple(order)

    def per_group(self, tensor: QTensor, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Scales or zero points: scalar, [channels], or blocked with the rank of the stored codes."""
        if isinstance(tensor.spec.granularity, PerTensor):
            return values.reshape(())
        if not is_blocked(tensor) and not self.batched:
            return values.reshape(-1)
        if self.site.layout != "columns-first":
            return values
        by_row = values.reshape(*self.site.shape[:-2], -1, values.shape[1])
        return np.ascontiguousarray(np.swapaxes(by_row, -1, -2))

    def attributes(self, tensor: QTensor) -> dict[str, int]:
        """Axis and block_size of DequantizeLinear."""
        if isinstance(tensor.spec.granularity, PerTensor):
            return {}
        blocked = is_blocked(tensor) or self.batched
        by_rows = isinstance(tensor.spec.granularity, PerRowGroup)
        if self.site.layout == "columns-first":
            last = len(self.site.shape) - 1
            axis = last - 1 if blocked and not by_rows else last
        elif self.site.layout == "conv-transpose" and not self.as_matrix:
            axis = 1
        else:
            axis = 1 if blocked and not by_rows else 0
        granularity, (rows, columns) = tensor.spec.granularity, tensor.shape
        size = granularity.group_rows(rows) if by_rows else granularity.group_size(columns)
        return {"axis": axis, "block_size": size} if blocked else {"axis": axis}
