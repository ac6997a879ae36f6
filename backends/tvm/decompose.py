"""Attention, RotaryEmbedding and Swish of opset 23 and later, written out in older operators.

TVM's importer lacks the last two and reads the first as com.microsoft's. The formulas are those of the ONNX
operator specification; where it leaves a choice (rows that are masked altogether) they follow ONNX Runtime.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

_DOMAINS = ("", "ai.onnx")
_END = np.iinfo(np.int64).max


def decompose(model: ir.Model) -> None:
    """Replace every operation that `refusal` has nothing against, in place."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        rule = _RULES.get(node.op_type)
        if rule is None or not decomposed(node):
            continue
        graph = node.graph
        assert graph is not None
        built = _Builder(node, ir.tape.Tape())
        found = rule(built)
        graph.insert_before(node, built.tape.nodes)
        for old, new in zip(node.outputs, found, strict=False):
            name, new.shape, new.type = old.name, old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = None, name
        graph.remove(node, safe=True)


def decomposed(node: ir.Node) -> bool:
    """Whether `decompose` replaces a node."""
    return node.op_type in _RULES and node.domain in _DOMAINS and refusal(node) is None


def refusal(node: ir.Node) -> str | None:
    """Why a node of these operators cannot be written out, or None; None for all other operators."""
    if node.domain not in _DOMAINS:
        return None
    if node.op_type == "Attention":
        return _attention_refusal(node)
    return _rotary_refusal(node) if node.op_type == "RotaryEmbedding" else None


@dataclass
class _Builder:
    """Writes the nodes that replace one."""

    node: ir.Node
    tape: ir.tape.Tape

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def need(self, index: int) -> ir.Value:
        value = self.input(index)
        assert value is not None
        return value

    def op(self, name: str, *inputs: ir.Value | None, **attributes: int | Sequence[int]) -> ir.Value:
        return self.tape.op(name, list(inputs), attributes)

    def constant(self, array: npt.NDArray[np.generic]) -> ir.Value:
        return self.tape.op("Constant", [], {"value": ir.tensor(array)})

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def scalar(self, number: float) -> ir.Value:
        """A number in the type of the first input."""
        return self.constant(np.array(number, _dtype(self.node)))

    def reshape(self, x: ir.Value, *dims: int) -> ir.Value:
        return self.op("Reshape", x, self.ints(*dims))

    def slice(self, x: ir.Value, start: int, end: int, step: int = 1) -> ir.Value:
        """Part of the last axis."""
        return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(-1), self.ints(step))

    def length(self, x: ir.Value, axis: int) -> ir.Value:
        """The size of an axis as a scalar."""
        return self.op("Squeeze", self.op("Shape", x, start=axis, end=axis + 1), self.ints(0))

    def positions(self, x: ir.Value, axis: int) -> ir.Value:
        """0, 1, ... along an axis of x."""
        return self.op("Range", self.constant(np.array(0)), self.length(x, axis), self.constant(np.array(1)))


def _dtype(node: ir.Node) -> np.dtype[Any]:
    first = node.inputs[0]
    known = first.dtype if first is not None else None
    return np.dtype(np.float32) if known is None else known.numpy()


def _dim(value: ir.Value | None, axis: int) -> int | None:
    """A size, if it is known."""
    shape = value.shape if value is not None else None
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def _is_flat(node: ir.Node) -> bool:
    """Whether the heads lie side by side in the last axis (3-D inputs)."""
    first = node.inputs[0]
    return first is not None and first.shape is not None and len(first.shape) == 3


def _swish(b: _Builder) -> list[ir.Value]:
    x, alpha = b.need(0), b.node.attributes.get_float("alpha", 1.0)
    gate = x if alpha == 1.0 else b.op("Mul", x, b.scalar(alpha))
    return [b.op("Mul", x, b.op("Sigmoid", gate))]


def _rotated(node: ir.Node) -> int | None:
    """How many numbers of a head are rotated."""
    given = node.attributes.get_int("rotary_embedding_dim", 0)
    half = _dim(node.inputs[1], -1)
    return given or (None if half is None else 2 * half)


def _rotary_refusal(node: ir.Node) -> str | None:
    if node.inputs[0] is None or node.inputs[0].shape is None:
        return "its input has no known rank"
    if _rotated(node) is None:
        return "the size of its heads is not known"
    if _is_flat(node) and not node.attributes.get_int("num_heads", 0):
        return "a 3-D input needs num_heads"
    return None


