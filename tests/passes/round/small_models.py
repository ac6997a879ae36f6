"""Small graphs with random weights, and calibration data for them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompiler.calibration import Calibration
from qcompiler.formats import QuantSpec, parse_spec
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.plan import ActivationMode, Plan, SitePlan
from qcompiler.progress import Silent


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    inputs: dict[str, list[int | str]],
    outputs: list[str],
    data: dict[str, np.ndarray],
) -> Model:
    kinds = {k: TensorProto.INT64 if v.dtype == np.int64 else TensorProto.FLOAT for k, v in data.items()}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(k, kinds[k], shape) for k, shape in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, None) for k in outputs],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto)
    model = ir.from_proto(proto)
    return Model(model, "small", Calibration.from_arrays(data, model))


def mlp(samples: int = 48, seed: int = 0) -> Model:
    """x [batch, 5, 24] -> MatMul 48, Relu, MatMul 16; inputs with correlated channels and a large mean."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((24, 24)) * np.geomspace(0.05, 3, 24)[:, None]
    x = (rng.standard_normal((samples, 5, 24)) @ mix + 1).astype(np.float32)
    weights = {
        "fc1.weight": rng.standard_normal((24, 48)).astype(np.float32) / 5,
        "fc2.weight": rng.standard_normal((48, 16)).astype(np.float32) / 7,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "fc1.weight"], ["h"], name="fc1"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "fc2.weight"], ["y"], name="fc2"),
    ]
    return build(nodes, weights, {"x": ["batch", 5, 24]}, ["y"], {"x": x})


def cnn(samples: int = 24, seed: int = 0) -> Model:
    """Two convolutions with Clip(0, 6), one depthwise, a residual addition, pooling, a Gemm."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, 3, 12, 12)).astype(np.float32)
    weights = {
        "c1.weight": rng.standard_normal((8, 3, 3, 3)).astype(np.float32) / 3,
        "c1.bias": rng.standard_normal(8).astype(np.float32),
        "dw.weight": rng.standard_normal((8, 1, 3, 3)).astype(np.float32) / 2,
        "c2.weight": rng.standard_normal((8, 8, 1, 1)).astype(np.float32) / 2,
        "fc.weight": rng.standard_normal((5, 8)).astype(np.float32),
        "fc.bias": rng.standard_normal(5).astype(np.float32),
        "low": np.array(0, np.float32),
        "high": np.array(6, np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "c1.weight", "c1.bias"], ["a"], name="c1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Clip", ["a", "low", "high"], ["b"], name="clip1"),
        node("Conv", ["b", "dw.weight"], ["c"], name="dw", pads=[1, 1, 1, 1], group=8),
        node("Clip", ["c", "low", "high"], ["d"], name="clip2"),
        node("Conv", ["d", "c2.weight"], ["e"], name="c2"),
        node("Add", ["b", "e"], ["f"], name="add"),
        node("GlobalAveragePool", ["f"], ["g"], name="pool"),
        node("Flatten", ["g"], ["h"], name="flat"),
        node("Gemm", ["h", "fc.weight", "fc.bias"], ["y"], name="fc", transB=1),
    ]
    return build(nodes, weights, {"x": ["batch", 3, 12, 12]}, ["y"], {"x": x})


def planned(model: Model, spec: str | QuantSpec, activation: ActivationMode = "float") -> Model:
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    model.plan = Plan({site.name: SitePlan(spec, activation) for site in find_sites(model.ir)})
    return model


def relative_error(model: Model) -> float:
    """Of a rounded model when it is lowered, on its calibration data: squares relative to the power of the output."""
    assert model.calibration is not None
    lowered = model.clone()
    InsertQDQ().run(lowered, Silent())
    exact, found = Runner(model.ir), Runner(lowered.ir)
    pairs = [(*exact(feed).values(), *found(feed).values()) for feed in model.calibration.batches(16)]
    return sum(float(np.square(a - b).sum()) for a, b in pairs) / sum(float(np.square(a).sum()) for a, _ in pairs)
