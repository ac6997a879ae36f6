"""Orthogonal matrices that a graph multiplies by when it runs: `qcompiler::Hadamard` before a product.

A matrix that no producer can absorb stands in the graph, and its inverse in the weights behind it. It is a Kronecker
product of two small ones, so that n numbers cost n (a + b) multiplications, n = a b, and nothing large is stored. The
functions are standard operations, which any runtime inlines. Source: the online rotations of QuaRot (2404.00456).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import Refusal
from qcompiler.graph.codes import DOMAIN
from qcompiler.graph.folds.rewrite import commit, read
from qcompiler.graph.functions import add_function, parse_function
from qcompiler.graph.sites import Site

Floats = npt.NDArray[np.float64]
HADAMARD = "Hadamard"


@dataclass(frozen=True, eq=False)
class Kronecker:
    """The orthogonal matrix identity (x) left (x) right, for rows of `blocks * a * b` numbers.

    Attributes:
        sizes: blocks, a and b.
        left: [a, a], mixes what is b numbers apart; None: the identity.
        right: [b, b], mixes neighbours; None: the identity.
    """

    sizes: tuple[int, int, int]
    left: Floats | None
    right: Floats | None

    def after(self, rows: Floats) -> Floats:
        """Float64 [..., blocks * a * b] times the matrix."""
        parts = rows.reshape(*rows.shape[:-1], *self.sizes)
        parts = parts if self.right is None else parts @ self.right
        parts = parts if self.left is None else self.left.T @ parts
        return parts.reshape(rows.shape)


def turn_input(model: ir.Model, value: ir.Value, sites: Sequence[Site], turn: Kronecker) -> Refusal | None:
    """Multiply what some sites read by an orthogonal matrix, and their weights by its inverse.

    Args:
        model: whose graph is changed; not if there is a refusal.
        value: the data input of the sites' products, of as many channels as the matrix has rows.
        sites: products (MatMul, Gemm) that read nothing else.
        turn: the matrix.

    Raises:
        PassRefused: a weight would overflow its element type; nothing is changed.
    """
    if value.shape is None:
        return Refusal(value.name or "?", f"the rank of '{value.name}' is unknown")
    turned = {site.weight: site.from_matrix(turn.after(site.to_matrix(read(site.weight)))) for site in sites}
    commit(turned)
    out = insert_turn(model, value, turn)
    for user in (user for site in sites for user in site.users):
        user.replace_input_with(0, out)
    return None


def insert_turn(model: ir.Model, value: ir.Value, turn: Kronecker) -> ir.Value:
    """A new value, the product of the rows of `value` (of known rank) with the matrix."""
    assert value.shape is not None
    blocks, a, b = turn.sizes
    kind = HADAMARD + ("Inner" if turn.left is None else "Outer" if turn.right is None else "")
    inner = [blocks * a] if kind.endswith("Inner") else [blocks, a] if blocks > 1 else [a]
    lead = [0] * (len(value.shape) - 1)
    attributes = {"wide": [*lead, *inner, b], "narrow": [*lead, blocks * a * b]}
    graph, dtype = model.graph, value.dtype or ir.DataType.FLOAT
    sides = (("left", None if turn.left is None else turn.left.T), ("right", turn.right))
    constants = [_constant(graph, side, matrix, dtype) for side, matrix in sides if matrix is not None]
    add_function(model, _function(kind, graph.opset_imports[""]))
    out = ir.val(_unused(graph, f"{value.name}_turned"), dtype=value.dtype, shape=value.shape)
    node = ir.node(kind, [value, *constants], attributes, domain=DOMAIN, name=f"{out.name}_node", outputs=[out])
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return out


def _function(kind: str, opset: int) -> ir.Function:
    """`Hadamard(x, left, right) -> y`, `HadamardOuter(x, left)` or `HadamardInner(x, right)`.

    Attributes: `wide`, the shape in which the two last axes are those of the factors; `narrow`, that of x. Entries of
    0 copy a dimension. The matrix `left` is transposed already.
    """
    names = {"Outer": ["left"], "Inner": ["right"]}.get(kind.removeprefix(HADAMARD), ["left", "right"])
    steps = {"left": "MatMul (left, {})", "right": "MatMul ({}, right)"}
    lines = ["dims = Constant <value_ints: ints = @wide> ()", "parts = Reshape (x, dims)"]
    current = "parts"
    for name in reversed(names):
        lines.append(f"by_{name} = {steps[name].format(current)}")
        current = f"by_{name}"
    lines += ["old = Constant <value_ints: ints = @narrow> ()", f"y = Reshape ({current}, old)"]
    signature = f"{kind} <wide, narrow> (x, {', '.join(names)}) => (y)"
    return parse_function(signature, "\n".join(f"  {line}" for line in lines), opset)


def _constant(graph: ir.Graph, side: str, matrix: Floats, dtype: ir.DataType) -> ir.Value:
    """An initializer, one for all places that need the same."""
    array = matrix.astype(dtype.numpy())
    name = f"hadamard_{side}_{len(matrix)}"
    for value in graph.initializers.values():
        tensor = value.const_value
        if str(value.name).startswith(name) and tensor is not None and np.array_equal(tensor.numpy(), array):
            return value
    name = _unused(graph, name)
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _unused(graph: ir.Graph, name: str) -> str:
    taken = {v.name for node in graph for v in node.outputs} | set(graph.initializers)
    return next(n for k in range(len(taken) + 1) if (n := f"{name}_{k}" if k else name) not in taken)
