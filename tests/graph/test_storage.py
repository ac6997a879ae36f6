"""Embedding tensors for saving leaves their file open to everybody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompiler.graph.storage import embed


def saved_apart(folder: Path) -> ir.Model:
    """y = x + w, then an If whose branches hold constants; all tensors in a file of their own."""
    rng = np.random.default_rng(0)

    def branch(name: str) -> onnx.GraphProto:
        constant = numpy_helper.from_array(rng.standard_normal(64).astype(np.float32), name)
        node = helper.make_node("Constant", [], [name], value=constant)
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64])])

    nodes = [
        helper.make_node("Add", ["x", "w"], ["s"]),
        helper.make_node("If", ["c"], ["t"], then_branch=branch("one"), else_branch=branch("two")),
        helper.make_node("Add", ["s", "t"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [64]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])]
    weight = numpy_helper.from_array(rng.standard_normal(64).astype(np.float32), "w")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(
        proto,
        folder / "m.onnx",
        save_as_external_data=True,
        size_threshold=0,
        convert_attribute=True,
        location="m.data",
    )
    return ir.load(folder / "m.onnx")


def run(path: Path, condition: bool) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.ones(64, np.float32), "c": np.asarray(condition)})[0])


def test_a_saved_model_stands_alone_and_the_original_can_still_be_read(tmp_path: Path) -> None:
    model = saved_apart(tmp_path)
    weight = model.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    view = weight.numpy()  # whoever holds this keeps the file mapped
    (tmp_path / "alone").mkdir()
    path = tmp_path / "alone" / "m.onnx"
    ir.save(embed(model.clone()), path)
    expected = [run(tmp_path / "m.onnx", condition) for condition in (True, False)]
    (tmp_path / "m.data").unlink()
    for condition, want in zip((True, False), expected, strict=True):
        np.testing.assert_array_equal(run(path, condition), want)
    np.testing.assert_array_equal(weight.numpy(), view)
    assert model.graph.initializers["w"].const_value is weight
