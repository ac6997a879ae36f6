"""Corrections of sites: two small products beside a product, whose constants are stored with the site's weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.folds.region import bias_add
from qcompiler.graph.sites import BRANCH, Site


def add_branch(graph: ir.Graph, site: Site, left: npt.NDArray[Any], right: npt.NDArray[Any]) -> None:
    """Take `left @ right` from the weight of a MatMul or Gemm, and add x right^T left^T behind it (and its bias).

    The function of the graph stays as it is. The factors are constants of their own type, cast to that of the weight.

    Args:
        graph: float.
        site: of one user, a matrix.
        left: float16 [rows, rank].
        right: float16 [rank, columns].
    """
    tensor = site.weight.const_value
    source = site.node.inputs[0]
    assert tensor is not None
    assert source is not None
    product = left.astype(np.float32) @ right.astype(np.float32)
    rest = site.from_matrix((site.matrix() - product).astype(tensor.dtype.numpy()))
    site.weight.const_value = ir.tensor(rest, name=site.weight.name)
    name = str(site.weight.name)
    nodes: list[ir.Node] = []
    value = source
    for number, factor in enumerate((right.T, left.T)):
        constant = _constant(graph, f"{name}_branch{number}", np.ascontiguousarray(factor))
        constant.metadata_props[BRANCH] = name
        cast = _node("Cast", [constant], f"{name}_branch{number}_cast", tensor.dtype, constant.shape)
        cast.attributes["to"] = ir.AttrInt64("to", tensor.dtype.value)
        shape = None if source.shape is None else ir.Shape([*source.shape[:-1], factor.shape[1]])
        nodes += [cast, _node("MatMul", [value, cast.outputs[0]], f"{name}_branch{number}_out", tensor.dtype, shape)]
        value = nodes[-1].outputs[0]
    found = bias_add(site.node) if site.op == "MatMul" else None
    _add_behind(graph, site.node if found is None else found[0], nodes, value)


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
