"""Orthogonal matrices on a residual stream: everything that writes it and everything that reads it turns along.

`x -> x Q` on every value of the stream changes nothing if writers W become W Q, readers become Q^T W, and what
lies between sees lengths only: RMS norms with equal gains. Source: QuaRot (2404.00456), section 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadOption, PassRefused, Refusal
from qcompiler.graph.folds.apply import commit, read
from qcompiler.graph.folds.fold import Fold, find_fold
from qcompiler.graph.folds.labels import Unfit
from qcompiler.graph.folds.region import Constant, dims, label, resolve
from qcompiler.graph.folds.rules_shape import ints

_PASSING = frozenset({"Identity", "Cast", "Dropout", "Add", "Sub", "Sum"})
_MOVING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Concat", "Slice", "Split"})
_ORTHOGONAL = 1e-6


@dataclass(frozen=True, eq=False)
class Turn:
    """A constant that turns with the stream: along `axis` of the initializer, at one operand."""

    node: ir.Node
    index: int
    constant: Constant
    axis: int


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream that can be multiplied by an orthogonal matrix.

    Attributes:
        model: whose graph is changed.
        width: channels.
        values: all values that turn.
        writers: weights, tables and biases that write the stream.
        readers: weights that read it.
        gains: products with a gain inside the stream; they must be equal numbers before it can be turned.
    """

    model: ir.Model
    width: int
    values: tuple[ir.Value, ...]
    writers: tuple[Turn, ...]
    readers: tuple[Turn, ...]
    gains: tuple[tuple[ir.Node, int], ...]

    def fold_gains(self) -> list[Refusal]:
        """Move the gains of the norms into the weights that read them; if some cannot move, say why and move none."""
        refused = [found for node, index in self.gains if isinstance(found := self._gain_fold(node, index), Refusal)]
        for node, index in () if refused else self.gains:
            fold, gain = self._gain_fold(node, index), self._gain(node, index)
            assert isinstance(fold, Fold)  # a gain is in no other's way
            fold.scale(fold.tied(np.broadcast_to(gain, (fold.size,)), lambda group: float(group[0])))
        return refused

    def _gain_fold(self, node: ir.Node, index: int) -> Fold | Refusal:
        value = node.outputs[0]
        if np.any(self._gain(node, index) == 0):
            return Refusal(value.name or "?", f"{label(node)} has a gain of zero")
        return find_fold(self.model, value)

    def _gain(self, node: ir.Node, index: int) -> npt.NDArray[np.float64]:
        constant = _constant(node, index)
        return np.asarray(read(constant.value).reshape(-1) + constant.offset, np.float64)

    def rotate(self, Q: npt.ArrayLike) -> None:
        """Multiply every value of the stream by Q from the right.

        Args:
            Q: [width, width], orthogonal.

        Raises:
            BadOption: Q has another shape or isn't orthogonal.
            PassRefused: a norm in the stream still has a gain; see `fold_gains`.
        """
        matrix = np.asarray(Q, np.float64)
        if matrix.shape != (self.width, self.width):
            raise BadOption(f"the stream has {self.width} channels, the matrix is {matrix.shape}")
        if np.abs(matrix.T @ matrix - np.eye(self.width)).max() > _ORTHOGONAL:
            raise BadOption("the matrix is not orthogonal")
        for node, index in self.gains:
            constant = _constant(node, index)
            gain = read(constant.value) + constant.offset
            if np.ptp(gain) > 1e-6 * np.abs(gain).max():
                raise PassRefused(f"{label(node)} has a gain for each channel", fix="call fold_gains first")
        changes: dict[ir.Value, npt.NDArray[np.float64]] = {}
        for turn in (*self.writers, *self.readers):
            value = turn.constant.value
            if value not in changes or turn.axis != self._axis_done(value, turn):
                array = changes.get(value, read(value))
                changes[value] = np.moveaxis(np.tensordot(array, matrix, ([turn.axis], [0])), -1, turn.axis)
        commit(changes)

    def _axis_done(self, value: ir.Value, turn: Turn) -> int | None:
        """The axis along which an earlier operand has turned a shared constant already."""
        turns = (*self.writers, *self.readers)
        earlier = turns[: turns.index(turn)]
        return next((t.axis for t in earlier if t.constant.value is value), None)


