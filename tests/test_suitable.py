"""Models that cannot be compiled at all are told so before any work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from qcompiler.build.suitable import check_suitable
from qcompiler.errors import BadModel
from qcompiler.model import Model


def test_a_model_without_inputs_has_nothing_to_compile() -> None:
    weights = [numpy_helper.from_array(np.eye(4, dtype="f"), name) for name in "vw"]
    output = helper.make_tensor_value_info("y", 1, [4, 4])
    graph = helper.make_graph([helper.make_node("MatMul", ["v", "w"], ["y"])], "g", [], [output], weights)
    model = Model(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])), "constant")
    backend: Any = SimpleNamespace()
    with pytest.raises(BadModel, match=r"^constant: the model has no inputs: its outputs are constants"):
        check_suitable(model, backend)
