"""What all backends need from a lowered graph: its quantized operations, one by one."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph.functions import (
    DynamicActivation,
    PackedWeight,
    StaticActivation,
    read_activation,
    read_weight,
)

_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1, "Gather": 0}


@dataclass(frozen=True, eq=False)
class QuantizedOperation:
    """One MatMul, Gemm, Conv, ConvTranspose or Gather with a quantized weight.

    Attributes:
        node: the operation.
        weight: what it reads. For MatMul and Gemm the result is data @ matrix^T, whatever Transpose or
            transB lies between them.
        activation: how its data input is quantized; None if it is float.
    """

    node: ir.Node
    weight: PackedWeight
    activation: StaticActivation | DynamicActivation | None

    @property
    def label(self) -> str:
        """A name for what is made of the operation; models may leave their nodes unnamed."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def is_product(self) -> bool:
        """MatMul or Gemm."""
        return self.node.op_type in ("MatMul", "Gemm")

    @property
    def data(self) -> ir.Value:
        """The data input: indices for Gather."""
        value = self.node.inputs[1 if self.node.op_type == "Gather" else 0]
        assert value is not None
        return value


def quantized_operations(graph: ir.Graph) -> list[QuantizedOperation]:
    """All operations of a lowered graph whose weight InsertQDQ stored, in graph order."""
    found: list[QuantizedOperation] = []
    for node in graph:
        index = None if node.domain else _WEIGHT_INPUT.get(node.op_type)
        if index is None or len(node.inputs) <= index:
            continue
        weight = _weight_behind(node.inputs[index])
        if weight is not None:
            activation = None if node.op_type == "Gather" else read_activation(node.inputs[0])
            found.append(QuantizedOperation(node, weight, activation))
    return found


def _weight_behind(value: ir.Value | None) -> PackedWeight | None:
    """The weight that a value holds, seen through Identity, Cast and Transpose as `find_sites` sees it."""
    while value is not None:
        weight = read_weight(value)
        if weight is not None:
            return weight
        node = value.producer()
        if node is None or node.domain or node.op_type not in ("Identity", "Cast", "Transpose"):
            return None
        value = node.inputs[0]
    return None
