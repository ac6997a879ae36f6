"""The part of a graph that one transform touches, found by following labels from value to value.

A `Region` starts with labels on one value. A rule for each kind of operation (rules_*.py) says how labels on
some of its inputs and outputs determine labels on the others, and where they end: in an `Edit` of a constant.
What no rule allows is pinned, with the reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import numpy as np
import onnx_ir as ir

from qcompiler.graph.folds.labels import Classes, Dims, Labels, Unfit
from qcompiler.graph.sites import BRANCH, FLOATS

Kind = Literal["scale", "shift", "permute", "rotate"]
DOMAINS = ("", "ai.onnx", "com.microsoft")


@dataclass(frozen=True)
class Mark:
    """How a value is transformed: by the numbers of its labels, or by their inverses where `sign` is -1."""

    labels: Labels
    sign: int


@dataclass(frozen=True, eq=False)
class Constant:
    """An initializer as an operand sees it: (initializer + offset), perhaps transposed."""

    value: ir.Value
    offset: float
    transposed: bool
    shared: str  # who else uses it, or empty
    direct: bool  # the operand is the initializer itself


@dataclass(frozen=True, eq=False)
class Edit:
    """A constant that absorbs the transform.

    Attributes:
        constant: what is changed.
        node, index: the operand that reads it.
        labels: broadcastable to the initializer.
        sign: +1 where the constant is transformed like the value (a producer), -1 for the inverse (a consumer).
    """

    constant: Constant
    node: ir.Node
    index: int
    labels: Labels
    sign: int

    @property
    def is_weight(self) -> bool:
        """A matrix or kernel; else a gain, bias or another vector."""
        return _is_weight(self.constant.value)


class Undecided(Exception):
    """A product of two values could pass the transform to either; the caller must choose."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        super().__init__(label(node))


@dataclass
class Region:
    """Grows from one marked value until every operation that touches it is consistent.

    Attributes:
        graph: the main graph.
        kind: of transform.
        choices: for products of two values: which operand carries the transform.
        insert: operations may be added where no constant can absorb the transform (per-channel Clip).
        loose: a scale crosses Clip, whose bounds stay as they are: right for values that stay within them.
        positive: an operation was crossed that only positive scales may cross (Relu, MaxPool).
    """

    graph: ir.Graph
    kind: Kind
    choices: Mapping[ir.Node, int]
    insert: bool = False
    loose: bool = False
    positive: bool = False
    classes: Classes = field(default_factory=Classes)
    marks: dict[ir.Value, Mark] = field(default_factory=dict[ir.Value, Mark])
    edits: dict[tuple[ir.Node, int, str], Edit] = field(default_factory=dict[tuple[ir.Node, int, str], Edit])
    clips: dict[ir.Node, Mark] = field(default_factory=dict[ir.Node, Mark])
    loose_clips: dict[ir.Node, Mark] = field(default_factory=dict[ir.Node, Mark])
    biases: dict[ir.Node, Labels] = field(default_factory=dict[ir.Node, Labels])
    reads: dict[ir.Node, Labels] = field(default_factory=dict[ir.Node, Labels])
    blocks: list[tuple[Labels, Labels]] = field(default_factory=list[tuple[Labels, Labels]])

    def grow(self, rules: Callable[[Region, ir.Node], None], start: Labels) -> None:
        """Apply rules until nothing changes, or until no channel of `start` is free any more."""
        self._todo: deque[ir.Node]
        undecided: dict[ir.Node, None] = {}
        while self._todo or undecided:
            if not self._todo:
                node = next(iter(undecided))
                del undecided[node]
                rules(self, node)
                continue
            node = self._todo.popleft()
            try:
                rules(self, node)
                undecided.pop(node, None)
            except Undecided:
                if node in undecided or not self._todo:
                    raise
                undecided[node] = None
            if self.exhausted(start):
                return

    def exhausted(self, start: Labels) -> bool:
        """Whether every channel of `start` is pinned."""
        pinned = self.classes.pinned()
        return bool(pinned) and all(int(root) in pinned for root in np.unique(self.classes.roots(start)))

    def begin(self, value: ir.Value, labels: Labels) -> None:
        """Mark the first value."""
        self._todo = deque()
        self.mark(value, labels, 1)

    def get(self, value: ir.Value | None) -> Mark | None:
        """The mark of a value, if it has one."""
        return None if value is None else self.marks.get(value)

    def mark(self, value: ir.Value, labels: Labels, sign: int) -> None:
        """A value that is computed carries these labels (fitted to its shape)."""
        labels = self.classes.fit(labels, dims(value))
        old = self.marks.get(value)
        if old is None:
            self.marks[value] = Mark(labels, sign)
            self._enter(value, labels)
            return
        self.classes.tie(old.labels, labels)
        if old.sign != sign and self.kind not in ("permute", "rotate"):
            self.classes.pin(labels, f"'{value.name}' would need a scale and its inverse")

    def put(self, node: ir.Node, index: int, labels: Labels, sign: int, role: str) -> None:
        """Operand `index` of a node carries these labels: a constant is edited, another value marked.

        Args:
            node: the reader of the operand.
            index: of the operand; an absent one is ignored.
            labels: aligned at the last axis of the operand.
            sign: see `Mark`.
            role: tells apart several edits of one operand (rows and columns of a weight).
        """
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return
        constant = resolve(value)
        if constant is None:
            self.mark(value, labels, sign)
            return
        labels = self.classes.fit(labels, dims(value))
        key = (node, index, role)
        if key in self.edits:
            self.classes.tie(self.edits[key].labels, labels)
            return
        if constant.shared and (_is_weight(constant.value) or not constant.direct):
            reason = f"weight '{constant.value.name}' is tied: {constant.shared}"
            self.classes.pin(labels, reason)
            return
        if constant.transposed:
            labels = labels.T
        self.edits[key] = Edit(constant, node, index, labels, sign)

    def pin(self, labels: Labels, reason: str) -> None:
        """These channels stay as they are."""
        self.classes.pin(labels, reason)

    def pin_node(self, node: ir.Node, reason: str) -> None:
        """Every marked input and output of a node stays as it is."""
        for value in (*node.inputs, *node.outputs):
            mark = self.get(value)
            if mark is not None:
                self.pin(mark.labels, reason)

    def _enter(self, value: ir.Value, labels: Labels) -> None:
        if value.is_graph_output():
            self.pin(labels, f"'{value.name}' is an output of the graph")
        if value.dtype is not None and value.dtype not in FLOATS:
            self.pin(labels, f"'{value.name}' holds no floating-point numbers")
        producer = value.producer()
        if producer is None:
            self.pin(labels, f"'{value.name}' is an input of the graph")
        for node in ([] if producer is None else [producer]) + list(value.consumers()):
            if node.graph is not self.graph:
                self.pin(labels, f"'{value.name}' is used in a subgraph")
            else:
                self._todo.append(node)


