"""Explicit rotations of queries and keys, which cancel in their product: for keys that are kept in few bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.errors import Refusal
from qcompiler.graph.folds.region import resolve
from qcompiler.graph.online import insert_turn
from qcompiler.passes.transform.inner_rotation import kronecker

Facts = dict[str, dict[str, Any]]


def turn_keys(model: ir.Model, seed: int) -> tuple[Facts, list[Refusal]]:
    """Multiply queries and keys by one orthogonal matrix a head, behind rotary embeddings, where the graph runs.

    Source: R3 of SpinQuant (2405.16406) and QuaRot (2404.00456).

    Args:
        model: whose graph is changed.
        seed: of the signs.

    Returns:
        Facts by the name of the keys, and why an attention is left alone.
    """
    facts: Facts = {}
    refused: list[Refusal] = []
    for node in list(model.graph):
        found = _fused(node) if node.op_type == "Attention" and not node.domain else _written_out(node)
        if isinstance(found, Refusal):
            refused.append(found)
        elif found is not None:
            width, places = found
            for user, index, heads in places:
                value = user.inputs[index]
                assert value is not None
                user.replace_input_with(index, insert_turn(model, value, kronecker(width, seed, heads)))
            facts[node.name or node.outputs[0].name or "?"] = {"width": width}
    return facts, refused


_Places = tuple[int, list[tuple[ir.Node, int, int]]]  # width of a head; operands, each with the heads side by side


def _written_out(node: ir.Node) -> _Places | None:
    """MatMul of two computed values of which the second is transposed, perhaps scaled after that."""
    if node.op_type != "MatMul" or any(v is None or resolve(v) is not None for v in node.inputs):
        return None
    width, turned = _last(node.inputs[0]), _alone(node.inputs[1])
    while turned is not None and turned.op_type in ("Mul", "Div"):
        factor = turned.inputs[1]
        if factor is None or factor.const_value is None or factor.const_value.size != 1:
            return None
        turned = _alone(turned.inputs[0])
    if turned is None or turned.op_type != "Transpose" or width is None or width < 2:
        return None
    perm = turned.attributes.get_ints("perm", [])
    # What was the last axis is what the product sums over.
    fits = len(perm) > 1 and perm[-2] == len(perm) - 1 and _last(turned.inputs[0]) == width
    return (width, [(node, 0, 1), (turned, 0, 1)]) if fits else None


def _alone(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that has one user."""
    return None if value is None or len(value.uses()) > 1 or value.is_graph_output() else value.producer()


def _last(value: ir.Value | None) -> int | None:
    """The length of the last axis, if it is known."""
    length = None if value is None or not value.shape else value.shape[-1]
    return length if isinstance(length, int) else None


def _fused(node: ir.Node) -> _Places | Refusal:
    """Attention of opset 23, unless keys go in or out of it by a cache."""
    name = node.name or node.outputs[0].name or "?"
    cached = any(len(node.inputs) > k and node.inputs[k] is not None for k in (4, 5))
    if cached or any(v.uses() or v.is_graph_output() for v in node.outputs[1:3]):
        return Refusal(name, "a cache holds keys that others see")
    query = node.inputs[0]
    width = _last(query)
    if query is None or query.shape is None or width is None:
        return Refusal(name, "the size of its heads is unknown")
    if len(query.shape) == 4:
        return width, [(node, 0, 1), (node, 1, 1)]
    heads = [node.attributes.get_int(key, 0) for key in ("q_num_heads", "kv_num_heads")]
    if not np.all(heads):
        return Refusal(name, "the number of its heads is unknown")
    return width // heads[0], [(node, 0, heads[0]), (node, 1, heads[1])]
