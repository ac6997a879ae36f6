"""Which values norms make, whether these are operations of ONNX or written out."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.graph.folds.labels import Unfit
from qcompiler.graph.folds.region import dims, resolve

_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_PASSING = frozenset({"Cast", "Identity"})
_GAINS = frozenset({"Mul", "Div", "Add", "Sub"})
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceL2"})
_OF_LENGTHS = frozenset({"Sqrt", "Reciprocal", "Pow", "Cast", "Identity", "Max", "Clip"}) | _GAINS


def behind_norm(value: ir.Value) -> bool:
    """Whether a norm over the last axis makes a value, through its gain and bias (constants) and casts.

    Written out, a norm is a quotient or product of a value with one number a row that sums over rows.
    """
    node = value.producer()
    if node is None or node.domain not in ("", "com.microsoft"):
        return False
    if node.op_type in _NORMS:
        return node.outputs[0] is value and _axis(node) == -1
    moving = _moving(node)
    if node.op_type in _PASSING | _GAINS and len(moving) == 1:
        return behind_norm(moving[0])
    if node.op_type not in ("Mul", "Div") or len(moving) != 2:
        return False
    x, length = moving if node.op_type == "Div" or _is_length(moving[1]) else moving[::-1]
    return _is_length(length) and not _is_length(x)


def _axis(node: ir.Node) -> int:
    axis, shape = node.attributes.get_int("axis", -1), node.outputs[0].shape
    return axis if axis < 0 or shape is None else axis - len(shape)


def _moving(node: ir.Node) -> list[ir.Value]:
    """The inputs that are no constants."""
    try:
        return [v for v in node.inputs if v is not None and v.const_value is None and resolve(v) is None]
    except Unfit:  # of a low-rank branch, or of unknown shape
        return []


def _is_length(value: ir.Value) -> bool:
    """One number a row, made of a sum over the row."""
    if value.shape is None or dims(value)[-1:] != (1,):
        return False
    node = value.producer()
    while node is not None and not node.domain:
        if node.op_type in _REDUCTIONS:
            return True
        moving = _moving(node)
        if node.op_type not in _OF_LENGTHS or len(moving) != 1:
            return False
        node = moving[0].producer()
    return False
