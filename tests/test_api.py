"""compile, load and the pieces they are made of, from Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler as qc
from qcompiler.backends.onnx.backend import OnnxBackend
from qcompiler.backends.tvm.backend import CpuBackend
from qcompiler.build.memory import expected_peak
from qcompiler.build.recipe import Options, build_pipeline, default_recipe, fill, recipes
from qcompiler.build.samples import Source, gather
from qcompiler.errors import BadModel, BadOption, MissingExtra
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.equalize_activations import EqualizeActivations
from qcompiler.progress import Silent

PIPELINE = """
[[pass]]
name = "allocate"

[[pass]]
name = "gptq"

[[pass]]
name = "insert-qdq"
"""


def write_model(path: Path, *, conv: bool = False) -> Path:
    rng = np.random.default_rng(0)
    if conv:
        weights = {"w": rng.normal(size=(8, 3, 3, 3)).astype("f")}
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
        shapes = ["n", 3, 8, 8], ["n", 8, 8, 8]
    else:
        weights = {f"w{i}": rng.normal(size=(32, 32)).astype("f") / 4 for i in range(4)}
        names = ["x", "a", "b", "c", "y"]
        nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(4)]
        shapes = ["n", 32], ["n", 32]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes[1])],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mixed.toml").write_text(PIPELINE)
    return write_model(tmp_path / "chain.onnx")


def batches(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(4, 32)).astype("f")} for _ in range(count)]


def test_one_mapping_of_arrays_is_data_too(work: Path) -> None:
    arrays = {"x": np.concatenate([batch["x"] for batch in batches()])}
    result = qc.compile(work, "onnx", "4.6bits", arrays, "mixed.toml", activations="float", explain=True)
    assert result.bits_per_weight is not None
    assert result.predicted_loss is not None


def test_compile_meets_the_budget_and_remembers_how(work: Path) -> None:
    result = qc.compile(work, "onnx", "4.6bits", batches(), "mixed.toml", activations="float")
    assert result.artifact == Path("chain.qc")
    assert result.bits_per_weight is not None
    assert 4 < result.bits_per_weight <= 4.6
    assert result.lower_bound is not None
    assert result.predicted_loss is not None
    assert result.lower_bound <= result.predicted_loss
    manifest = qc.load("chain.qc").manifest
    assert manifest["bits_per_weight"] == result.bits_per_weight
    assert manifest["budget"] == ["4.6bits"]
    assert manifest["original"]["path"] == str(work)
    assert manifest["calibration"]["samples"] + manifest["calibration"]["held_back"] == 24
    assert set(manifest["files"]) >= {"model.onnx", "report.html"}
    assert {v["inputs"] for v in manifest["verification"]} == {"calibration", "random", "held back"}


def test_the_budget_holds_in_the_file(work: Path) -> None:
    """Counted independently: the bytes of every initializer in model.onnx."""
    result = qc.compile(work, "onnx", "6bits", batches(), "mixed.toml", activations="float")
    model = onnx.load("chain.qc/model.onnx")
    four = (TensorProto.INT4, TensorProto.UINT4)
    size = 0
    for tensor in model.graph.initializer:
        count = int(np.prod(tensor.dims))
        one = 0.5 if tensor.data_type in four else numpy_helper.to_array(tensor).dtype.itemsize
        size += int(np.ceil(count * one))
    assert size * 8 / (4 * 32 * 32) <= 6 + 0.1  # scalars of shape arithmetic are no weights
    assert result.stored_bytes <= size <= result.stored_bytes + 64


def test_the_model_that_is_given_is_not_changed(work: Path) -> None:
    model = qc.load(work)
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    nodes = [node.op_type for node in model.graph]
    qc.compile(model, "onnx", "5bits", batches(), "mixed.toml", output="a.qc", activations="float")
    assert not model.lowered
    assert not model.plan.sites
    assert [node.op_type for node in model.graph] == nodes
    for name, array in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def test_the_same_call_gives_the_same_codes(work: Path) -> None:
    import hashlib

    digests = []
    for name, resume in (("a.qc", True), ("b.qc", True), ("c.qc", False)):
        qc.compile(work, "onnx", "5bits", batches(), "mixed.toml", output=name, resume=resume, activations="float")
        digests.append(hashlib.sha256(Path(name, "model.onnx").read_bytes()).hexdigest())
    assert len(set(digests)) == 1


def test_the_artifact_is_close_to_the_original_and_more_bits_are_closer(work: Path) -> None:
    found = []
    for budget in ("4.6bits", "8.6bits"):
        result = qc.compile(work, "onnx", budget, batches(), "mixed.toml", output="a.qc", activations="float")
        found.append(result.fidelity["sqnr_db"])
    assert found[0] is not None
    assert found[1] is not None
    assert found[1] > found[0] + 10


def test_explain_plans_and_writes_nothing(work: Path) -> None:
    result = qc.compile(work, "onnx", "5bits", batches(), "mixed.toml", explain=True, activations="float")
    assert result.artifact is None
    assert not Path("chain.qc").exists()
    assert len(result.plan.sites) == 4
    assert result.peak_rss_bytes > 100_000_000


def test_expected_memory_is_about_what_it_takes(work: Path) -> None:
    """In processes of their own: what this one has held by now would count."""
    code = "import qcompiler as qc; print(qc.compile('chain.onnx', 'onnx', '5bits', explain={}).peak_rss_bytes)"
    expected, actual = (
        int(
            subprocess.run(
                [sys.executable, "-c", code.format(explain)], capture_output=True, text=True, check=True
            ).stdout
        )
        for explain in (True, False)
    )
    assert expected == pytest.approx(actual, rel=0.3)


def test_expected_memory_counts_what_the_target_adds(work: Path) -> None:
    model, backend = qc.load(work), SimpleNamespace(program_bytes=10**9)
    alone = expected_peak(model, {}, SimpleNamespace())  # type: ignore[arg-type]
    assert expected_peak(model, {}, backend) == alone + 10**9  # type: ignore[arg-type]
    assert CpuBackend.program_bytes > OnnxBackend.program_bytes > 0


def test_load_tells_models_from_artifacts(work: Path) -> None:
    assert isinstance(qc.load(work), qc.Model)
    with pytest.raises(BadModel):
        qc.load(work.parent)


def test_recipes_are_complete_and_valid() -> None:
    from qcompiler import registry

    assert recipes() == ["convolutional", "decoder", "encoder", "int8", "quick", "w4a4", "w4a8"]
    from importlib import resources

    for name in recipes():
        text = (resources.files("qcompiler.passes") / "recipes" / f"{name}.toml").read_text()
        names = [line.split('"')[1] for line in text.splitlines() if line.startswith("name")]
        assert names[-1] == "insert-qdq"
        assert set(names) <= set(registry.names("passes"))


def test_the_default_recipe_follows_the_model(work: Path) -> None:
    assert default_recipe(qc.load(work)) == "encoder"
    assert default_recipe(qc.load(write_model(work.with_name("conv.onnx"), conv=True))) == "convolutional"


def test_options_reach_every_pass_that_has_them() -> None:
    options = Options(
        "onnx", ("3bits", "1MB"), ("w*",), 0, "float", frozenset({"target", "budget", "keep", "activations"})
    )
    filled = fill(qc.Pipeline([Allocate(target="cpu")]), options).passes[0]
    assert isinstance(filled, Allocate)
    assert filled == Allocate(budget=("3bits", "1MB"), target="onnx", keep=("w*",), activations="float")


def test_what_a_pipeline_says_stays_unless_the_user_says_otherwise() -> None:
    options = Options("onnx", given=frozenset({"target"}))
    filled = fill(qc.Pipeline([Allocate(budget=("3bits",), activations="static", keep=("a",))]), options).passes[0]
    assert filled == Allocate(budget=("3bits",), activations="static", keep=("a",), target="onnx")


def test_an_option_that_nothing_takes_is_refused(work: Path) -> None:
    options = Options("onnx", ("3bits",), given=frozenset({"target", "budget"}))
    with pytest.raises(BadOption, match="--budget"):
        build_pipeline(qc.Pipeline([EqualizeActivations(), Nearest()]), qc.load(work), options)


@pytest.mark.parametrize(("count", "used", "held"), [(1, 1, 1), (3, 3, 3), (4, 2, 2), (24, 21, 3), (1000, 875, 125)])
def test_an_eighth_is_held_back(work: Path, count: int, used: int, held: int) -> None:
    data = np.random.default_rng(0).normal(size=(count, 32)).astype("f")
    samples = gather(Source([{"x": data}]), qc.load(work), 0, Silent())
    assert (samples.used.count, samples.held.count) == (used, held)
    if count >= 4:
        seen = np.concatenate([feed["x"] for part in (samples.used, samples.held) for feed in part.batches(8)])
        np.testing.assert_array_equal(seen, data)


@pytest.mark.parametrize(("count", "held_back"), [(1, 0), (3, 0), (4, 2)])
def test_figures_taken_on_the_calibration_data_are_called_so(work: Path, count: int, held_back: int) -> None:
    notes: list[str] = []
    listening = type("Listening", (Silent,), {"note": lambda self, text: notes.append(text)})()
    data = [{"x": np.random.default_rng(2).normal(size=(count, 32)).astype("f")}]
    result = qc.compile(work, "onnx", "5bits", data, "mixed.toml", progress=listening)
    manifest, page = qc.load("chain.qc").manifest, Path("chain.qc", "report.html").read_text()
    assert result.held_back == manifest["calibration"]["held_back"] == held_back
    assert ("held back" in {v["inputs"] for v in manifest["verification"]}) == bool(held_back)
    assert ("held-back" in page) == bool(held_back)
    assert page.count("on the calibration samples that it was fitted to") == (0 if held_back else 3)
    assert sum("none is held back, and fidelity is taken on" in note for note in notes) == (not held_back)
    assert result.fidelity["sqnr_db"] is not None
    assert result.realised_loss is not None


def test_data_of_one_number_is_pointed_out(work: Path) -> None:
    notes: list[str] = []
    listening = type("Listening", (Silent,), {"note": lambda self, text: notes.append(text)})()
    for value in (np.zeros((8, 32), "f"), np.random.default_rng(0).normal(size=(8, 32)).astype("f")):
        gather(Source([{"x": value}]), qc.load(work), 0, listening)
    assert sum("the same number everywhere" in note for note in notes) == 1


def test_an_input_with_a_default_value_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    proto = onnx.load(write_model(tmp_path / "m.onnx"))
    proto.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [32, 32]))
    onnx.save(proto, "m.onnx")
    notes: list[str] = []
    listening = type("Listening", (Silent,), {"note": lambda self, text: notes.append(text)})()
    qc.compile("m.onnx", "onnx", "8bits", explain=True, progress=listening)
    assert [note for note in notes if "default value" in note] == [
        "input 'w1' has a default value and becomes a constant: the artifact does not take it"
    ]


def test_public_names_exist() -> None:
    for name in qc.__all__:
        assert getattr(qc, name) is not None
    with pytest.raises(AttributeError):
        _ = qc.nothing  # type: ignore[attr-defined]


def test_options_that_mean_nothing_name_the_option(work: Path) -> None:
    with pytest.raises(BadOption, match="--target: unknown target 'toaster'; choose one of cpu, onnx"):
        qc.compile(work, "toaster")
    with pytest.raises(BadOption, match="--seed"):
        qc.compile(work, "onnx", seed=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 4}, '--budget: 4 is not a text; write "4bits"'),
        ({"budget": 3.5}, 'write "3.5bits"'),
        ({"budget": ["4bits", 9]}, "--budget: .* is not a text"),
        ({"keep": 3}, "--keep: 3 is not a text"),
        ({"keep": [3]}, "--keep"),
        ({"seed": "0"}, "--seed: the seed '0' is not a whole number"),
        ({"target": None}, "--target: unknown target 'None'"),
    ],
)
def test_options_of_the_wrong_type_name_the_option(work: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        qc.compile(work, **{"target": "onnx", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [qc.compile, qc.load])
@pytest.mark.parametrize("model", [None, 3, onnx.ModelProto()])
def test_what_is_no_model_is_told_what_is(function: Callable[[object], object], model: object) -> None:
    with pytest.raises(BadOption, match=f"model: a {type(model).__name__} is not a model.*; give the path of"):
        function(model)


def test_a_module_is_sent_to_capture() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(BadOption, match=r"model: a Linear .*; use qcompiler\.capture\(module, example_inputs\)"):
        qc.compile(torch.nn.Linear(2, 2), "onnx")


def test_one_pattern_is_a_pattern_not_its_letters(work: Path) -> None:
    result = qc.compile(work, "onnx", "5bits", batches(), "mixed.toml", keep="node", explain=True, activations="float")
    assert result.plan.kept == ("node",)


def test_a_missing_toolchain_is_noticed_before_long_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tvm" else found(name, *a))
    with pytest.raises(MissingExtra, match=r"qcompiler\[tvm\]"):
        qc.compile("not-even-looked-at.onnx", "cpu")
    assert (qc.compile(work, "cpu", "5bits", batches(), "mixed.toml", explain=True).bits_per_weight or 99) <= 5


def test_the_budget_is_that_of_the_pipeline_where_none_is_given(work: Path) -> None:
    assert qc.compile(work, "onnx", None, batches(), "mixed.toml", explain=True).budget == ("4bits",)
    result = qc.compile(work, "onnx", ("5bits", "6bits"), batches(), "mixed.toml", explain=True)
    assert result.budget == ("5bits", "6bits")


@pytest.mark.parametrize(("op", "reason"), [("Relu", ""), ("MatMul", "left operand")])
def test_a_model_without_weights_to_quantize_is_passed_through(work: Path, op: str, reason: str) -> None:
    weights = [numpy_helper.from_array(np.eye(32, dtype="f"), "w")] if op == "MatMul" else []
    node = helper.make_node(op, ["w", "x"] if weights else ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [32, 32]) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "plain.onnx")
    notes: list[str] = []
    listening = type("Listening", (Silent,), {"note": lambda self, text: notes.append(text)})()
    result = qc.compile("plain.onnx", "onnx", "4bits", pipeline="convolutional", progress=listening)
    assert any("stays as it is" in note for note in notes)
    assert all(reason in note for note in notes if "cannot be quantized:" in note)
    assert bool(reason) == any(reason in r.reason for report in result.reports for r in report.refused)
    x = np.random.default_rng(0).normal(size=(32, 32)).astype("f")
    np.testing.assert_allclose(result.run({"x": x})["y"], np.maximum(x, 0) if op == "Relu" else x, rtol=1e-6)


def test_half_precision_models_compile(work: Path) -> None:
    half = onnx.load(work)
    for tensor in half.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("e"), tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(half, "half.onnx")
    result = qc.compile("half.onnx", "onnx", "5bits", pipeline="convolutional")
    assert result.fidelity["sqnr_db"] is not None
    assert result.fidelity["sqnr_db"] > 10
