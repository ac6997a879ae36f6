"""Weights outside the average of bits: named, with the reason and their bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.graph.uncounted import uncounted_weights


def build(nodes: list[onnx.NodeProto], domains: tuple[str, ...] = (), **weights: np.ndarray) -> ir.Model:
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(domain, 1) for domain in domains)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


W = np.ones((4, 4), "f")
MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (MATMUL, {}),
        (helper.make_node("Add", ["x", "w"], ["y"]), {}),
        (helper.make_node("Einsum", ["x", "w"], ["y"], equation="bi,ij->bj"), {"w": "used by Einsum 'y'"}),
        (helper.make_node("MatMul", ["w", "x"], ["y"]), {"w": "left operand"}),
        (helper.make_node("Foo", ["x", "w"], ["y"], domain="my"), {"w": "used by Foo of my 'y'"}),
    ],
)
def test_what_multiplies_in_a_way_of_its_own_is_named(node: onnx.NodeProto, expected: dict[str, str]) -> None:
    found = uncounted_weights(build([node], ("my",), w=W))
    assert [(u.where, u.bytes) for u in found] == [(name, 64) for name in expected]
    assert all(expected[u.where] in u.reason for u in found)


def test_the_weights_of_a_recurrent_layer_are_named_and_its_bias_is_not() -> None:
    node = helper.make_node("LSTM", ["x", "lw", "lr", "lb"], ["y"], hidden_size=2)
    ones: Any = {name: np.ones(shape, "f") for name, shape in {"lw": (1, 8, 3), "lr": (1, 8, 2), "lb": (1, 16)}.items()}
    assert {u.where: u.bytes for u in uncounted_weights(build([node], **ones))} == {"lw": 96, "lr": 64}


def test_weights_in_subgraphs_are_named() -> None:
    def branch(name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        weights = [numpy_helper.from_array(W, f"{name}_w"), numpy_helper.from_array(np.array(2, "f"), f"{name}_two")]
        nodes = [helper.make_node("MatMul", ["x", f"{name}_w"], [f"{name}_h"])]
        nodes.append(helper.make_node("Mul", [f"{name}_h", f"{name}_two"], [f"{name}_y"]))
        return helper.make_graph(nodes, name, [], [output], weights)

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    found = uncounted_weights(build([node], c=np.array(True)))
    assert {u.where for u in found} == {"a_w", "b_w"}
    assert {u.reason for u in found} == {"it lies in a subgraph"}
