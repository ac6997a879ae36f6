"""Unnamed dimensions of a model's inputs get names that say which of them are one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qcompiler.backends.tvm.dimensions import name_dimensions
from qcompiler.calibration import Calibration


def model(**shapes: list[Any]) -> ir.Model:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Sum", list(shapes), ["y"])], "g", inputs, [output])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


def dims(made: ir.Model) -> list[list[Any]]:
    return [[d if isinstance(d, int) else d.value for d in v.shape or ()] for v in made.graph.inputs]


@pytest.mark.parametrize("with_data", [True, False])
def test_two_dimensions_of_one_input_are_two(with_data: bool) -> None:
    made = model(x=[None, None], named=["n", 4])
    arrays = {"x": np.ones((6, 2), "f"), "named": np.ones((6, 4), "f")}  # as wide as a batch of two is long
    name_dimensions(made, Calibration.from_arrays(arrays, made) if with_data else None)
    (first, second), named = dims(made)
    assert first != second
    assert None not in (first, second)
    assert named == ["n", 4]


def test_dimensions_of_two_inputs_are_one_where_they_agree_in_the_data() -> None:
    made = model(ids=[None, None], mask=[None, None], other=[None, None])
    arrays = {name: np.ones((6, 3 + (name == "other")), "f") for name in ("ids", "mask", "other")}
    name_dimensions(made, Calibration.from_arrays(arrays, made))
    ids, mask, other = dims(made)
    assert ids == mask
    assert ids[0] == other[0]
    assert ids[1] != other[1]
