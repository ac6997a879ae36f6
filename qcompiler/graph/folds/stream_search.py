"""Find what an orthogonal matrix on a residual stream touches: by what each operation does, not by names."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.errors import Refusal
from qcompiler.graph.folds.labels import Unfit
from qcompiler.graph.folds.region import dims, label, refuse, resolve
from qcompiler.graph.folds.rules_shape import axes_of, moved_back
from qcompiler.graph.folds.stream import Stream, Turn

_PASSING = frozenset({"Identity", "Cast", "Dropout", "Add", "Sub", "Sum"})
_MOVING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Concat", "Slice", "Split"})
_RMS_NORMS = frozenset({"RMSNormalization", "SimplifiedLayerNormalization"})


def find_stream(model: ir.Model, value: ir.Value) -> Stream | Refusal:
    """The residual stream that a value belongs to, or what keeps it from being turned.

    Args:
        model: float, with shapes inferred.
        value: whose last axis holds the channels.
    """
    search = _searched(model, value, until_norms=False)
    if isinstance(search, Refusal):
        return search
    constants = tuple(search.writers), tuple(search.readers), tuple(search.gains)
    return Stream(model, search.width, tuple(search.values), *constants, tuple(search.sees_mean))


def find_centred(model: ir.Model, value: ir.Value) -> tuple[Stream, tuple[ir.Node, ...]] | Refusal:
    """The stream of a value as far as LayerNorms see it, and these norms, if nothing else reads it.

    Its mean over the channels is then what no one sees. Arguments as those of `find_stream`.
    """
    search = _searched(model, value, until_norms=True)
    if isinstance(search, Refusal):
        return search
    if not search.sees_mean:
        return Refusal(value.name or "?", "no LayerNormalization reads it")
    if search.readers or search.gains:
        what = search.readers[0].node if search.readers else search.gains[0][0]
        return Refusal(value.name or "?", f"{label(what)} reads it before any norm, so that its mean is seen")
    return Stream(model, search.width, tuple(search.values), tuple(search.writers), (), ()), tuple(search.sees_mean)


def _searched(model: ir.Model, value: ir.Value, *, until_norms: bool) -> _Search | Refusal:
    name = value.name or "?"
    try:
        width = dims(value)[-1]
        if not isinstance(width, int):
            return Refusal(name, f"the number of channels of '{name}' is unknown")
        search = _Search(model.graph, width, until_norms)
        search.follow(value)
    except Unfit as reason:
        return Refusal(name, str(reason))
    return search


@dataclass
class _Search:
    graph: ir.Graph
    width: int
    until_norms: bool
    values: dict[ir.Value, None] = field(default_factory=dict[ir.Value, None])
    writers: list[Turn] = field(default_factory=list[Turn])
    readers: list[Turn] = field(default_factory=list[Turn])
    gains: list[tuple[ir.Node, int]] = field(default_factory=list[tuple[ir.Node, int]])
    sees_mean: list[ir.Node] = field(default_factory=list[ir.Node])

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
        if node.op_type in ("Add", "Sub", "Sum") and self.width > 1 and dims(value)[-1:] in ((), (1,)):
            self._sees_mean(node)  # a number a row goes to all channels
        elif (constant := resolve(value)) is None:
            self._join(value)
        elif dims(value)[-1] != self.width:
            raise Unfit(f"{label(node)} adds a constant that does not lie along the channels")
        else:
            self.writers.append(Turn(node, index, constant, 0 if constant.transposed else len(dims(value)) - 1))

    def _sees_mean(self, node: ir.Node) -> None:
        if self.until_norms and node.op_type != "LayerNormalization":
            raise Unfit(f"{label(node)} sees the mean over the channels")
        self.sees_mean.append(node)

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
        elif kind in _RMS_NORMS | {"LayerNormalization"} and _last_axis(node):
            self._norm(node)
        elif kind == "Gather":
            self._look_up(node)
        elif kind in ("Reshape", "Transpose") and node.outputs[0] in self.values:
            self._from_convolution(node)
        elif kind in ("ReduceMean", "ReduceSum"):
            self._sum(node)
        elif not (self._is_square(node) or self._measures_length(node)):
            refuse(node, "rotation")

    def _norm(self, node: ir.Node) -> None:
        """RMSNormalization and LayerNormalization: the gain must be even, a bias is written to the stream."""
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            raise Unfit(f"{label(node)} gives out its statistics")
        if node.op_type == "LayerNormalization":
            self._sees_mean(node)
        if self.until_norms:
            if node.outputs[0] in self.values or node.op_type != "LayerNormalization":
                raise Unfit(f"{label(node)} writes the stream or is no LayerNormalization")
            return
        self.gains.append((node, 1))
        self._operand(node, 0)
        self._join(node.outputs[0])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self._operand(node, 2)

    def _sum(self, node: ir.Node) -> None:
        """Over the channels: only the mean is seen. Over other axes: a pool, which turns along."""
        over_channels, alone = _reduced(node)
        if alone:
            self._sees_mean(node)
        elif over_channels:
            raise Unfit(f"a rotation cannot cross {label(node)}")
        else:
            self._operand(node, 0)
            self._join(node.outputs[0])

    def _from_convolution(self, node: ir.Node) -> None:
        """Output channels of a convolution that Reshape and Transpose bring to the last axis (patches)."""
        labels = np.arange(self.width).reshape(*[1] * (len(dims(node.outputs[0])) - 1), -1)
        here = node
        while here.op_type in ("Reshape", "Transpose"):
            source = here.inputs[0]
            producer = None if source is None else source.producer()
            if source is None or producer is None or len(source.uses()) > 1 or source.is_graph_output():
                break
            labels, here = moved_back(labels, here), producer
        kernel = here.inputs[1] if here.op_type == "Conv" else None
        constant = None if kernel is None else resolve(kernel)
        if constant is None or [k for k, size in enumerate(labels.shape) if size > 1] != [1]:
            raise Unfit(f"a rotation cannot cross {label(here)}")
        self.writers.append(Turn(here, 1, constant, 0))
        if len(here.inputs) > 2 and here.inputs[2] is not None:
            self._operand(here, 2)

    def _keeps_channels(self, node: ir.Node) -> bool:
        """Whether an operation that moves numbers leaves the last axis as it is."""
        source, out = node.inputs[0], node.outputs[0]
        assert source is not None
        rank = len(dims(out))
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            return perm is not None and perm.as_ints()[-1] == rank - 1
        if node.op_type in ("Concat", "Split"):
            return node.attributes.get_int("axis", 0) % rank != rank - 1
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
        out, users = node.outputs[0], list(node.outputs[0].consumers())
        sums = all(u.op_type in ("ReduceMean", "ReduceSum") and _reduced(u)[1] for u in users)
        if not users or out.is_graph_output() or not sums:
            raise Unfit(f"a rotation cannot cross {label(node)}")

    def _measures_length(self, node: ir.Node) -> bool:
        return node.op_type == "ReduceL2" and _reduced(node)[1]

    def _look_up(self, node: ir.Node) -> None:
        """A table is a writer; a choice of rows passes."""
        table = node.inputs[0]
        assert table is not None
        rank = len(dims(table))
        if node.attributes.get_int("axis", 0) % rank == rank - 1:
            raise Unfit(f"{label(node)} picks channels")
        self._operand(node, 0)
        self._join(node.outputs[0])

    def _product(self, node: ir.Node) -> None:
        """MatMul or Gemm with a constant: its columns write the stream, its rows read it."""
        weight = node.inputs[1]
        constant = None if weight is None else resolve(weight)
        last = 0 if weight is None else len(dims(weight)) - 1  # more than two axes: a weight for each expert
        if constant is None or node.inputs[0] is None or last < 1:
            raise Unfit(f"a rotation cannot cross {label(node)}")
        if node.attributes.get_int("transA", 0):
            raise Unfit(f"{label(node)} transposes its data")
        flipped = (node.attributes.get_int("transB", 0) == 1) ^ constant.transposed
        if node.inputs[0] in self.values:
            self.readers.append(Turn(node, 1, constant, last if flipped else last - 1))
        if node.outputs[0] in self.values:
            self.writers.append(Turn(node, 1, constant, last - 1 if flipped else last))
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
    rank = len(dims(node.outputs[0]))
    return node.attributes.get_int("axis", -1) % rank == rank - 1


def _reduced(node: ir.Node) -> tuple[bool, bool]:
    """Whether a reduction sums over the channels, and over them alone."""
    assert node.inputs[0] is not None
    rank = len(dims(node.inputs[0]))
    axes = axes_of(node, rank)
    return rank - 1 in axes, axes == [rank - 1]
