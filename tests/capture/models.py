"""Small ONNX models for the capture tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper as oh
import onnxruntime as ort

FLOAT = onnx.TensorProto.FLOAT
RNG = np.random.default_rng(0)


def tensor(name: str, *shape: int) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(RNG.standard_normal(shape, np.float32), name)


def model(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    opset: int = 21,
    x: tuple[int | str, ...] = ("n", 200),
) -> onnx.ModelProto:
    graph = oh.make_graph(
        nodes, "g", [oh.make_tensor_value_info("x", FLOAT, x)], [oh.make_tensor_value_info("y", FLOAT, None)], weights
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10)


def linear(opset: int = 21) -> onnx.ModelProto:
    """x [n, 200] -> MatMul with w [200, 300] -> y. The weight is large enough to leave the message."""
    return model([oh.make_node("MatMul", ["x", "w"], ["y"], "product")], [tensor("w", 200, 300)], opset)


def saved(proto: onnx.ModelProto, folder: Path, external: bool = False) -> Path:
    path = folder / "m.onnx"
    if external:
        onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    else:
        path.write_bytes(proto.SerializeToString())
    return path


def outputs(model_bytes: bytes | str, feeds: dict[str, npt.NDArray[np.generic]]) -> list[npt.NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"]).run(None, feeds)  # type: ignore[return-value]
