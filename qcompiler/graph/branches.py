"""Corrections of sites: two small products beside a product, whose constants are stored with the site's weight.

They are calls of two model-local functions, by which a backend finds a branch: `qcompiler::LowRankBranchDown(x, down)
-> h` and `qcompiler::LowRankBranchUp(h, up) -> y`. Two, and not one of x, down and up, because sites that read one
value (q, k and v) share h; that is also where kernels cut (SVDQuant's Nunchaku, 2411.05007): "down" goes with reading
and rounding x, "up" with writing the product. Factors of int8 have a step for each direction, which goes with "down":
`qcompiler::LowRankBranchDownSteps(x, down, steps) -> h`. The bodies are standard operations (Cast, Mul, MatMul), which
any runtime and the FX twin inline; the sum is an Add of the graph, which bias corrections and the search of streams
understand.
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

DOWN, DOWN_STEPS, UP = "LowRankBranchDown", "LowRankBranchDownSteps", "LowRankBranchUp"


def add_branch(
    model: ir.Model,
    sites: Sequence[Site],
    lefts: Sequence[npt.NDArray[Any]],
    right: npt.NDArray[Any],
    steps: npt.NDArray[np.float32] | None = None,
) -> None:
    """Take `left @ right` from each weight, and add x right^T left^T behind its operation (and the bias of that).

    The function of the graph stays as it is. The factors are constants of their own type, cast to that of the weight.
    Sites that read the same value share the product x right^T; `right` (and `steps`) is stored with the first of them.

    Args:
        model: float; its graph is changed, and it gets the functions.
        sites: MatMul or Gemm of one user, with a matrix, that read one value; in topological order.
        lefts: float16 or int8 [rows, rank], one a site.
        right: float16 or int8 [rank, columns].
        steps: [rank], by which the rows of `right` are multiplied.
    """
    first, source = sites[0], sites[0].node.inputs[0]
    assert source is not None
    down = _call(model, first, (right.T,) if steps is None else (right.T, steps), source)
    model.graph.insert_before(first.node, down)
    wide = right.astype(np.float32) * (np.float32(1) if steps is None else steps[:, None])
    for site, left in zip(sites, lefts, strict=True):
        _take(site, np.asarray(left.astype(np.float32) @ wide, np.float32))
        up = _call(model, site, (left.T,), down.outputs[0], up=True)
        found = bias_add(site.node) if site.op == "MatMul" else None
        _add_behind(model.graph, site.node if found is None else found[0], up)


def _take(site: Site, product: npt.NDArray[np.float32]) -> None:
    """Take a matrix [rows, columns] from a weight."""
    tensor = site.weight.const_value
    assert tensor is not None
    rest = site.from_matrix((site.matrix() - product).astype(tensor.dtype.numpy()))
    site.weight.const_value = ir.tensor(rest, name=site.weight.name)


def _call(
    model: ir.Model, site: Site, constants: Sequence[npt.NDArray[Any]], value: ir.Value, *, up: bool = False
) -> ir.Node:
    """A node of one product with a factor, not in the graph yet; the constants (factor, steps) belong to the site."""
    dtype, name = site.weight.dtype or ir.DataType.FLOAT, f"{site.weight.name}_branch{int(up)}"
    function = _function(UP if up else DOWN if len(constants) == 1 else DOWN_STEPS, model.graph.opset_imports[""])
    add_function(model, function)
    inputs = [value]
    for array, ending in zip(constants, ("", "_steps"), strict=False):
        constant = ir.val(f"{name}{ending}", const_value=ir.tensor(np.ascontiguousarray(array), name=f"{name}{ending}"))
        constant.metadata_props[BRANCH] = str(site.weight.name)
        model.graph.register_initializer(constant)
        inputs.append(constant)
    shape = None if value.shape is None else ir.Shape([*value.shape[:-1], constants[0].shape[1]])
    output = ir.val(f"{name}_out", dtype=dtype, shape=shape)
    attributes = {"to": dtype.value}
    return ir.node(function.name, inputs, attributes, domain=DOMAIN, name=f"{name}_node", outputs=[output])


def _function(kind: str, opset: int) -> ir.Function:
    """A product with a factor [numbers of x, numbers of y], cast to the element type `to`, which is that of x."""
    if kind != DOWN_STEPS:
        body = "  own = Cast <to : int = @to> (factor)\n  y = MatMul (x, own)"
        return parse_function(f"{kind} <to> (x, factor) => (y)", body, opset)
    body = (
        f"  wide = Cast <to = {ir.DataType.FLOAT.value}> (factor)\n"
        "  exact = Mul (wide, steps)\n  own = Cast <to : int = @to> (exact)\n  y = MatMul (x, own)"
    )
    return parse_function(f"{kind} <to> (x, factor, steps) => (y)", body, opset)


def _add_behind(graph: ir.Graph, node: ir.Node, term: ir.Node) -> None:
    """Add what the node `term` makes to a node's result; the sum takes over its name."""
    old = node.outputs[0]
    name, old.name = str(old.name), f"{old.name}_alone"
    total = ir.val(name, dtype=old.dtype, shape=old.shape)
    addition = ir.node("Add", [None, term.outputs[0]], name=f"{name}_corrected", outputs=[total])
    old.replace_all_uses_with(total, replace_graph_outputs=True)
    addition.replace_input_with(0, old)
    graph.insert_after(node, [term, addition])
