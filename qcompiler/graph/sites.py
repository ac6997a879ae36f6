"""Sites: every place of a graph that can be given a number format, found by topology.

A site is an operation with a constant weight. All methods see the weight as a matrix [rows, columns]: rows
are output channels, columns what the product sums over. `Site.to_matrix` and `Site.from_matrix` translate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Site:
    """One quantizable weight and the operation that uses it.

    Attributes:
        name: unique and stable: the weight's module path if known, else the node's name.
        op: MatMul, Gemm, Conv, ConvTranspose or Gather.
        node: the operation. A weight shared by several nodes is one site; `node` is the first user,
            `users` are all of them (a tied embedding has a Gather and a MatMul, perhaps through Transpose).
        weight: the value of the weight's initializer.
        activation: the value of the operation's data input, None for Gather.
        shape: shape of the weight tensor.
        rows, columns: of the matrix form.
        layout: how the tensor maps to the matrix:
            "rows-first"  [N, K]          (Gemm transB=1, Gather tables, tied heads)
            "columns-first" [..., K, N]   (MatMul, Gemm transB=0; leading axes are batches of matrices)
            "conv"        [O, I/g, *kernel]     -> [O, I/g * kernel]
            "conv-transpose" [I, O/g, *kernel]  -> [O, I/g * kernel], group by group
        groups: of a convolution, else 1.
    """

    name: str
    op: str
    node: ir.Node
    users: tuple[ir.Node, ...]
    weight: ir.Value
    activation: ir.Value | None
    shape: tuple[int, ...]
    rows: int
    columns: int
    layout: str
    groups: int = 1

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def to_matrix(self, tensor: Array) -> Array:
        """Weight tensor -> [rows, columns]."""
        if self.layout == "columns-first":
            return np.swapaxes(tensor, -1, -2).reshape(self.rows, self.columns)
        if self.layout == "conv-transpose":
            g, (i, o), kernel = self.groups, self.shape[:2], self.shape[2:]
            return np.swapaxes(tensor.reshape(g, i // g, o, *kernel), 1, 2).reshape(self.rows, self.columns)
        return tensor.reshape(self.rows, self.columns)

    def from_matrix(self, matrix: Array) -> Array:
        """[rows, columns] -> weight tensor."""
        if self.layout == "columns-first":
            *batch, k, n = self.shape
            return np.ascontiguousarray(np.swapaxes(matrix.reshape(*batch, n, k), -1, -2))
        if self.layout == "conv-transpose":
            g, (i, o), kernel = self.groups, self.shape[:2], self.shape[2:]
            return np.ascontiguousarray(np.swapaxes(matrix.reshape(g, o, i // g, *kernel), 1, 2)).reshape(self.shape)
        return matrix.reshape(self.shape)

    def matrix(self) -> npt.NDArray[np.float32]:
        """The weight as float32 [rows, columns], read from its initializer."""
        assert self.weight.const_value is not None
        return np.asarray(self.to_matrix(self.weight.const_value.numpy()), np.float32)
