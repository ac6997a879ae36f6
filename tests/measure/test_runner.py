from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qcompiler.errors import BadData, BadModel
from qcompiler.measure import runner
from qcompiler.measure.runner import Runner
from qcompiler.scratch import map_of

RNG = np.random.default_rng(0)


def build(nodes, inputs, outputs, initializers, functions=(), opsets=(("", 21),)) -> ir.Model:
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializers)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))
    return ir.from_proto(proto)


def value(name: str, shape, kind: int = TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, array):
    return onnx.numpy_helper.from_array(np.asarray(array), name)


def two_layers(size: int = 300) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    a = RNG.standard_normal((size, size), dtype=np.float32)
    b = RNG.standard_normal((size, 5), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    model = build(nodes, [value("x", ["n", size])], [value("y", ["n", 5])], [constant("a", a), constant("b", b)])
    return model, a, b


def test_intermediate_values_and_passed_through_inputs() -> None:
    model, a, b = two_layers()
    x = RNG.standard_normal((4, 300), dtype=np.float32)
    found = Runner(model, outputs=["h", "x", "y", "h"])({"x": x, "ignored": x})
    assert list(found) == ["h", "x", "y"]
    np.testing.assert_allclose(found["h"], x @ a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["y"], np.maximum(x @ a, 0) @ b, rtol=1e-4, atol=1e-3)
    assert found["x"] is x
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_a_part_of_the_graph_needs_only_its_own_inputs() -> None:
    model, _, b = two_layers()
    h = RNG.standard_normal((3, 300), dtype=np.float32)
    runner = Runner(model, inputs=["h"], outputs=["y"], dtypes={"h": np.dtype(np.float32)})
    assert runner.inputs == ("h",)
    np.testing.assert_allclose(runner({"h": h})["y"], np.maximum(h, 0) @ b, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="not properly bounded"):
        Runner(model, inputs=["r"], outputs=["h"])


def test_large_weights_are_let_go_while_they_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, a, _ = two_layers()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    saved = ir.load(tmp_path / "m.onnx")
    x = RNG.standard_normal((4, 300), dtype=np.float32)
    wanted = Runner(saved)({"x": x})
    forgotten: list[int] = []
    real = runner.forgetting

    def counting(seconds: float, arrays: Collection[np.ndarray]) -> AbstractContextManager[None]:
        forgotten.append(sum(map_of(array) is not None for array in arrays))
        return real(seconds, arrays)

    monkeypatch.setattr(runner, "forgetting", counting)
    monkeypatch.setattr(runner, "_LARGE", a.nbytes)
    found = Runner(saved)({"x": x})
    assert forgotten == [1]  # the other one is stored in the session
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_weights_can_be_replaced_for_one_call() -> None:
    model, a, b = two_layers()
    x = RNG.standard_normal((4, 300), dtype=np.float32)
    runner = Runner(model, replaceable=["b"])
    assert runner.replaceable == {"a", "b"}  # a is large, so it is fed anyway
    before = runner({"x": x})["y"]
    changed = runner({"x": x, "b": b * 2, "a": a})["y"]
    np.testing.assert_allclose(changed, before * 2, rtol=1e-5)
    np.testing.assert_array_equal(runner({"x": x})["y"], before)
    with pytest.raises(ValueError, match="not an initializer"):
        Runner(model, replaceable=["h"])


@pytest.mark.parametrize(("kind", "low", "high"), [("INT8", -128, 127), ("UINT4", 0, 15), ("INT4", -8, 7)])
def test_quantized_products_are_exact(kind: str, low: int, high: int) -> None:
    """ONNX Runtime by itself rounds activations to int8 here: relative error 5e-3."""
    size = 128
    codes = RNG.integers(low, high + 1, (size, 64))
    scale = RNG.uniform(0.01, 0.02, (size // 32, 64)).astype(np.float32)
    types = {"INT8": np.int8, "UINT4": ml_dtypes.uint4, "INT4": ml_dtypes.int4}
    stored = ir.tensor(codes.astype(types[kind]), dtype=ir.DataType[kind], name="q")
    dq = helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=32)
    nodes = [dq, helper.make_node("MatMul", ["x", "w"], ["y"])]
    tensors = [ir.to_proto(stored), constant("s", scale)]
    model = build(nodes, [value("x", ["n", size])], [value("y", ["n", 64])], tensors)
    x = RNG.standard_normal((8, size), dtype=np.float32)
    expected = x.astype(np.float64) @ (codes * np.repeat(scale, 32, 0).astype(np.float64))
    found = Runner(model)({"x": x})["y"]
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def test_static_activation_quantization_is_not_fused() -> None:
    size = 64
    w, x = RNG.integers(-127, 128, (size, 8)).astype(np.int8), RNG.standard_normal((50, size)).astype(np.float32)
    scales = [constant("sx", np.float32(0.03)), constant("sw", np.float32(0.01)), constant("sy", np.float32(0.05))]
    zero = [constant("z", np.uint8(128)), constant("w", w)]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "sx", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "sw"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "sy", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "sy", "z"], ["out"]),
    ]
    model = build(nodes, [value("x", ["n", size])], [value("out", ["n", 8])], [*scales, *zero])
    rounded = (np.clip(np.rint(x / np.float32(0.03)) + 128, 0, 255) - 128) * 0.03
    found = Runner(model, outputs=["y"])({"x": x})["y"]
    expected = rounded @ (w * 0.01)
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def test_model_local_functions_run() -> None:
    body = [helper.make_node("Mul", ["a", "a"], ["b"])]
    function = helper.make_function("qcompiler", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    nodes = [helper.make_node("Square", ["x"], ["y"], domain="qcompiler")]
    model = build(nodes, [value("x", ["n"])], [value("y", ["n"])], [], [function], (("", 21), ("qcompiler", 1)))
    np.testing.assert_array_equal(Runner(model)({"x": np.array([2, 3], np.float32)})["y"], [4, 9])


def test_weights_in_files_are_found_from_any_folder(tmp_path: Path) -> None:
    model, a, b = two_layers()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")
    x = RNG.standard_normal((2, 300), dtype=np.float32)
    found = Runner(ir.load(tmp_path / "m.onnx"))({"x": x})["y"]
    np.testing.assert_allclose(found, np.maximum(x @ a, 0) @ b, rtol=1e-4, atol=1e-3)


def test_what_onnx_runtime_refuses_is_a_bad_model() -> None:
    model = build([helper.make_node("Nonsense", ["x"], ["y"], name="odd")], [value("x", [1])], [value("y", [1])], [])
    with pytest.raises(BadModel, match="Nonsense"):
        Runner(model)


def test_wrong_inputs_are_bad_data() -> None:
    runner = Runner(two_layers()[0])
    with pytest.raises(BadData, match="no input 'x'"):
        runner({"z": np.zeros(3, np.float32)})
    with pytest.raises(BadData, match="cannot take this input"):
        runner({"x": np.zeros((2, 7), np.float32)})


def test_replaced_weights_are_cast_to_the_type_of_the_graph() -> None:
    w = RNG.standard_normal((6, 4)).astype(np.float16)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    half = TensorProto.FLOAT16
    model = build([node], [value("x", ["n", 6], half)], [value("y", ["n", 4], half)], [constant("w", w)])
    found = Runner(model, replaceable=["w"])({"x": np.eye(6, dtype=np.float16), "w": 2 * w.astype(np.float32)})["y"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, 2 * w)


def test_no_usage_is_reported(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry writes its session file when it starts; compiling must never reach the network."""
    code = "import qcompiler.measure.runner"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not list(tmp_path.iterdir())
