"""Which values of a graph get a static 8-bit grid, so that integer kernels can take over from end to end.

ONNX Runtime runs a convolution on integers only if its input *and* its result are quantized, and it drops a
Relu or Clip in between if the grid holds nothing that they would cut off. Additions, concatenations, pools and
the like follow when all their operands are quantized. Products (Gemm, MatMul) need their input only; their
result stays exact where no integer operation reads it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.model import StaticRange
from qcompiler.passes.round.histograms import static_range

_MOVES = frozenset({"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})  # keep grid and codes
_COMPUTES = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"})


@dataclass(frozen=True)
class Target:
    """One value to be quantized.

    Attributes:
        value: behind the Relu or Clip that the quantizer takes over, if there is one.
        low, high: its range may not reach beyond these (the bounds of that Relu or Clip).
        like: the value whose grid it must share, because the operation between only moves codes.
    """

    value: ir.Value
    low: float = -np.inf
    high: float = np.inf
    like: ir.Value | None = None

    def grid(self, low: float, high: float) -> StaticRange:
        """The grid for these ends, cut at the bounds."""
        return static_range(max(low, self.low), min(high, self.high), self.high)


def choose_values(
    graph: ir.Graph, products: Collection[ir.Node], outputs: bool, without: Collection[str] = ()
) -> list[Target]:
    """The values to quantize, in topological order.

    Args:
        graph: the float graph, sorted.
        products: the operations of the sites whose activations are static.
        outputs: whether results of the graph itself may be quantized.
        without: names of values that are not; nor is then what only follows them.
    """
    found: dict[ir.Value, Target] = {}

    def add(target: Target) -> None:
        value = target.value
        wanted = (outputs or not value.is_graph_output()) and value.name not in without
        if wanted and value.dtype in (None, ir.DataType.FLOAT):
            found.setdefault(value, target)

    for node in graph:
        if node in products:
            source = node.inputs[0]
            assert source is not None
            if source not in found:
                add(_behind(source))
            result = _absorbed(node.outputs[0])
            if node.op_type == "Conv" or result.value.is_graph_output():
                add(result)
        elif node.domain == "" and node.op_type in _COMPUTES | _MOVES:
            _follow(node, found, add)
    return list(found.values())


def _follow(node: ir.Node, found: dict[ir.Value, Target], add: object) -> None:
    operands = [v for v in node.inputs if v is not None]
    data = operands[:1] if node.op_type in _MOVES else operands
    if not data or any(value not in found for value in data):
        return
    assert callable(add)
    if node.op_type in _MOVES:
        first = found[data[0]]
        add(Target(node.outputs[0], first.low, first.high, first.like or data[0]))
    else:
        add(_absorbed(node.outputs[0]))


def _behind(value: ir.Value) -> Target:
    """A value with the bounds of the Relu or Clip that makes it."""
    producer = value.producer()
    bounds = None if producer is None else bounds_of(producer)
    return Target(value) if bounds is None else Target(value, *bounds)


def _absorbed(value: ir.Value) -> Target:
    """A value, or the result of the only operation that reads it if that is a Relu or Clip."""
    node = follower(value)
    bounds = None if node is None else bounds_of(node)
    return Target(value) if node is None or bounds is None else Target(node.outputs[0], *bounds)


def follower(value: ir.Value) -> ir.Node | None:
    """The only operation that sees a value, if there is just one."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def bounds_of(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or a Clip with constant bounds around zero lets through; None for other operations."""
    if node.domain == "" and node.op_type == "Relu":
        return 0.0, float(np.inf)
    if node.domain != "" or node.op_type != "Clip":
        return None
    ends = [-np.inf, np.inf]
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None:
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is None:
                return None
            ends[index] = float(tensor.numpy().reshape(()))
    return (float(ends[0]), float(ends[1])) if ends[0] <= 0 <= ends[1] else None
