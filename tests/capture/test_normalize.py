"""After capture the graph computes what the file computed, in one normal form."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest

from qcompiler.capture.onnx import load_onnx, normalize
from qcompiler.errors import BadModel

_spec = importlib.util.spec_from_file_location("capture_models", Path(__file__).with_name("models.py"))
assert _spec is not None
assert _spec.loader is not None
m = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(m)
X = np.random.default_rng(1).standard_normal((3, 200)).astype(np.float32)


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def assert_same(proto: onnx.ModelProto, folder: Path, x: np.ndarray = X) -> ir.Model:
    path = m.saved(proto, folder)
    captured = load_onnx(path).ir
    after = folder / "after.onnx"
    ir.save(captured, after, external_data="after.data")
    for before, now in zip(m.outputs(str(path), {"x": x}), m.outputs(str(after), {"x": x}), strict=True):
        np.testing.assert_allclose(now, before, rtol=1e-4, atol=1e-4)
    onnx.checker.check_model(str(after))
    assert captured.opset_imports[""] >= 21
    return captured


def batchnorm(name: str, channels: int) -> list[onnx.TensorProto]:
    rng = np.random.default_rng(2)
    values = {k: rng.uniform(0.5, 2, channels).astype(np.float32) for k in ("scale", "shift", "mean", "var")}
    return [onnx.numpy_helper.from_array(v, f"{name}.{k}") for k, v in values.items()]


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 17, 18, 20, 21, 23, 26])
def test_every_opset_is_brought_to_at_least_21(opset: int, tmp_path: Path) -> None:
    axes = [] if opset < 13 else [onnx.numpy_helper.from_array(np.array([1]), "axes")]
    squeeze = (
        oh.make_node("Unsqueeze", ["a"], ["b"], axes=[1])
        if opset < 13
        else oh.make_node("Unsqueeze", ["a", "axes"], ["b"])
    )
    nodes = [oh.make_node("MatMul", ["x", "w"], ["a"]), squeeze, oh.make_node("Softmax", ["b"], ["y"], axis=2)]
    captured = assert_same(m.model(nodes, [m.tensor("w", 200, 300), *axes], opset), tmp_path)
    assert captured.opset_imports[""] == max(opset, 21)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_batchnorm_is_folded(op: str, tmp_path: Path) -> None:
    weight = m.tensor("w", 4, 3, 3, 3) if op == "Conv" else m.tensor("w", 3, 4, 3, 3)
    nodes = [
        oh.make_node(op, ["x", "w"], ["a"]),
        oh.make_node("BatchNormalization", ["a", *(f"bn.{k}" for k in ("scale", "shift", "mean", "var"))], ["y"]),
    ]
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
    captured = assert_same(m.model(nodes, [weight, *batchnorm("bn", 4)], 15, ("n", 3, 6, 6)), tmp_path, x)
    assert ops(captured) == {op: 1}


def test_constants_fold_and_noise_nodes_go(tmp_path: Path) -> None:
    nodes = [
        oh.make_node("Constant", [], ["two"], value_float=2.0),
        oh.make_node("Mul", ["two", "c"], ["four"]),
        oh.make_node("Identity", ["x"], ["i"]),
        oh.make_node("Dropout", ["i"], ["d"]),
        oh.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        oh.make_node("MatMul", ["d", "wt"], ["p"]),
        oh.make_node("Relu", ["p"], ["unused"]),
        oh.make_node("Mul", ["p", "four"], ["y"]),
    ]
    constant = onnx.numpy_helper.from_array(np.array(2, np.float32), "c")
    captured = assert_same(m.model(nodes, [m.tensor("w", 300, 200), constant]), tmp_path)
    assert ops(captured) == {"MatMul": 1, "Mul": 1}
    assert all(v.shape is not None for node in captured.graph for v in node.outputs)


def test_folding_never_makes_something_huge(tmp_path: Path) -> None:
    nodes = [
        oh.make_node("Expand", ["one", "shape"], ["big"]),
        oh.make_node("ReduceSum", ["big"], ["s"], keepdims=0),
        oh.make_node("Mul", ["x", "s"], ["y"]),
    ]
    shape = onnx.numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "shape")
    one = onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), "one")
    captured = load_onnx(m.saved(m.model(nodes, [one, shape]), tmp_path)).ir
    assert ops(captured)["Expand"] == 1


def test_constants_that_do_not_fit_are_left_to_the_runtime(tmp_path: Path) -> None:
    nodes = [oh.make_node("MatMul", ["a", "b"], ["c"]), oh.make_node("Add", ["x", "c"], ["y"])]
    weights = [m.tensor("a", 2, 3), m.tensor("b", 4, 5)]
    assert ops(load_onnx(m.saved(m.model(nodes, weights), tmp_path)).ir) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize(("op", "inputs", "attributes"), [("Identity", [], {}), ("Cast", ["x"], {"to": 77})])
def test_invalid_operations_are_refused(op: str, inputs: list[str], attributes: dict[str, Any], tmp_path: Path) -> None:
    nodes = [oh.make_node(op, inputs, ["c"], **attributes), oh.make_node("Relu", ["c"], ["y"])]
    with pytest.raises(BadModel, match="invalid operation"):
        load_onnx(m.saved(m.model(nodes, []), tmp_path))


def test_branches_stay_valid(tmp_path: Path) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        return oh.make_graph([oh.make_node(op, ["p"], [name])], name, [], [oh.make_tensor_value_info(name, 1, None)])

    nodes = [
        oh.make_node("MatMul", ["x", "w"], ["p"]),
        oh.make_node("ReduceSum", ["p"], ["s"], keepdims=0),
        oh.make_node("Greater", ["s", "zero"], ["c"]),
        oh.make_node("If", ["c"], ["y"], then_branch=branch("t", "Identity"), else_branch=branch("e", "Neg")),
    ]
    zero = onnx.numpy_helper.from_array(np.array(0, np.float32), "zero")
    for opset in (13, 21):
        for sign in (1, -1):
            assert_same(m.model(nodes, [m.tensor("w", 200, 300), zero], opset), tmp_path, sign * X)


def test_functions_are_inlined(tmp_path: Path) -> None:
    proto = m.model([oh.make_node("Twice", ["x"], ["y"], domain="d")], [])
    proto.opset_import.append(oh.make_opsetid("d", 1))
    body = [oh.make_node("Add", ["a", "a"], ["b"])]
    proto.functions.append(oh.make_function("d", "Twice", ["a"], ["b"], body, [oh.make_opsetid("", 21)]))
    assert ops(assert_same(proto, tmp_path)) == {"Add": 1}


def test_unknown_operations_pass_through(tmp_path: Path) -> None:
    for opset in (13, 21):
        proto = m.model(
            [oh.make_node("Magic", ["x"], ["a"], domain="some.vendor"), oh.make_node("Relu", ["a"], ["y"])], [], opset
        )
        proto.opset_import.append(oh.make_opsetid("some.vendor", 1))
        assert ops(load_onnx(m.saved(proto, tmp_path)).ir) == {"Magic": 1, "Relu": 1}


def test_module_paths_name_anonymous_weights_and_traces_go(tmp_path: Path) -> None:
    proto = m.linear()
    proto.graph.node[0].metadata_props.add(
        key="pkg.torch.onnx.name_scopes", value="['', 'model', 'model.layers.0.q', 'linear']"
    )
    proto.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/home/someone/secret.py")
    proto.metadata_props.add(key="ort_config", value="{}")
    captured = assert_same(proto, tmp_path)
    assert [v.name for v in captured.graph.initializers.values()] == ["model.layers.0.q.weight"]
    (node,) = captured.graph
    assert node.metadata_props == {"qcompiler.module": "model.layers.0.q"}
    assert not captured.metadata_props


def test_external_data_is_copied_and_lives_as_long_as_a_model_uses_it(tmp_path: Path) -> None:
    path = m.saved(m.linear(), tmp_path, external=True)
    model = load_onnx(path)
    expected = model.graph.initializers["w"].const_value
    assert isinstance(expected, ir.ExternalTensor)
    (tmp_path / "m.data").unlink()
    folder, twin = model.workdir, model.clone()
    assert folder is not None
    kept = Path(str(folder))
    del model, folder
    gc.collect()
    tensor = twin.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().shape == (200, 300)
    del twin, tensor, expected
    gc.collect()
    assert not kept.exists()


def test_a_circle_in_a_graph_made_by_hand_is_refused() -> None:
    a, b = ir.Value(name="a"), ir.Value(name="b")
    one = ir.Node("", "Relu", [a], outputs=[b])
    two = ir.Node("", "Relu", [b], outputs=[a])
    graph = ir.Graph([], [b], nodes=[one, two], opset_imports={"": 21})
    with pytest.raises(BadModel, match="circle"):
        normalize(ir.Model(graph, ir_version=10))


def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:
    """A 200 MB model is captured in a process that never holds it."""
    weight = onnx.numpy_helper.from_array(np.ones((200, 250_000), np.float32), "w")
    path = m.saved(m.model([oh.make_node("MatMul", ["x", "w"], ["y"])], [weight]), tmp_path)
    del weight
    code = (
        "import resource, sys; from pathlib import Path; from qcompiler.capture.onnx import load_onnx;"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; model = load_onnx(Path(sys.argv[1]));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert int(result.stdout) * (1 if sys.platform == "darwin" else 1024) < 120e6


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("stride", "size"), [(1, 11), (1, "side"), (2, 11), (2, 12), (3, 9)])
def test_automatic_padding_becomes_numbers(mode: str, stride: int, size: int | str, tmp_path: Path) -> None:
    conv = oh.make_node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[stride] * 2)
    proto = m.model([conv], [m.tensor("w", 4, 3, 2, 3)], x=("n", 3, size, size))
    side = size if isinstance(size, int) else 10
    captured = assert_same(proto, tmp_path, np.random.default_rng(0).standard_normal((2, 3, side, side), np.float32))
    assert "auto_pad" not in captured.graph[0].attributes


def test_automatic_padding_of_a_dilated_kernel(tmp_path: Path) -> None:
    """ONNX Runtime does not run it as it comes."""
    conv = oh.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", dilations=[1, 3])
    proto = m.model([conv], [m.tensor("w", 4, 3, 2, 3)], x=("n", 3, "h", "w"))
    node = load_onnx(m.saved(proto, tmp_path)).graph[0]
    assert list(node.attributes["pads"].as_ints()) == [0, 3, 1, 3]


def test_padding_that_depends_on_an_unknown_size_stays(tmp_path: Path) -> None:
    conv = oh.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])
    captured = assert_same(
        m.model([conv], [m.tensor("w", 4, 3, 3, 3)], x=("n", 3, "h", "w")), tmp_path, np.ones((1, 3, 7, 8), np.float32)
    )
    assert captured.graph[0].attributes.get_string("auto_pad", "") == "SAME_UPPER"


def test_outputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    proto = m.model([oh.make_node("SplitToSequence", ["x"], ["y"], axis=0)], [])
    proto.graph.output[0].CopyFrom(oh.make_tensor_sequence_value_info("y", onnx.TensorProto.FLOAT, None))
    with pytest.raises(BadModel, match="output 'y' is a sequence"):
        load_onnx(m.saved(proto, tmp_path))


def test_a_step_that_the_libraries_skip_is_not_logged_to_stderr(tmp_path: Path) -> None:
    """An operator of a domain without an opset import: shape inference gives up, and logs a traceback."""
    inputs = [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])]
    outputs = [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    nodes = [oh.make_node("Relu", ["x"], ["h"]), oh.make_node("Mine", ["h"], ["y"], domain="mine")]
    graph = oh.make_graph(nodes, "g", inputs, outputs)
    path = tmp_path / "custom.onnx"
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10), path)
    code = "import sys, qcompiler; print(len(qcompiler.load(sys.argv[1]).graph))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_an_input_that_is_also_an_output_keeps_its_name(tmp_path: Path) -> None:
    proto = m.model([oh.make_node("MatMul", ["x", "w"], ["y"])], [m.tensor("w", 200, 8)])
    proto.graph.output.append(oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 200]))
    captured = assert_same(proto, tmp_path)
    assert [v.name for v in captured.graph.inputs] == ["x"]
    assert [v.name for v in captured.graph.outputs] == ["y", "x"]
    assert ops(captured) == {"MatMul": 1}