def _constant(node: ir.Node, index: int) -> Constant:
    value = node.inputs[index]
    constant = None if value is None else resolve(value)
    assert constant is not None
    return constant


def find_stream(model: ir.Model, value: ir.Value) -> Stream | Refusal:
    """The residual stream that a value belongs to, or what keeps it from being turned.

    Args:
        model: float, with shapes inferred.
        value: whose last axis holds the channels.
    """
    name = value.name or "?"
    try:
        width = dims(value)[-1]
        if not isinstance(width, int):
            return Refusal(name, f"the number of channels of '{name}' is unknown")
        search = _Search(model.graph, width)
        search.follow(value)
    except Unfit as reason:
        return Refusal(name, str(reason))
    return Stream(
        model,
        width,
        tuple(search.values),
        tuple(search.writers),
        tuple(search.readers),
        tuple(search.gains),
    )


@dataclass
class _Search:
    graph: ir.Graph
    width: int
    values: dict[ir.Value, None] = field(default_factory=dict[ir.Value, None])
    writers: list[Turn] = field(default_factory=list[Turn])
    readers: list[Turn] = field(default_factory=list[Turn])
    gains: list[tuple[ir.Node, int]] = field(default_factory=list[tuple[ir.Node, int]])
    squares: set[ir.Value] = field(default_factory=set[ir.Value])

    def follow(self, value: ir.Value) -> None:
        """Visit every operation that touches the stream, once."""
        self._todo: deque[ir.Node] = deque()
        self._join(value)
        seen: set[ir.Node] = set()
        ends: list[ir.Node] = []
        while self._todo:
            node = self._todo.popleft()
            if node.graph is not self.graph:
                raise Unfit(f"{label(node)} in a subgraph uses the stream")
            if node.op_type in ("MatMul", "Gemm"):
                ends.append(node)
            elif node not in seen:
                seen.add(node)
                self._visit(node)
        for node in dict.fromkeys(ends):
            self._product(node)
        self._check_shared()

    def _join(self, value: ir.Value) -> None:
        if value in self.values:
            return
        if dims(value)[-1] != self.width:
            raise Unfit(f"'{value.name}' has another number of channels")
        producer = value.producer()
        if producer is None or value.is_graph_output():
            raise Unfit(f"'{value.name}' is an input or an output of the graph")
        self.values[value] = None
        self._todo += [producer, *value.consumers()]

    def _operand(self, node: ir.Node, index: int) -> None:
        """An operand that turns: a constant, or a value of the stream."""
        value = node.inputs[index]
        assert value is not None
        constant = resolve(value)
        if constant is None:
            self._join(value)
        elif dims(value)[-1] != self.width:
            raise Unfit(f"{label(node)} adds a number to all channels")
        else:
            self.writers.append(Turn(node, index, constant, 0 if constant.transposed else len(dims(value)) - 1))

    def _visit(self, node: ir.Node) -> None:
        kind = node.op_type
        if kind == "Shape":
            return
        if kind in _PASSING or (kind in _MOVING and self._keeps_channels(node)):
            count = len(node.inputs) if kind in _PASSING | {"Concat"} else 1
            for index in range(count):
                self._operand(node, index)
            for value in node.outputs:
                self._join(value)
        elif kind in ("Mul", "Div"):
            self._scaled(node)
        elif kind in ("RMSNormalization", "SimplifiedLayerNormalization") and _last_axis(node):
            self.gains.append((node, 1))
            self._operand(node, 0)
            self._join(node.outputs[0])
        elif kind == "Gather":
            self._look_up(node)
        elif not (self._is_square(node) or self._measures_length(node)):
            raise Unfit(f"a rotation cannot cross {label(node)}")

    def _keeps_channels(self, node: ir.Node) -> bool:
        """Whether an operation that moves numbers leaves the last axis as it is."""
        source, out = node.inputs[0], node.outputs[0]
        assert source is not None
        rank = len(dims(out))
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            return perm is not None and perm.as_ints()[-1] == rank - 1
        if node.op_type in ("Concat", "Split"):
            axis = node.attributes.get("axis")
            return (0 if axis is None else axis.as_int()) % rank != rank - 1
        return dims(source)[-1] == dims(out)[-1] == self.width

    def _scaled(self, node: ir.Node) -> None:
        """A product with one number a row passes; with a constant per channel it is a gain."""
        a, b = node.inputs
        assert a is not None
        assert b is not None
        constant = next((k for k, v in enumerate((a, b)) if resolve(v) is not None), None)
        if a is b and node.op_type == "Mul":
            self._ends_in_length(node)
            return
        if constant is None:
            rows = [k for k, v in enumerate((a, b)) if dims(v)[-1:] == (1,)]
            if len(rows) != 1 or (node.op_type == "Div" and rows == [0]):
                raise Unfit(f"a rotation cannot cross {label(node)}")
            constant = rows[0]
        elif node.op_type == "Div" and constant == 0:
            raise Unfit(f"a rotation cannot cross {label(node)}")
        elif np.prod([d for d in dims((a, b)[constant]) if isinstance(d, int)]) > 1:
            self.gains.append((node, constant))
        self._operand(node, 1 - constant)
        self._join(node.outputs[0])

    def _is_square(self, node: ir.Node) -> bool:
        exponent = node.inputs[1].const_value if node.op_type == "Pow" and node.inputs[1] else None
        if exponent is None or exponent.size != 1 or float(exponent.numpy().reshape(())) != 2:
            return False
        self._ends_in_length(node)
        return True

    def _ends_in_length(self, node: ir.Node) -> None:
        """Squares may only be summed over the channels: that is the length, which a rotation keeps."""
        out = node.outputs[0]
        users = list(out.consumers())
        sums = all(u.op_type in ("ReduceMean", "ReduceSum") and _reduces_channels(u) for u in users)
        if not users or out.is_graph_output() or not sums:
            raise Unfit(f"a rotation cannot cross {label(node)}")

    def _measures_length(self, node: ir.Node) -> bool:
        return node.op_type == "ReduceL2" and _reduces_channels(node)

    def _look_up(self, node: ir.Node) -> None:
        """A table is a writer; a choice of rows passes."""
        table = node.inputs[0]
        assert table is not None
        axis = node.attributes.get("axis")
        rank = len(dims(table))
        if (0 if axis is None else axis.as_int()) % rank == rank - 1:
            raise Unfit(f"{label(node)} picks channels")
        self._operand(node, 0)
        self._join(node.outputs[0])

    def _product(self, node: ir.Node) -> None:
        """MatMul or Gemm with a constant: its columns write the stream, its rows read it."""
        weight = node.inputs[1]
        constant = None if weight is None else resolve(weight)
        if weight is None or constant is None or node.inputs[0] is None or len(dims(weight)) != 2:
            raise Unfit(f"a rotation cannot cross {label(node)}")
        flag = node.attributes.get("transB")
        flipped = (flag is not None and flag.as_int() == 1) ^ constant.transposed
        if node.inputs[0] in self.values:
            self.readers.append(Turn(node, 1, constant, 1 if flipped else 0))
        if node.outputs[0] in self.values:
            self.writers.append(Turn(node, 1, constant, 0 if flipped else 1))
            if len(node.inputs) > 2:
                self._operand(node, 2)

    def _check_shared(self) -> None:
        """A constant that others use too can only turn if they all ask for the same."""
        turns = [*self.writers, *self.readers]
        for turn in turns:
            if not turn.constant.shared:
                continue
            same = [t for t in turns if t.constant.value is turn.constant.value]
            alike = {t.axis for t in same} == {turn.axis}
            if turn.constant.value.is_graph_output() or not alike or len(same) != _uses(turn.constant.value):
                raise Unfit(f"weight '{turn.constant.value.name}' is tied: {turn.constant.shared}")


def _uses(value: ir.Value) -> int:
    """How many operands read a constant, seen through what `resolve` sees through."""
    count = 0
    for node, _ in value.uses():
        inner = node.outputs[0]
        count += _uses(inner) if resolve(inner) is not None else 1
    return count


def _last_axis(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    rank = len(dims(node.outputs[0]))
    return axis is None or axis.as_int() % rank == rank - 1


def _reduces_channels(node: ir.Node) -> bool:
    assert node.inputs[0] is not None
    rank = len(dims(node.inputs[0]))
    given = node.attributes.get("axes")
    axes: Iterable[int] = given.as_ints() if given is not None else ints(node, 1) or range(rank)
    return [axis % rank for axis in axes] == [rank - 1]
