"""Quantized weights that gradient descent can change: their scales, and their codes too if wanted.

The twin computes with an ordinary parameter. Before a step `fill` writes the decoded matrix to it, after the
step's samples `collect` turns its gradient into those of scales and codes: a matrix is decoded once a step however
many samples the step has, and autograd keeps nothing of the decoding. Works for every format whose `decode` is linear
in the scale.

Only `tuned_twin` imports this file, since it needs torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qcompiler.formats import Int, PerTensor, QTensor, UInt, round_scale
from qcompiler.formats.base import Floats, row_parts, spread_rows
from qcompiler.graph.sites import Site

_EDGE = 0.4  # how far from its code, in steps, a weight begins at most: the boundary lies at half a step


class LearnedWeight:
    """The codes and scales of one site.

    Attributes:
        factor: parameter [scale rows, groups]; a scale is the one of the beginning times 1 + factor.
        position: parameter [rows, columns] in units of codes, whose nearest codes are the weight's; None where the
            codes stay as they are. It begins where the float weight lies, or as near to it as its code allows;
            gradients pass straight through the rounding (Bengio et al., 2013) unless the position is off the grid.

    Args:
        site: of the graph that the twin was made of.
        tensor: what rounding has made of its weight.
        parameter: of the twin, in the layout of the weight.
        codes: whether codes are learned; of other formats than integers they never are.
    """

    def __init__(self, site: Site, tensor: QTensor, parameter: torch.nn.Parameter, codes: bool) -> None:
        self._site, self._tensor, self._parameter = site, tensor, parameter
        self.factor = torch.nn.Parameter(torch.zeros(tensor.scale.shape))
        learn = codes and isinstance(tensor.spec.format, Int | UInt)
        self.position = torch.nn.Parameter(torch.from_numpy(self._begin())) if learn else None
        parameter.requires_grad = True

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is learned."""
        return [self.factor] if self.position is None else [self.factor, self.position]

    def result(self) -> QTensor:
        """The weight as learned so far, its scales as they will be stored."""
        scale = round_scale(self._scale(), self._tensor.spec.scale_dtype)
        return replace(self._tensor, scale=scale, codes=self._codes())

    @torch.no_grad()
    def fill(self) -> None:
        """Write the matrix to the twin's parameter, and forget its gradient."""
        matrix = replace(self._tensor, scale=self._scale(), codes=self._codes()).decode()
        self._parameter.copy_(torch.from_numpy(self._site.from_matrix(matrix)))
        self._parameter.grad = None

    @torch.no_grad()
    def collect(self) -> None:
        """Set the gradients of `factor` and `position` from that of the twin's parameter, and forget that."""
        gradient = self._parameter.grad
        if gradient is None:  # the weight does not matter to any output
            return
        self.factor.grad = torch.from_numpy(self._per_scale(gradient.float() * self._parameter))
        self.factor.grad /= 1 + self.factor
        if self.position is not None:
            self.position.grad = torch.from_numpy(self._per_code(self._site.to_matrix(gradient.float().numpy())))
        self._parameter.grad = None

    def _begin(self) -> Floats:
        """[rows, columns]: the float weights in units of codes, none far from the code that it was given."""
        matrix, tensor = self._site.matrix(), self._tensor
        found = np.empty(matrix.shape, np.float32)
        offset = np.float32(_middle(tensor))
        for rows in row_parts(matrix.shape):
            scale, zero = spread_rows(tensor.scale, tensor.zero, tensor.spec, rows, matrix.shape[1])
            codes = tensor.codes[rows].astype(np.float32)
            exact = matrix[rows] / scale + (offset if zero is None else zero)
            found[rows] = np.clip(exact, codes - _EDGE, codes + _EDGE)
        return found

    def _scale(self) -> Floats:
        scale = self._tensor.scale * (1 + self.factor.detach().numpy())
        return np.asarray(np.where(scale > 0, scale, self._tensor.scale), np.float32)

    def _codes(self) -> npt.NDArray[Any]:
        if self.position is None:
            return self._tensor.codes
        low, high = self._tensor.spec.format.code_range
        return self.position.detach().round().clamp_(low, high).numpy().astype(self._tensor.codes.dtype)

    def _per_scale(self, products: torch.Tensor) -> Floats:
        """Sums of a tensor in the weight's layout over what shares a scale."""
        matrix, grid = self._site.to_matrix(products.numpy()), self.factor.shape
        if isinstance(self._tensor.spec.granularity, PerTensor):
            return np.full(grid, matrix.sum(), np.float32)
        size = self._tensor.spec.granularity.group_size(matrix.shape[1])
        missing = grid[1] * size - matrix.shape[1]
        padded = np.pad(matrix, ((0, 0), (0, missing))) if missing else matrix
        return np.ascontiguousarray(padded.reshape(*grid, size).sum(2))

    def _per_code(self, gradient: Floats) -> Floats:
        """The gradient of the codes from that of the matrix; none where a position is off the grid."""
        assert self.position is not None
        low, high = self._tensor.spec.format.code_range
        position, scales = self.position.detach().numpy(), self._scale()
        found = np.empty_like(position)
        for rows in row_parts(position.shape):
            scale, _ = spread_rows(scales, None, self._tensor.spec, rows, position.shape[1])
            inside = (position[rows] > low - 0.5) & (position[rows] < high + 0.5)
            found[rows] = gradient[rows] * scale * inside
        return found


def _middle(tensor: QTensor) -> int:
    """The code of zero where there are no zero points."""
    assert isinstance(tensor.spec.format, Int | UInt)
    return tensor.spec.format.middle
