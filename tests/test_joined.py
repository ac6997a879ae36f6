"""`qcompile run` on several batches: every output whole, with the samples first, or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.artifact.joined import run_all
from qcompiler.calibration import Calibration
from qcompiler.errors import BadData
from qcompiler.measure.runner import Runner
from qcompiler.progress import Silent

OUTPUTS: dict[str, tuple[list[Any], list[Any]]] = {
    "double": (["Add", "x", "x"], ["n", 4]),
    "table": (["Identity", "w"], [4, 3]),
    "total": (["ReduceSum", "x"], []),
    "flat": (["Reshape", "x", "line"], [None]),
    "pairs": (["MatMul", "turned", "x"], [4, 4]),
    "width": (["Shape", "turned"], [2]),
}


def model(batch: int | str | None, *outputs: str) -> ir.Model:
    """x [batch, 4] -> the named outputs; `turned` is x transposed."""
    wanted = {name: OUTPUTS[name] for name in outputs}
    nodes = [helper.make_node("Transpose", ["x"], ["turned"])]
    for name, ((op, *inputs), _) in wanted.items():
        options: dict[str, Any] = {"keepdims": 0} if op == "ReduceSum" else {}
        nodes.append(helper.make_node(op, inputs, [name], **options))
    kinds = {"width": TensorProto.INT64}
    constants = {"w": np.arange(12, dtype="f").reshape(4, 3), "line": np.array([-1])}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, (_, s) in wanted.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


X = np.random.default_rng(0).normal(size=(10, 4)).astype("f")


def run(made: ir.Model, batch: int, x: np.ndarray = X) -> dict[str, np.ndarray]:
    artifact: Any = SimpleNamespace(run=Runner(made))
    return run_all(artifact, made, Calibration.from_arrays({"x": x}, made), batch, Silent())


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 10])
@pytest.mark.parametrize("dim", ["n", None])
def test_samples_first_or_whole_whatever_the_batch(batch: int, dim: str | None) -> None:
    """A table with as many rows as the batch, and a last batch that may be smaller, are no trap."""
    found = run(model(dim, "double", "table"), batch)
    np.testing.assert_array_equal(found["double"], 2 * X)
    np.testing.assert_array_equal(found["table"], np.arange(12).reshape(4, 3))


@pytest.mark.parametrize("name", ["total", "flat", "pairs", "width"])
def test_what_mixes_the_samples_is_refused_unless_they_run_at_once(name: str) -> None:
    made = model("n", "double", name)
    with pytest.raises(BadData, match=f"--batch: output '{name}' .* no entry for each sample.*--batch all"):
        run(made, 3)
    expected = {"total": X.sum(), "flat": X.ravel(), "pairs": X.T @ X, "width": [4, 10]}[name]
    np.testing.assert_allclose(run(made, 10)[name], expected, rtol=1e-5)


def test_a_model_for_one_sample_gives_one_entry_a_sample() -> None:
    found = run(model(1, "double", "total", "flat", "table"), 8)
    np.testing.assert_array_equal(found["double"], 2 * X)
    np.testing.assert_allclose(found["total"], X.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(found["flat"], X)
    assert found["table"].shape == (4, 3)


def test_a_model_for_several_samples_gets_the_last_batch_filled_up() -> None:
    np.testing.assert_array_equal(run(model(4, "double"), 8)["double"], 2 * X)
    with pytest.raises(BadData, match="give 4 samples, as many as the model takes"):
        run(model(4, "total"), 8)
    np.testing.assert_allclose(run(model(4, "total"), 8, X[:4])["total"], X[:4].sum(), rtol=1e-5)
    with pytest.raises(BadData, match="output 'total'"):  # two samples are filled up to four: theirs is no total
        run(model(4, "total"), 8, np.concatenate([X[:4], X[:2]]))


def test_stacked_samples_are_stacked_again() -> None:
    found = run(model("n", "double", "total", "table"), 8, X.reshape(5, 2, 4))
    np.testing.assert_array_equal(found["double"], 2 * X.reshape(5, 2, 4))
    np.testing.assert_allclose(found["total"], X.reshape(5, 8).sum(1), rtol=1e-5)
    assert found["table"].shape == (4, 3)