def dims(value: ir.Value) -> Dims:
    """The shape of a value with names for symbolic axes.

    Raises:
        Unfit: nothing is known about it.
    """
    shape = value.shape if value.const_value is None else value.const_value.shape
    if shape is None:
        raise Unfit(f"the shape of '{value.name}' is unknown")
    return tuple(d if isinstance(d, int) else d.value for d in shape)  # type: ignore[union-attr]


def label(node: ir.Node) -> str:
    """How messages call a node."""
    return f"{node.op_type} '{node.name or node.outputs[0].name}'"


def resolve(value: ir.Value) -> Constant | None:
    """The initializer behind an operand, through Identity, Cast, plain Transpose and `1 + gamma`.

    Raises:
        Unfit: it is a low-rank branch's: its narrow numbers would be rounded again, which changes the function.
    """
    offset, transposed, shared, direct = 0.0, False, "", True
    while not value.is_initializer():
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
            return None
        if node.op_type == "Add" and offset == 0:
            inner, offset = _plus_scalar(node)
            if inner is None:
                return None
        elif node.op_type == "Transpose" and len(dims(value)) == 2 and not offset:
            inner, transposed = node.inputs[0], not transposed
        elif node.op_type in ("Identity", "Cast") and not offset:
            inner = node.inputs[0]
        else:
            return None
        shared = shared or _sharing(value)
        value, direct = inner, False
    if BRANCH in value.metadata_props:
        site = value.metadata_props[BRANCH]
        raise Unfit(f"'{site}' has a low-rank branch, which would be rounded again: put transforms before it")
    return Constant(value, offset, transposed, shared or _sharing(value), direct)


def refuse(node: ir.Node, kind: str) -> NoReturn:
    """Say why nothing crosses an operation.

    Raises:
        Unfit: it is a low-rank branch's, as `resolve` says; else that it is none which a transform can cross.
    """
    for value in node.inputs:
        if value is not None:
            resolve(value)
    raise Unfit(f"a {kind} cannot cross {label(node)}")


def bias_add(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The Add of a constant vector that alone reads a node's output, with the place of the vector."""
    out = node.outputs[0]
    users = list(out.uses())
    if len(users) != 1 or out.is_graph_output() or users[0][0].op_type != "Add":
        return None
    add, index = users[0]
    bias = add.inputs[1 - index]
    known = bias is not None and bias.is_initializer() and len(dims(bias)) == 1
    return (add, 1 - index) if known and bias is not None and dims(bias)[0] == dims(out)[-1] else None


def _plus_scalar(node: ir.Node) -> tuple[ir.Value | None, float]:
    for this, other in ((0, 1), (1, 0)):
        inner, scalar = node.inputs[this], node.inputs[other]
        tensor = None if scalar is None else scalar.const_value
        if inner is not None and inner.is_initializer() and tensor is not None and tensor.size == 1:
            return inner, float(tensor.numpy().reshape(()))
    return None, 0.0


def _sharing(value: ir.Value) -> str:
    users = list(value.uses())
    if value.is_graph_output():
        return "it is an output of the graph"
    return f"{len(users)} operations use it" if len(users) > 1 else ""


def _is_weight(value: ir.Value) -> bool:
    return sum(d != 1 for d in dims(value)) > 1
