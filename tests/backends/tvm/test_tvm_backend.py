"""Target cpu from a lowered model to an artifact that runs on its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm")

from qcompiler.backends.tvm.backend import CpuBackend
from qcompiler.errors import BadModel, MissingExtra, PassRefused
from qcompiler.formats import QTensor, parse_spec, spread
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Silent

RNG = np.random.default_rng(0)


def make(nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str], weights: dict[str, Any]) -> Model:
    kinds = {"ids": TensorProto.INT64}
    made = [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()]
    graph = helper.make_graph(
        nodes, "g", made, [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Model(ir.from_proto(proto), name="small")


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def language_model() -> Model:
    """Embedding, a gated product, attention of dynamic length, a head tied to the embedding."""
    n = helper.make_node
    nodes = [
        n("Gather", ["table", "ids"], ["x"], name="embed"),
        n("MatMul", ["x", "wq"], ["q"], name="q"),
        n("MatMul", ["x", "wk"], ["k"], name="k"),
        n("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        n("MatMul", ["q", "kt"], ["scores"], name="scores"),
        n("Softmax", ["scores"], ["p"], axis=-1),
        n("MatMul", ["p", "x"], ["mixed"], name="mix"),
        n("Add", ["mixed", "x"], ["y"]),
        n("Transpose", ["table"], ["head"], perm=[1, 0]),
        n("MatMul", ["y", "head"], ["logits"], name="head"),
    ]
    weights = {"table": normal(70, 40), "wq": normal(40, 24) / 6, "wk": normal(40, 24) / 6}
    return make(nodes, {"ids": ["batch", "seq"]}, ["logits"], weights)


def picture_model() -> Model:
    """Dense, depthwise and strided convolutions with biases, and a Gemm."""
    n = helper.make_node
    nodes = [
        n("Conv", ["image", "w0", "b0"], ["a"], name="stem", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        n("Relu", ["a"], ["b"]),
        n("Conv", ["b", "w1", "b1"], ["c"], name="depthwise", kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=12),
        n("Relu", ["c"], ["d"]),
        n("Conv", ["d", "w2"], ["e"], name="pointwise", kernel_shape=[1, 1]),
        n("GlobalAveragePool", ["e"], ["f"]),
        n("Flatten", ["f"], ["h"]),
        n("Gemm", ["h", "w3", "b3"], ["y"], name="head", transB=1),
    ]
    weights = {
        "w0": normal(12, 3, 3, 3) / 3, "b0": normal(12), "w1": normal(12, 1, 3, 3) / 2, "b1": normal(12),
        "w2": normal(20, 12, 1, 1) / 3, "w3": normal(7, 20) / 4, "b3": normal(7),
    }  # fmt: skip
    return make(nodes, {"image": ["batch", 3, 13, "width"]}, ["y"], weights)


def lower(model: Model, plans: dict[str, SitePlan]) -> Model:
    """Round every planned site to its nearest codes and insert QDQ."""
    for site in find_sites(model.ir):
        spec = plans[site.name].weight if site.name in plans else None
        if spec is None:
            continue
        matrix = site.matrix()
        size = spec.granularity.group_size(site.columns)
        starts = range(0, site.columns, size)
        low = np.stack([matrix[:, s : s + size].min(axis=1) for s in starts], axis=1)
        high = np.stack([matrix[:, s : s + size].max(axis=1) for s in starts], axis=1)
        scale, zero = spec.format.fit(low, high, spec.symmetric)
        scale = scale.astype(np.float16).astype(np.float32)
        wide = None if zero is None else spread(zero, spec, site.columns)
        codes = spec.format.encode(matrix, spread(scale, spec, site.columns), wide)
        model.weights[site.name] = QTensor(spec, codes, scale, zero)
    model.plan = Plan(plans)
    InsertQDQ().run(model, Silent())
    return model


def first_plans(model: Model, bits: int, **changes: str) -> dict[str, SitePlan]:
    found = {s.name: CpuBackend().candidates(s, [bits])[0] for s in find_sites(model.ir)}
    return {n: SitePlan(p.weight, changes.get("activation", p.activation)) for n, p in found.items()}  # type: ignore[arg-type]


def reference_of(model: Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model.ir).SerializeToString(), options)
    found: list[Any] = list(session.run(None, feeds))
    return dict(zip([o.name for o in session.get_outputs()], found, strict=True))


def distance(y: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


FRESH = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
import runtime
outputs = runtime.load(sys.argv[1]).run(dict(np.load(sys.argv[2])))
assert not any(name.partition(".")[0] in ("qcompiler", "onnx", "onnx_ir") for name in sys.modules)
np.savez(sys.argv[3], **outputs)
"""


