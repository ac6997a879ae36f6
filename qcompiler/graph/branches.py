"""Corrections of sites: two small products beside a product, whose constants are stored with the site's weight.

They are standard operations (Cast, MatMul, Add), which every runtime has and every engine here can follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.folds.region import bias_add
from qcompiler.graph.sites import BRANCH, Site


def add_branch(
    graph: ir.Graph, sites: Sequence[Site], lefts: Sequence[npt.NDArray[Any]], right: npt.NDArray[Any]
) -> None:
    """Take `left @ right` from each weight, and add x right^T left^T behind its operation (and the bias of that).

    The function of the graph stays as it is. The factors are constants of their own type, cast to that of the weight.
    Sites that read the same value share the product x right^T; `right` is stored with the first of them.

    Args:
        graph: float.
        sites: MatMul or Gemm of one user, with a matrix, that read one value; in topological order.
        lefts: float16 [rows, rank], one a site.
        right: float16 [rank, columns].
    """
    first, source = sites[0], sites[0].node.inputs[0]
    assert source is not None
    down = _factor(graph, first, 0, right.T, source)
    graph.insert_before(first.node, down)
    for site, left in zip(sites, lefts, strict=True):
        _take(site, left.astype(np.float32) @ right.astype(np.float32))
        up = _factor(graph, site, 1, left.T, down[-1].outputs[0])
        found = bias_add(site.node) if site.op == "MatMul" else None
        _add_behind(graph, site.node if found is None else found[0], up, up[-1].outputs[0])


def _take(site: Site, product: npt.NDArray[np.float32]) -> None:
    """Take a matrix [rows, columns] from a weight."""
    tensor = site.weight.const_value
    assert tensor is not None
    rest = site.from_matrix((site.matrix() - product).astype(tensor.dtype.numpy()))
    site.weight.const_value = ir.tensor(rest, name=site.weight.name)


def _factor(graph: ir.Graph, site: Site, number: int, matrix: npt.NDArray[Any], value: ir.Value) -> list[ir.Node]:
    """The nodes of value @ matrix, not in the graph yet; the matrix is a constant that belongs to the site."""
    dtype, name = site.weight.dtype or ir.DataType.FLOAT, f"{site.weight.name}_branch{number}"
    constant = _constant(graph, name, np.ascontiguousarray(matrix))
    constant.metadata_props[BRANCH] = str(site.weight.name)
    cast = _node("Cast", [constant], f"{name}_cast", dtype, constant.shape)
    cast.attributes["to"] = ir.AttrInt64("to", dtype.value)
    shape = None if value.shape is None else ir.Shape([*value.shape[:-1], matrix.shape[1]])
    return [cast, _node("MatMul", [value, cast.outputs[0]], f"{name}_out", dtype, shape)]


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _node(op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Node:
    output = ir.val(name, dtype=dtype, shape=shape)
    return ir.node(op, inputs, name=f"{name}_node", outputs=[output])


def _add_behind(graph: ir.Graph, node: ir.Node, before: list[ir.Node], term: ir.Value) -> None:
    """Add `term`, which the nodes `before` make, to a node's result; the sum takes over its name."""
    old = node.outputs[0]
    name, old.name = str(old.name), f"{old.name}_alone"
    total = ir.val(name, dtype=old.dtype, shape=old.shape)
    addition = ir.node("Add", [None, term], name=f"{name}_corrected", outputs=[total])
    old.replace_all_uses_with(total, replace_graph_outputs=True)
    addition.replace_input_with(0, old)
    graph.insert_after(node, [*before, addition])
