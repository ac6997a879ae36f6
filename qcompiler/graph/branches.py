"""Corrections of sites: two small products beside a product, whose constants are stored with the site's weight.

They are calls of two model-local functions, by which a backend finds a branch: `qcompiler::LowRankBranchDown(x, down)
-> h` and `qcompiler::LowRankBranchUp(h, up) -> y`. Two, and not one of x, down and up, because sites that read one
value (q, k and v) share h; that is also where kernels cut (SVDQuant's Nunchaku, 2411.05007): "down" goes with reading
and rounding x, "up" with writing the product. Their bodies are standard operations (Cast, MatMul), which any runtime
and the FX twin inline; the sum is an Add of the graph, which bias corrections and the search of streams understand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.codes import DOMAIN
from qcompiler.graph.folds.region import bias_add
from qcompiler.graph.functions import add_function, parse_function
from qcompiler.graph.sites import BRANCH, Site

DOWN, UP = "LowRankBranchDown", "LowRankBranchUp"


def add_branch(
    model: ir.Model, sites: Sequence[Site], lefts: Sequence[npt.NDArray[Any]], right: npt.NDArray[Any]
) -> None:
    """Take `left @ right` from each weight, and add x right^T left^T behind its operation (and the bias of that).

    The function of the graph stays as it is. The factors are constants of their own type, cast to that of the weight.
    Sites that read the same value share the product x right^T; `right` is stored with the first of them.

    Args:
        model: float; its graph is changed, and it gets the functions.
        sites: MatMul or Gemm of one user, with a matrix, that read one value; in topological order.
        lefts: float16 [rows, rank], one a site.
        right: float16 [rank, columns].
    """
    first, source = sites[0], sites[0].node.inputs[0]
    assert source is not None
    for kind in (DOWN, UP):
        add_function(model, _function(kind, model.graph.opset_imports[""]))
    down = _factor(model.graph, first, DOWN, right.T, source)
    model.graph.insert_before(first.node, down)
    for site, left in zip(sites, lefts, strict=True):
        _take(site, left.astype(np.float32) @ right.astype(np.float32))
        up = _factor(model.graph, site, UP, left.T, down.outputs[0])
        found = bias_add(site.node) if site.op == "MatMul" else None
        _add_behind(model.graph, site.node if found is None else found[0], up)


def _take(site: Site, product: npt.NDArray[np.float32]) -> None:
    """Take a matrix [rows, columns] from a weight."""
    tensor = site.weight.const_value
    assert tensor is not None
    rest = site.from_matrix((site.matrix() - product).astype(tensor.dtype.numpy()))
    site.weight.const_value = ir.tensor(rest, name=site.weight.name)


def _function(kind: str, opset: int) -> ir.Function:
    """A product with a factor [numbers of x, numbers of y], cast to the element type `to`, which is that of x."""
    body = "  wide = Cast <to : int = @to> (factor)\n  y = MatMul (x, wide)"
    return parse_function(f"{kind} <to> (x, factor) => (y)", body, opset)


def _factor(graph: ir.Graph, site: Site, kind: str, matrix: npt.NDArray[Any], value: ir.Value) -> ir.Node:
    """The node of value @ matrix, not in the graph yet; the matrix is a constant that belongs to the site."""
    dtype, name = site.weight.dtype or ir.DataType.FLOAT, f"{site.weight.name}_branch{(DOWN, UP).index(kind)}"
    constant = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(matrix), name=name))
    constant.metadata_props[BRANCH] = str(site.weight.name)
    graph.register_initializer(constant)
    shape = None if value.shape is None else ir.Shape([*value.shape[:-1], matrix.shape[1]])
    output = ir.val(f"{name}_out", dtype=dtype, shape=shape)
    attributes = {"to": dtype.value}
    return ir.node(kind, [value, constant], attributes, domain=DOMAIN, name=f"{name}_node", outputs=[output])


def _add_behind(graph: ir.Graph, node: ir.Node, term: ir.Node) -> None:
    """Add what the node `term` makes to a node's result; the sum takes over its name."""
    old = node.outputs[0]
    name, old.name = str(old.name), f"{old.name}_alone"
    total = ir.val(name, dtype=old.dtype, shape=old.shape)
    addition = ir.node("Add", [None, term.outputs[0]], name=f"{name}_corrected", outputs=[total])
    old.replace_all_uses_with(total, replace_graph_outputs=True)
    addition.replace_input_with(0, old)
    graph.insert_after(node, [term, addition])
