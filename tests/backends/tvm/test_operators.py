"""What target cpu cannot import is said before any work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.errors import BadModel
from qcompiler.progress import Progress, Silent

pytest.importorskip("tvm")


def write(path: Path, node: onnx.NodeProto, opset: int = 21, **shapes: Any) -> Path:
    """x -> MatMul -> one node -> y."""
    rng = np.random.default_rng(0)
    weights = {"w": (8, 8), **shapes}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="product"), node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(rng.standard_normal(s).astype("f"), n) for n, s in weights.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


class Watching(Silent):
    """Fails as soon as something is measured."""

    def note(self, text: str) -> None:
        raise AssertionError(f"work has started: {text}")


def refused(path: Path, progress: Progress, **options: Any) -> str:
    with pytest.raises(BadModel) as caught:
        qcompiler.compile(path, "cpu", output=path.parent / "m.qc", resume=False, progress=progress, **options)
    return str(caught.value)


@pytest.mark.parametrize("explain", [False, True])
def test_operator_without_implementation(explain: bool, tmp_path: Path) -> None:
    node = helper.make_node("LSTM", ["h", "wi", "wr"], ["y"], name="cell", hidden_size=4)
    path = write(tmp_path / "m.onnx", node, wi=(1, 16, 8), wr=(1, 16, 4))
    message = refused(path, Watching(), explain=explain)
    assert message == "m, node 'cell': target cpu has no implementation of LSTM; use --target onnx"


@pytest.mark.parametrize("explain", [False, True])
@pytest.mark.parametrize(
    ("kind", "fix"),
    [("float16", "use --target onnx"), ("float64", "use --target onnx"), ("bfloat16", "convert it to float32")],
)
def test_weights_of_a_type_that_no_kernel_takes(kind: str, fix: str, explain: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", helper.make_node("Relu", ["h"], ["y"]))
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    onnx.save(proto, path)
    message = refused(path, Watching(), explain=explain)
    assert message == f"m: target cpu runs float32 models only; found {kind} in weight 'w'; {fix}"


def test_attention_that_cannot_be_written_out(tmp_path: Path) -> None:
    outputs = ["y", "", "", "products"]
    node = helper.make_node(
        "Attention", ["h", "h", "h"], outputs, name="it", q_num_heads=2, kv_num_heads=2, qk_matmul_output_mode=0
    )
    path = write(tmp_path / "m.onnx", node, opset=23)
    proto = onnx.load(path)
    proto.graph.output.append(helper.make_tensor_value_info("products", TensorProto.FLOAT, None))
    onnx.save(proto, path)
    assert "no implementation of Attention, where its products of queries and keys are an output" in refused(
        path, Watching()
    )


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli"])
def test_random_model(op: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path / "m.onnx", helper.make_node(op, ["h"], ["y"], name="dice")), Watching())
    assert message.startswith(f"m, node 'dice': the model is not deterministic ({op})")


@pytest.mark.parametrize("training", [False, True])
def test_dropout(training: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", helper.make_node("Dropout", ["h", "ratio", "train"], ["y"], name="drop"))
    proto = onnx.load(path)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0.3, "f"), "ratio"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(training), "train"))
    onnx.save(proto, path)
    if training:
        assert "the model is not deterministic (Dropout)" in refused(path, Watching())
    else:
        assert qcompiler.compile(path, "cpu", "9bits", output=tmp_path / "m.qc", resume=False).verified


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.25), (np.nan, None), (None, "input")])
def test_clip(low: float | None, high: float | str | None, tmp_path: Path) -> None:
    """Bounds may be absent, NaN (none, for ONNX Runtime) or computed."""
    names = ["h", "" if low is None else "low", "" if high is None else "high"]
    path = write(tmp_path / "m.onnx", helper.make_node("Clip", names, ["y"], name="clip"))
    proto = onnx.load(path)
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, float):
            proto.graph.initializer.append(numpy_helper.from_array(np.array(bound, "f"), name))
    if high == "input":
        proto.graph.input.append(helper.make_tensor_value_info("high", TensorProto.FLOAT, []))
    onnx.save(proto, path)
    artifact = qcompiler.compile(path, "cpu", "9bits", output=tmp_path / "m.qc", resume=False).artifact
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 2, 8)).astype("f")}
    if high == "input":
        feeds["high"] = np.array(0.25, "f")
    assert artifact is not None
    y = qcompiler.load(artifact).run(feeds)["y"]
    assert np.isfinite(y).all()
    assert (y.min() == -0.5) == (low == -0.5)
    assert (y.max() == 0.25) == (high in (0.25, "input"))