def run_fresh(folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an artifact in a new process that imports nothing of ours."""
    np.savez(folder / "in.npz", **feeds)  # type: ignore[arg-type]
    command = [sys.executable, "-c", FRESH, str(folder), str(folder / "in.npz"), str(folder / "out.npz")]
    subprocess.run(command, check=True, cwd=folder, timeout=120)
    return dict(np.load(folder / "out.npz"))


def test_a_language_model_runs_in_a_fresh_process_with_any_length(tmp_path: Path) -> None:
    model = language_model()
    lower(model, first_plans(model, 4))
    compiled = CpuBackend().compile(model, tmp_path, Silent())
    assert compiled.facts["packed"] == {"QcGather": 1, "QcMatMul": 3}
    loaded = CpuBackend().load(tmp_path)
    for shape in ((1, 1), (2, 5), (3, 33)):
        ids = RNG.integers(-70, 70, shape)
        expected = reference_of(model, {"ids": ids})["logits"]
        assert distance(loaded.run({"ids": ids})["logits"], expected) < 0.02  # a flipped rounding is one step of 254
    assert np.array_equal(run_fresh(tmp_path, {"ids": ids})["logits"], loaded.run({"ids": ids})["logits"])
    with pytest.raises(RuntimeError, match="outside the embedding table"):
        loaded.run({"ids": np.full((1, 2), 70)})
    with pytest.raises(ValueError, match="input 'ids' is missing"):
        loaded.run({})
    with pytest.raises(ValueError, match="has shape"):
        loaded.run({"ids": np.zeros(3, np.int64)})


def test_products_that_read_a_value_at_two_widths(tmp_path: Path) -> None:
    n = helper.make_node
    nodes = [n("MatMul", ["x", "w"], ["y"], name="a"), n("MatMul", ["x", "v"], ["z"], name="b")]
    model = make(nodes, {"x": ["n", 40]}, ["y", "z"], {"w": normal(40, 24), "v": normal(40, 8)})
    spec = parse_spec("int4-sym-channel-fp16")
    lower(model, {"a": SitePlan(spec, "dynamic", "", 4, 0.9), "b": SitePlan(spec, "dynamic")})
    CpuBackend().compile(model, tmp_path, Silent())
    feeds = {"x": normal(5, 40)}
    found, expected = run_fresh(tmp_path, feeds), reference_of(model, feeds)
    for name, array in expected.items():
        assert distance(found[name], array) < 1e-5


def test_an_output_may_be_the_shape_of_another(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), helper.make_node("Shape", ["y"], ["s"])]
    model = make(nodes, {"x": ["n", 32]}, ["y"], {"w": normal(32, 8)})
    size = model.graph[-1].outputs[0]
    size.type, size.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([2])
    model.graph.outputs.append(size)
    CpuBackend().compile(lower(model, first_plans(model, 4)), tmp_path, Silent())
    found = CpuBackend().load(tmp_path).run({"x": normal(3, 32)})["s"]
    assert found.dtype == np.int64
    assert found.tolist() == [3, 8]


def test_weights_lie_packed_and_a_tied_weight_lies_once(tmp_path: Path) -> None:
    model = language_model()
    lower(model, first_plans(model, 3, activation="float"))
    compiled = CpuBackend().compile(model, tmp_path, Silent())
    assert compiled.tolerance.relative <= 1e-3
    with np.load(tmp_path / "model.npz") as arrays:
        assert {str(arrays[name].dtype) for name in arrays} == {"uint8", "float16"}
        planes = sum(arrays[n].nbytes for n in arrays if "plane" in n)
    padded = 80 * 64 + 2 * 32 * 64  # rows to 16, groups of 32 columns to whole words
    assert planes == padded * 3 // 8
    ids = RNG.integers(0, 70, (2, 9))
    y = CpuBackend().load(tmp_path).run({"ids": ids})["logits"]
    assert distance(y, reference_of(model, {"ids": ids})["logits"]) < 1e-5


@pytest.mark.parametrize(("bits", "activation"), [(8, "static"), (3, "float")])
def test_convolutions_of_any_batch_and_width(tmp_path: Path, bits: int, activation: str) -> None:
    model = picture_model()
    plans = first_plans(model, bits, activation="float")
    if activation == "static":
        for name in plans:
            plans[name] = SitePlan(plans[name].weight, "float" if "w3" in name or name == "head" else "static")
        model.ranges.update(image=StaticRange(2 / 255, 128), b=StaticRange(0.02, 0), d=StaticRange(0.03, 0))
    lower(model, plans)
    compiled = CpuBackend().compile(model, tmp_path, Silent())
    assert compiled.facts["packed"] == {"QcConv": 3, "QcMatMul": 1}
    loaded = CpuBackend().load(tmp_path)
    for batch, width in ((1, 9), (3, 34)):
        image = RNG.uniform(-1, 1, (batch, 3, 13, width)).astype(np.float32)
        expected = reference_of(model, {"image": image})["y"]
        assert distance(loaded.run({"image": image})["y"], expected) < (1e-5 if activation == "float" else 1e-2)


def test_one_dimensional_convolutions(tmp_path: Path) -> None:
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], name="c", kernel_shape=[5], strides=[2], dilations=[2], pads=[3, 1]
    )
    model = make([node], {"x": ["batch", 4, "length"]}, ["y"], {"w": normal(6, 4, 5)})
    lower(model, first_plans(model, 5, activation="float"))
    CpuBackend().compile(model, tmp_path, Silent())
    x = normal(2, 4, 31)
    assert distance(CpuBackend().load(tmp_path).run({"x": x})["y"], reference_of(model, {"x": x})["y"]) < 1e-5


def site(model: Model) -> Site:
    return find_sites(model.ir)[0]


def test_what_has_no_kernel_is_refused_with_the_reason(tmp_path: Path) -> None:
    backend = CpuBackend()
    conv3d = helper.make_node("Conv", ["x", "w"], ["y"], name="c", kernel_shape=[2, 2, 2])
    model = make([conv3d], {"x": [1, 2, 4, 4, 4]}, ["y"], {"w": normal(6, 2, 2, 2, 2)})
    assert backend.candidates(site(model), [4, 8]) == []
    plan = SitePlan(parse_spec("int4-sym-channel-fp16"))
    assert "3 dimensions" in (backend.supports(site(model), plan) or "")
    lower(model, {site(model).name: plan})
    with pytest.raises(BadModel, match=r"no packed kernel.*--keep"):
        backend.compile(model, tmp_path, Silent())
    product = make([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 8]}, ["y"], {"w": normal(8, 8)})
    assert backend.supports(site(product), SitePlan(None)) is None
    assert "2 to 8 bits" in (backend.supports(site(product), SitePlan(parse_spec("int12-sym-channel-fp16"))) or "")
    assert "overflow" in (backend.supports(site(product), SitePlan(parse_spec("int4-sym-g20000-fp16"))) or "")
    plan = SitePlan(parse_spec("int4to8p20-sym-g4-fp16"))
    assert "not for int4to8p20" in (backend.supports(site(product), plan) or "")
    assert plan.weight is not None
    product.plan = Plan({site(product).name: plan})
    product.weights[site(product).name] = quantize(site(product).matrix(), plan.weight)
    InsertQDQ().run(product, Silent())
    with pytest.raises(BadModel, match="no packed kernel"):
        backend.compile(product, tmp_path, Silent())


def test_every_candidate_is_supported_and_best_bits_come_first() -> None:
    for s in find_sites(language_model().ir) + find_sites(picture_model().ir):
        plans = CpuBackend().candidates(s, [2, 4, 8, 16])
        assert all(CpuBackend().supports(s, plan) is None for plan in plans)
        widths = [plan.weight.bits for plan in plans if plan.weight is not None]
        assert sorted(set(widths), reverse=True) == [8, 4, 2]
        assert widths == sorted(widths, reverse=True)


def test_an_operation_that_tvm_lacks_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Det", ["x"], ["y"], name="d")]
    model = lower(make(nodes, {"x": [3, 3]}, ["y"], {}), {})
    with pytest.raises(BadModel, match=r"Det.*--target onnx"):
        CpuBackend().compile(model, tmp_path, Silent())


def test_without_tvm_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tvm" else find(name, *rest))
    with pytest.raises(MissingExtra, match=r"qcompiler\[tvm\]"):
        CpuBackend().compile(language_model(), tmp_path, Silent())


def test_a_model_that_is_not_lowered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassRefused, match="not lowered"):
        CpuBackend().compile(language_model(), tmp_path, Silent())
