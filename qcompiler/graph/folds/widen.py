"""More channels for a residual stream: x -> x Q with Q [d, w], w > d and Q Q^T = I, which changes no length.

Writers become W Q and readers Q^T W as in a rotation. What divides by the number of channels must go on dividing by d:
the mean of squares in an RMS norm. Source: QUAD (2503.19353), which appends directions of outliers to the stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds.region import Constant, label, resolve
from qcompiler.graph.folds.rewrite import commit, read
from qcompiler.graph.folds.stream import Stream

Floats = npt.NDArray[np.float64]
_ORTHOGONAL = 1e-6
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
_CROSSED = frozenset(
    {"Add", "Sub", "Sum", "Identity", "Cast", "Dropout", "Mul", "Div", "Pow", "Gather", "MatMul", "Gemm", "Transpose"}
    | {"ReduceMean", "ReduceSum", "ReduceL2", "Squeeze", "Unsqueeze", *_NORMS}
)  # what holds no number of channels


def find_obstacle(stream: Stream) -> Refusal | None:
    """What keeps a stream that can be rotated from being widened, or None."""
    for node in _touching(stream):
        if node.op_type not in _CROSSED:
            return Refusal(stream.values[0].name or "?", f"{label(node)} may hold the number of channels")
    if stream.keeps_mean:
        what = f"{label(stream.keeps_mean[0])} sees the mean over the channels: put 'center-norms' before"
        return Refusal(stream.values[0].name or "?", what)
    held = [(turn.node, turn.constant) for turn in (*stream.writers, *stream.readers)]
    for node, constant in (*held, *((n, _constant(n, k)) for n, k in stream.gains)):
        if constant.shared or constant.value.is_graph_output():
            return Refusal(stream.values[0].name or "?", f"the weight of {label(node)} is not its own")
    return None


def widen(stream: Stream, Q: npt.ArrayLike) -> None:
    """Multiply every value of the stream by Q from the right.

    Args:
        stream: without gains that differ (`Stream.fold_gains`), and without an obstacle.
        Q: [width, wider] with orthonormal rows.

    Raises:
        BadOption: Q is no such matrix, or a gain differs from channel to channel.
        PassRefused: a weight would overflow its element type; nothing is changed.
    """
    matrix, width = np.asarray(Q, np.float64), stream.width
    wider = matrix.shape[-1]
    if matrix.ndim != 2 or len(matrix) != width or np.abs(matrix @ matrix.T - np.eye(width)).max() > _ORTHOGONAL:
        raise BadOption(f"rows must be orthonormal, {width} of them; the matrix is {matrix.shape}")
    changes = _widened_gains(stream, wider)
    for turn in (*stream.writers, *stream.readers):
        value = turn.constant.value
        array = np.tensordot(changes.get(value, read(value)), matrix, ([turn.axis], [0]))
        changes[value] = np.moveaxis(array, -1, turn.axis)
    commit(changes)
    _divide_as_before(stream, wider)
    _reshape(stream, changes, wider)


def _touching(stream: Stream) -> Iterator[ir.Node]:
    for value in stream.values:
        producer = value.producer()
        assert producer is not None
        yield producer
        yield from value.consumers()


def _constant(node: ir.Node, index: int) -> Constant:
    value = node.inputs[index]
    constant = None if value is None else resolve(value)
    assert constant is not None
    return constant


def _widened_gains(stream: Stream, wider: int) -> dict[ir.Value, Floats]:
    """The gains with as many numbers as there will be channels; those of norms that divide by all make up for it."""
    changes: dict[ir.Value, Floats] = {}
    for node, index in stream.gains:
        constant = _constant(node, index)
        array = read(constant.value) + constant.offset
        if array.shape[-1:] != (stream.width,):
            continue
        if np.ptp(array) > 1e-6 * np.abs(array).max():
            raise BadOption(f"{label(node)} has a gain for each channel", fix="call fold_gains first")
        factor = np.sqrt(stream.width / wider) if node.op_type in _NORMS else 1.0
        changes[constant.value] = np.full((*array.shape[:-1], wider), array.flat[0] * factor) - constant.offset
    return changes


def _divide_as_before(stream: Stream, wider: int) -> None:
    """Means over the channels stay sums divided by the old number of channels."""
    share = stream.width / wider
    for node in dict.fromkeys(_touching(stream)):
        if node.op_type in _NORMS:
            epsilon = node.attributes.get_float("epsilon", 1e-5)
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * share)
        for square in _squares(node):
            for mean in (user for user in square.consumers() if user.op_type == "ReduceMean"):
                _multiply(stream.model.graph, mean, 1 / share)


def _squares(node: ir.Node) -> list[ir.Value]:
    """The output of a node that squares the stream, if it does."""
    square = node.op_type == "Pow" or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1])
    return [node.outputs[0]] if square else []


def _multiply(graph: ir.Graph, node: ir.Node, factor: float) -> None:
    """Multiply the output of a node by a number, for all that read it."""
    out = node.outputs[0]
    users = list(out.uses())
    name = f"{out.name}_per_old_channel"
    dtype = (out.dtype or ir.DataType.FLOAT).numpy()
    number = ir.val(f"{name}_factor", const_value=ir.tensor(np.asarray(factor, dtype), name=f"{name}_factor"))
    graph.register_initializer(number)
    result = ir.val(name, dtype=out.dtype, shape=out.shape)
    graph.insert_after(node, ir.node("Mul", [out, number], name=f"{name}_node", outputs=[result]))
    for user, index in users:
        user.replace_input_with(index, result)


def _reshape(stream: Stream, changes: dict[ir.Value, Floats], wider: int) -> None:
    """Write down the new shapes: of the stream, its squares, its constants, and what is seen of these."""
    squares = [square for node in _touching(stream) for square in _squares(node)]
    for value in dict.fromkeys((*stream.values, *squares)):
        assert value.shape is not None
        value.shape = ir.Shape([*value.shape.dims[:-1], wider])
    todo = list(changes)
    for constant in todo:
        assert constant.const_value is not None
        constant.shape = ir.Shape(constant.const_value.numpy().shape)
    while todo:
        source = todo.pop()
        for node in source.consumers():
            out = node.outputs[0]
            if resolve(out) is not None and source.shape is not None:
                sizes = source.shape.dims
                out.shape = ir.Shape(sizes[::-1] if node.op_type == "Transpose" else sizes)
                todo.append(out)