def _rotary(b: _Builder) -> list[ir.Value]:
    """Pairs (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos); the pairs are halves or neighbours."""
    flat, size = _is_flat(b.node), _rotated(b.node)
    assert size is not None
    x = b.reshape(b.need(0), 0, 0, b.node.attributes.get_int("num_heads", 0), -1) if flat else b.need(0)
    ids, heads = b.input(3), b.ints(2 if flat else 1)
    cos, sin = (
        b.op("Unsqueeze", table if ids is None else b.op("Gather", table, ids), heads)
        for table in (b.need(1), b.need(2))
    )
    neighbours = b.node.attributes.get_int("interleaved", 0) == 1
    if neighbours:
        one, two = b.slice(x, 0, size, 2), b.slice(x, 1, size, 2)
    else:
        one, two = b.slice(x, 0, size // 2), b.slice(x, size // 2, size)
    real = b.op("Sub", b.op("Mul", one, cos), b.op("Mul", two, sin))
    imaginary = b.op("Add", b.op("Mul", one, sin), b.op("Mul", two, cos))
    parts = [real, imaginary]
    if neighbours:
        pairs = [b.op("Unsqueeze", part, b.ints(-1)) for part in parts]
        parts = [b.reshape(b.op("Concat", *pairs, axis=-1), 0, 0, 0, size)]
    if b.node.attributes.get_int("rotary_embedding_dim", 0):
        parts.append(b.slice(x, size, _END))
    y = b.op("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]
    return [b.reshape(y, 0, 0, -1) if flat else y]


def _heads(node: ir.Node) -> tuple[int | None, int | None]:
    """Heads of queries, and of keys and values."""
    if _is_flat(node):
        names = ("q_num_heads", "kv_num_heads")
        q, kv = (node.attributes.get_int(name, 0) or None for name in names)
        return q, kv
    return _dim(node.inputs[0], 1), _dim(node.inputs[1], 1)


def _scale(node: ir.Node) -> float | None:
    """What the products of queries and keys are multiplied by."""
    if "scale" in node.attributes:
        return node.attributes.get_float("scale", 1.0)
    size, (heads, _) = _dim(node.inputs[0], -1), _heads(node)
    if size is None or heads is None:
        return None
    return 1 / math.sqrt(size // heads if _is_flat(node) else size)


def _attention_refusal(node: ir.Node) -> str | None:
    q, kv = _heads(node)
    if node.inputs[0] is None or node.inputs[0].shape is None or q is None or kv is None:
        return "its number of heads is not known"
    if _scale(node) is None:
        return "the size of its heads is not known"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        return "its products of queries and keys are an output"
    mask, total = (node.inputs[3] if len(node.inputs) > 3 else None), _dim(node.inputs[1], -2)
    past = node.inputs[4] if len(node.inputs) > 4 else None
    before = 0 if past is None else _dim(past, 2)
    have = _dim(mask, -1)
    if have is not None and total is not None and before is not None and have not in (1, total + before):
        return "its mask is shorter than its keys"
    return None


def _attention(b: _Builder) -> list[ir.Value]:
    """softmax(cap(q k^T scale) + bias) v, a head at a time; keys and values of the past come first."""
    node, flat, (heads, kv_heads), scale = b.node, _is_flat(b.node), _heads(b.node), _scale(b.node)
    assert heads is not None
    assert kv_heads is not None
    assert scale is not None
    q, k, v = b.need(0), b.need(1), b.need(2)
    if flat:
        counts = (heads, kv_heads, kv_heads)
        q, k, v = (
            b.op("Transpose", b.reshape(x, 0, 0, n, -1), perm=[0, 2, 1, 3])
            for x, n in zip((q, k, v), counts, strict=True)
        )
    if (past_k := b.input(4)) is not None and (past_v := b.input(5)) is not None:
        k, v = b.op("Concat", past_k, k, axis=2), b.op("Concat", past_v, v, axis=2)
    else:
        past_k = None
    present = [k, v]
    if heads != kv_heads:
        shared = b.ints(*(head // (heads // kv_heads) for head in range(heads)))
        k, v = b.op("Gather", k, shared, axis=1), b.op("Gather", v, shared, axis=1)
    keys = b.op("Transpose", k, perm=[0, 1, 3, 2])
    scores = b.op("MatMul", b.op("Mul", q, b.scalar(scale)), keys)
    cap = node.attributes.get_float("softcap", 0.0)
    if cap:
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, b.scalar(cap))), b.scalar(cap))
    y = b.op("MatMul", _weights(b, scores, q, k, past_k), v)
    if flat:
        y = b.reshape(b.op("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, -1)
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:3]):
        return [y, *(b.op("Identity", value) for value in present)]
    return [y]


def _weights(b: _Builder, scores: ir.Value, q: ir.Value, k: ir.Value, past_k: ir.Value | None) -> ir.Value:
    """The softmax of the masked scores; zeros for a query that may see no key."""
    mask = b.input(3)
    if mask is not None and mask.dtype != ir.DataType.BOOL:
        scores, mask = b.op("Add", scores, mask), b.op("Greater", mask, b.scalar(-math.inf))
    allowed = [mask] if mask is not None else []
    lengths = b.input(6)
    if lengths is not None:
        lengths = b.op("Unsqueeze", lengths, b.ints(1, 2, 3))
        allowed.append(b.op("Less", b.positions(k, 2), lengths))
    may_be_empty = bool(allowed)
    if b.node.attributes.get_int("is_causal", 0):
        rows = b.op("Unsqueeze", b.positions(q, 2), b.ints(1))
        if past_k is not None:
            rows = b.op("Add", rows, b.length(past_k, 2))
        elif lengths is not None:
            rows = b.op("Add", rows, b.op("Sub", lengths, b.length(q, 2)))
        allowed.append(b.op("LessOrEqual", b.positions(k, 2), rows))
    if not allowed:
        return b.op("Softmax", scores, axis=-1)
    seen = functools.reduce(lambda one, two: b.op("And", one, two), allowed)
    lowest = float(np.finfo(_dtype(b.node)).min)
    weights = b.op("Softmax", b.op("Where", seen, scores, b.scalar(lowest)), axis=-1)
    return b.op("Where", seen, weights, b.scalar(0.0)) if may_be_empty else weights


_RULES: dict[str, Callable[[_Builder], list[ir.Value]]] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "Swish": _swish,
}
