"""Quantized weights that gradient descent can change: their scales, and their codes too if wanted.

The twin computes with an ordinary parameter. Before a step `fill` writes the decoded matrix to it, after the
step's samples `collect` turns its gradient into those of scales and codes: a matrix is decoded once a step however
many samples the step has, and autograd keeps nothing of the decoding. Works for every format whose `decode` is linear
in the scale.

Only `tuned_twin` imports this file, since it needs torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from qcompiler.formats import Int, QTensor, UInt, round_scale
from qcompiler.formats.base import Floats, row_parts, spread_rows
from qcompiler.graph.sites import Site
from qcompiler.passes.round.learned_codes import LearnedCodes, SoftCodes, StraightCodes

Codes = Literal["fixed", "straight", "soft"]


class LearnedWeight:
    """The codes and scales of one site.

    Attributes:
        factor: parameter [scale rows, groups]; a scale is the one of the beginning times 1 + factor.
        codes: how they are learned; None where they stay as they are.

    Args:
        site: of the graph that the twin was made of.
        tensor: what rounding has made of its weight.
        parameter: of the twin, in the layout of the weight.
        codes: how codes are learned (see `learned_codes`); those of other formats than integers stay fixed.
    """

    def __init__(self, site: Site, tensor: QTensor, parameter: torch.nn.Parameter, codes: Codes) -> None:
        self._site, self._tensor, self._parameter = site, tensor, parameter
        self.factor = torch.nn.Parameter(torch.zeros(tensor.scale.shape))
        self.codes: LearnedCodes | None = None
        if codes != "fixed" and isinstance(tensor.spec.format, Int | UInt):
            kind = StraightCodes if codes == "straight" else SoftCodes
            self.codes = kind(self._exact(tensor.spec.format.middle), tensor.codes, tensor.spec.format.code_range)
        parameter.requires_grad = True

    def result(self) -> QTensor:
        """The weight as learned so far, its scales as they will be stored."""
        free, scale = self._tensor.spec.format.free_scales, self._tensor.scale
        scale = round_scale(self._scale(), self._tensor.spec.scale_dtype) if free else scale
        return replace(
            self._tensor, scale=scale, codes=self._tensor.codes if self.codes is None else self.codes.final()
        )

    def press(self, share: float) -> None:
        """Soft codes towards whole numbers: a share from 0, not at all, to 1."""
        if self.codes is not None:
            self.codes.press(share)

    @torch.no_grad()
    def fill(self) -> None:
        """Write the matrix to the twin's parameter, and forget its gradient."""
        codes = self._tensor.codes if self.codes is None else self.codes.present()
        matrix = replace(self._tensor, scale=self._scale(), codes=codes).decode()
        self._parameter.copy_(torch.from_numpy(self._site.from_matrix(matrix)))
        self._parameter.grad = None

    @torch.no_grad()
    def collect(self) -> None:
        """Set the gradients of `factor` and of the codes from that of the twin's parameter, and forget that."""
        gradient = self._parameter.grad
        if gradient is None:  # the weight does not matter to any output
            return
        if self._tensor.spec.format.free_scales:
            self.factor.grad = torch.from_numpy(self._per_scale(gradient.float() * self._parameter))
            self.factor.grad /= 1 + self.factor
        if self.codes is not None:
            self.codes.collect(self._per_code(self._site.to_matrix(gradient.float().numpy())))
        self._parameter.grad = None

    def _exact(self, middle: int) -> Floats:
        """[rows, columns]: the float weights in units of codes."""
        matrix, tensor = self._site.matrix(), self._tensor
        found = np.empty(matrix.shape, np.float32)
        for rows in row_parts(matrix.shape):
            scale, zero = spread_rows(tensor.scale, tensor.zero, tensor.spec, rows, matrix.shape[1])
            found[rows] = matrix[rows] / scale + (np.float32(middle) if zero is None else zero)
        return found

    def _scale(self) -> Floats:
        scale = self._tensor.scale * (1 + self.factor.detach().numpy())
        return np.asarray(np.where(scale > 0, scale, self._tensor.scale), np.float32)

    def _per_scale(self, products: torch.Tensor) -> Floats:
        """Sums of a tensor in the weight's layout over what shares a scale."""
        matrix, grid = self._site.to_matrix(products.numpy()), self.factor.shape
        granularity, (rows, columns) = self._tensor.spec.granularity, matrix.shape
        high, wide = granularity.group_rows(rows), granularity.group_size(columns)
        missing = grid[0] * high - rows, grid[1] * wide - columns
        padded = np.pad(matrix, [(0, n) for n in missing]) if any(missing) else matrix
        return np.ascontiguousarray(padded.reshape(grid[0], high, grid[1], wide).sum((1, 3)))

    def _per_code(self, gradient: Floats) -> Floats:
        """The gradient of the codes from that of the matrix."""
        scales, found = self._scale(), np.empty(gradient.shape, np.float32)
        for rows in row_parts(gradient.shape):
            scale, _ = spread_rows(scales, None, self._tensor.spec, rows, gradient.shape[1])
            found[rows] = gradient[rows] * scale
        return found
