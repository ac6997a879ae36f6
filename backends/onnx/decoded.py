"""Weights that ONNX Runtime decodes to float32 when a session is made."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.backends.onnx.emit import Emitter, replace_output


def decode(model: ir.Model, node: ir.Node) -> None:
    """DequantizeLinear -> Cast, Sub, Mul.

    ONNX Runtime never folds a DequantizeLinear of constants while it may still fuse it: it would decode the
    whole weight in every run, or fuse it with int8 activations. Plain arithmetic is folded at once.
    """
    emit = Emitter(model, node, f"{node.outputs[0].name}_decoded")
    codes, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    assert codes is not None
    assert scale is not None
    spread = _Spread.of(node)
    numbers = emit.cast(codes, ir.DataType.FLOAT)
    if zero is not None:
        numbers = emit.node("Sub", numbers, spread.write(emit, emit.cast(zero, ir.DataType.FLOAT)))
    replace_output(model.graph, node, emit.node("Mul", numbers, spread.write(emit, scale)))


@dataclass(frozen=True)
class _Spread:
    """Scales as DequantizeLinear takes them -> a form that broadcasts against the codes."""

    shape: tuple[int, ...]
    axis: int | None
    size: int | None

    @staticmethod
    def of(node: ir.Node) -> _Spread:
        axis, size = (node.attributes[n].as_int() if n in node.attributes else None for n in ("axis", "block_size"))
        shape = node.outputs[0].shape
        assert shape is not None
        return _Spread(tuple(shape.numpy()), axis, size)

    def write(self, emit: Emitter, value: ir.Value) -> ir.Value:
        if self.axis is None:
            return value
        if self.size is None:
            dims = (-1 if i == self.axis else 1 for i in range(len(self.shape)))
            return emit.node("Reshape", value, emit.integers(*dims))
        blocked, flat = list(self.shape), list(self.shape)
        groups = -(-self.shape[self.axis] // self.size)
        blocked[self.axis : self.axis + 1] = [groups, self.size]
        flat[self.axis] = groups * self.size
        column = emit.node("Unsqueeze", value, emit.integers(self.axis + 1))
        repeated = emit.node("Reshape", emit.node("Expand", column, emit.integers(*blocked)), emit.integers(*flat))
        if flat == list(self.shape):
            return repeated
        end = emit.integers(self.shape[self.axis])
        return emit.node("Slice", repeated, emit.integers(0), end, emit.integers(self.axis))
