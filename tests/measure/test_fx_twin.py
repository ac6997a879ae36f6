"""The differentiable twin computes what ONNX Runtime computes, and its gradients are right."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import BadModel

torch = pytest.importorskip("torch")
from qcompiler.measure.fx_twin import fx_twin  # noqa: E402 - needs torch


def build(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list]],
    constants: dict[str, np.ndarray],
    outputs: list[str],
):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def check(model: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    expected = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    found = fx_twin(ir.from_proto(model))(*[torch.from_numpy(v) for v in feeds.values()])
    assert len(expected) == len(found)
    for a, b in zip(map(np.asarray, expected), (t.detach().numpy() for t in found), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)


def f32(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_convolution_net() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Clip", ["a", "lo", "hi"], ["c"]),
        helper.make_node("Conv", ["c", "w2"], ["d"], group=8, auto_pad="SAME_UPPER", strides=[2, 2]),
        helper.make_node("PRelu", ["d", "slope"], ["e"]),
        helper.make_node("AveragePool", ["e"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("MaxPool", ["e"], ["m"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        helper.make_node("ConvTranspose", ["p", "w3"], ["t"], strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 0]),
        helper.make_node(
            "Resize", ["m", "", "scales"], ["r"], mode="nearest", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        ),
        helper.make_node("GlobalAveragePool", ["t"], ["g"]),
    ]  # fmt: skip
    constants = {"w1": f32(rng, 8, 3, 3, 3), "b1": f32(rng, 8), "lo": np.float32(0), "hi": np.float32(6),
                 "w2": f32(rng, 8, 1, 3, 3), "slope": np.abs(f32(rng, 8, 1, 1)), "w3": f32(rng, 8, 4, 3, 3),
                 "scales": np.array([1, 1, 2, 2], np.float32)}  # fmt: skip
    constants = {k: np.asarray(v) for k, v in constants.items()}
    check(
        build(nodes, {"x": (TensorProto.FLOAT, [2, 3, 18, 22])}, constants, ["g", "r"]), {"x": f32(rng, 2, 3, 18, 22)}
    )


def test_attention_with_rotary_embedding_and_grouped_heads() -> None:
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("RMSNormalization", ["x", "gamma"], ["n"]),
        helper.make_node("MatMul", ["n", "wq"], ["q"]),
        helper.make_node("MatMul", ["n", "wk"], ["k"]),
        helper.make_node("MatMul", ["n", "wv"], ["v"]),
        helper.make_node("RotaryEmbedding", ["q", "cos", "sin", "ids"], ["qr"], num_heads=4),
        helper.make_node("RotaryEmbedding", ["k", "cos", "sin", "ids"], ["kr"], num_heads=2, interleaved=1),
        helper.make_node("Attention", ["qr", "kr", "v"], ["y"], q_num_heads=4, kv_num_heads=2, is_causal=1),
    ]
    angles = rng.uniform(0, 3, (16, 4))
    constants = {"gamma": f32(rng, 16), "wq": f32(rng, 16, 32), "wk": f32(rng, 16, 16), "wv": f32(rng, 16, 16),
                 "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}  # fmt: skip
    ids = np.tile(np.arange(5), (2, 1)).astype(np.int64)
    model = build(nodes, {"x": (TensorProto.FLOAT, [2, 5, 16]), "ids": (TensorProto.INT64, [2, 5])}, constants, ["y"])
    check(model, {"x": f32(rng, 2, 5, 16), "ids": ids}, 1e-4)


def test_shapes_and_indices() -> None:
    rng = np.random.default_rng(2)
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=0, end=2),
        helper.make_node("Concat", ["s", "minus"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Slice", ["flat", "start", "end", "axis", "step"], ["cut"]),
        helper.make_node("Split", ["cut"], ["left", "right"], axis=2, num_outputs=2),
        helper.make_node("Gather", ["left", "picks"], ["picked"], axis=1),
        helper.make_node("ReduceMean", ["right", "axes"], ["mean"], keepdims=0),
        helper.make_node("TopK", ["flat", "two"], ["top", "where"], axis=-1),
        helper.make_node("Unsqueeze", ["mean", "axes"], ["wide"]),
    ]
    constants = {"minus": np.array([-1]), "start": np.array([-1]), "end": np.array([-100]),
                 "axis": np.array([2]), "step": np.array([-2]),
                 "picks": np.array([[0, -1]]), "axes": np.array([1]), "two": np.array([2])}  # fmt: skip
    model = build(nodes, {"x": (TensorProto.FLOAT, ["b", 3, 4, 2])}, constants, ["picked", "wide", "top", "where"])
    check(model, {"x": f32(rng, 2, 3, 4, 2)})


def test_gradients_are_right() -> None:
    rng = np.random.default_rng(3)
    weight = f32(rng, 4, 3)
    model = build(
        [helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Tanh", ["h"], ["y"])],
        {"x": (TensorProto.FLOAT, [5, 4])}, {"w": weight}, ["y"],
    )  # fmt: skip
    twin, x = fx_twin(ir.from_proto(model)), f32(rng, 5, 4)
    twin(torch.from_numpy(x))[0].sum().backward()
    expected = x.T @ (1 - np.tanh(x @ weight) ** 2)
    gradient = dict(twin.named_parameters())["w"].grad
    assert gradient is not None
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_operator_is_named() -> None:
    model = build(
        [helper.make_node("Det", ["x"], ["y"], name="the_det")], {"x": (TensorProto.FLOAT, [3, 3])}, {}, ["y"]
    )
    with pytest.raises(BadModel, match=r"the_det: operator Det has no differentiable form"):
        fx_twin(ir.from_proto(model))
