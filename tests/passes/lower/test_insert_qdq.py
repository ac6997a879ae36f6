"""InsertQDQ on whole graphs: activations, tied weights, biases, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser

from qcompiler.backends import reference
from qcompiler.errors import PassRefused
from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph import functions
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.plan import ActivationMode, Plan, SitePlan
from qcompiler.progress import Silent

Array = np.ndarray[Any, np.dtype[Any]]


def model_of(text: str, weights: dict[str, tuple[int, ...]], opset: int = 21) -> Model:
    """A model from ONNX text, with random float32 initializers of the given shapes."""
    rng = np.random.default_rng(0)
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in weights.items()
    )
    return Model(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))


MLP = """agraph (float[n, 20] x) => (float[n, 4] y) {
    h = MatMul (x, w1)
    a = Add (h, b1)
    r = Relu (a)
    y = Gemm <transB = 1> (r, w2, b2)
}"""


def mlp(opset: int = 21) -> Model:
    model = model_of(MLP, {"w1": (20, 12), "b1": (12,), "w2": (4, 12), "b2": (4,)}, opset)
    for node in model.graph:
        node.name = {"MatMul": "fc1", "Gemm": "fc2"}.get(node.op_type, node.op_type)
    return model


def plan(model: Model, spec: str, activation: ActivationMode = "float") -> list[Site]:
    """Round every site to one spec by min-max; the float graph then holds what the codes stand for."""
    sites = find_sites(model.ir)
    for site in sites:
        model.weights[site.name] = quantize(site.matrix(), parse_spec(spec), "minmax")
    model.plan = Plan({s.name: SitePlan(parse_spec(spec), "float" if s.op == "Gather" else activation) for s in sites})
    return sites


def decoded(model: Model) -> dict[str, Array]:
    """The weights, by initializer, that the codes of a planned model stand for."""
    return {str(s.weight.name): s.from_matrix(model.weights[s.name].decode()) for s in find_sites(model.ir)}


def run(model: Model, **feeds: Array) -> list[Array]:
    """QDQ semantics, by ONNX Runtime without quantization fusions."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    proto = ir.to_proto(model.ir)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, feeds)]


def lower(model: Model) -> dict[str, Any]:
    InsertQDQ().requires(model)
    return dict(InsertQDQ().run(model, Silent()).metrics)


X = np.random.default_rng(7).standard_normal((5, 20)).astype(np.float32)


def test_weights_become_codes_and_float_weights_are_gone() -> None:
    model = mlp()
    plan(model, "uint3-asym-g8-fp16")
    weights, floats = decoded(model), [model.graph.initializers[n] for n in ("w1", "w2")]
    b1, b2 = (model.graph.initializers[n].const_value.numpy() for n in ("b1", "b2"))  # type: ignore[union-attr]
    want = np.maximum(X @ weights["w1"] + b1, 0) @ weights["w2"].T + b2
    assert lower(model) == {"weights": 2, "static": 0, "dynamic": 0, "biases": 0}
    assert model.lowered
    assert all(value.const_value is None for value in floats)
    assert not {"w1", "w2"} & set(model.graph.initializers)
    np.testing.assert_allclose(run(model, x=X)[0], want, rtol=1e-5, atol=1e-5)


def test_static_activations_have_one_pair_for_all_consumers_and_outputs_stay_float() -> None:
    text = """agraph (float[n, 20] x) => (float[n, 6] p, float[n, 6] q, float[n, 20] r) {
        r = Relu (x)
        p = MatMul (r, w1)
        q = MatMul (r, w2)
    }"""
    model = model_of(text, {"w1": (20, 6), "w2": (20, 6)})
    plan(model, "int8-sym-channel-fp32", "static")
    model.ranges = {"x": StaticRange(0.05, 120), "r": StaticRange(0.02, 0)}
    weights = decoded(model)
    assert lower(model)["static"] == 2
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 2
    x = reference.dequantize(reference.quantize(X, 0.05, 120), 0.05, 120)
    r = np.maximum(x, 0)
    a = reference.dequantize(reference.quantize(r, 0.02, 0), 0.02, 0)
    p, q, kept = run(model, x=X)
    np.testing.assert_allclose(p, a @ weights["w1"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(q, a @ weights["w2"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kept, r)


@pytest.mark.parametrize("opset", [21, 25])
def test_dynamic_activations_are_rounded_row_by_row_and_shared(opset: int) -> None:
    text = """agraph (float[n, 20] x) => (float[n, 6] p, float[n, 6] q) {
        p = MatMul (x, w1)
        q = MatMul (x, w2)
    }"""
    model = model_of(text, {"w1": (20, 6), "w2": (20, 6)}, opset)
    plan(model, "uint4-asym-g8-fp16", "dynamic")
    weights = decoded(model)
    assert lower(model)["dynamic"] == 1
    codes, scale = reference.quantize_rows(X)
    p, q = run(model, x=X)
    np.testing.assert_allclose(p, (codes * scale) @ weights["w1"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(q, (codes * scale) @ weights["w2"], rtol=1e-5, atol=1e-5)


def test_a_tied_weight_is_stored_once_for_embedding_and_head() -> None:
    text = """agraph (int64[n] i) => (float[n, 30] y) {
        e = Gather (table, i)
        h = Relu (e)
        t = Transpose <perm = [1, 0]> (table)
        y = MatMul (h, t)
    }"""
    model = model_of(text, {"table": (30, 16)})
    (site,) = plan(model, "uint3-asym-g8-fp16", "dynamic")
    assert len(site.users) == 2
    model.plan = Plan({site.name: SitePlan(parse_spec("uint3-asym-g8-fp16"), "dynamic")})
    table = decoded(model)["table"]
    metrics = lower(model)
    assert (metrics["weights"], metrics["dynamic"]) == (1, 1)
    held = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    assert held * 8 == site_bits(30, 16)
    indices = np.array([3, 0, 29, 3])
    codes, scale = reference.quantize_rows(np.maximum(table[indices], 0))
    np.testing.assert_allclose(run(model, i=indices)[0], (codes * scale) @ table.T, rtol=1e-5, atol=1e-5)


def site_bits(rows: int, columns: int) -> int:
    return parse_spec("uint3-asym-g8-fp16").stored_bits(rows, columns)


BIASED = {
    "MatMul with Add": ("h = MatMul (x, w)  y = Add (b, h)", (20, 6), (6,)),
    "MatMul alone": ("y = MatMul (x, w)", (20, 6), None),
    "MatMul that is read twice": ("h = MatMul (x, w)  g = Relu (h)  y = Add (h, g)", (20, 6), None),
    "Gemm with bias": ("y = Gemm <beta = 0.5> (x, w, b)", (20, 6), (6,)),
    "Gemm with a scalar bias": ("y = Gemm <alpha = 2.0> (x, w, b)", (20, 6), (1,)),
    "Gemm without": ("y = Gemm <transB = 1, beta = 0.5> (x, w)", (6, 20), None),
    "Gemm whose bias is switched off": ("y = Gemm <beta = 0.0> (x, w, b)", (20, 6), (6,)),
    "Gemm with a computed bias": ("c = ReduceMean <keepdims = 0> (x)  y = Gemm (x, w, c)", (20, 6), None),
}


@pytest.mark.parametrize("case", BIASED)
def test_bias_correction_is_added_to_the_operations_output(case: str) -> None:
    body, shape, bias = BIASED[case]
    weights: dict[str, tuple[int, ...]] = {"w": shape} if bias is None else {"w": shape, "b": bias}
    text = f"agraph (float[n, 20] x) => (float[n, 6] y) {{ {body} }}"
    plain, corrected = model_of(text, weights), model_of(text, weights)
    (site,) = find_sites(corrected.ir)
    shift = np.arange(1, 7, dtype=np.float32)
    corrected.bias_shift[site.name] = shift
    assert lower(corrected)["biases"] == 1
    (before,), (after,) = run(plain, x=X), run(corrected, x=X)
    if case == "MatMul that is read twice":
        product = X @ plain.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
        before, after = product + shift + np.maximum(product + shift, 0), after
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_allclose(after - before, np.broadcast_to(shift, after.shape), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("operation", "shape", "bias"),
    [("Conv", (6, 3, 3, 3), None), ("Conv", (6, 3, 3, 3), (6,)), ("ConvTranspose", (3, 6, 3, 3), None)],
)
def test_bias_correction_of_convolutions(operation: str, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> None:
    text = f"agraph (float[n, 3, 8, 8] x) => (float[n, 6, h, v] y) {{ y = {operation} (x, w{', b' if bias else ''}) }}"
    weights: dict[str, tuple[int, ...]] = {"w": shape} if bias is None else {"w": shape, "b": bias}
    plain, corrected = model_of(text, weights), model_of(text, weights)
    (site,) = find_sites(corrected.ir)
    shift = np.arange(6, dtype=np.float32)
    corrected.bias_shift[site.name] = shift
    lower(corrected)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    (before,), (after,) = run(plain, x=x), run(corrected, x=x)
    np.testing.assert_allclose(after - before, np.broadcast_to(shift[:, None, None], after.shape), atol=2e-5)


def test_a_shared_bias_is_corrected_for_one_operation_only() -> None:
    text = """agraph (float[n, 20] x) => (float[n, 6] y, float[n, 6] z) {
        y = Gemm (x, w1, b)
        z = Gemm (x, w2, b)
    }"""
    plain, corrected = (model_of(text, {"w1": (20, 6), "w2": (20, 6), "b": (6,)}) for _ in range(2))
    corrected.bias_shift[find_sites(corrected.ir)[0].name] = np.ones(6, np.float32)
    lower(corrected)
    (y, z), (y2, z2) = run(plain, x=X), run(corrected, x=X)
    np.testing.assert_allclose(y2, y + 1, atol=1e-5)
    np.testing.assert_array_equal(z2, z)


def test_refusals_say_what_is_missing() -> None:
    model = mlp()
    plan(model, "uint4-asym-g8-fp16")
    del model.weights["fc2"]
    with pytest.raises(PassRefused, match=r"'fc2' planned but not rounded.*rounding pass"):
        InsertQDQ().requires(model)
    with pytest.raises(PassRefused, match="opset 20 has no blocked DequantizeLinear"):
        InsertQDQ().requires(mlp(opset=20))
    model = mlp()
    model.ranges["nowhere"] = StaticRange(1.0, 0)
    with pytest.raises(PassRefused, match="no value 'nowhere'"):
        InsertQDQ().requires(model)
    model = mlp()
    model.plan = Plan({"unheard-of": SitePlan(None)})
    with pytest.raises(PassRefused, match="no site 'unheard-of'"):
        InsertQDQ().run(model, Silent())
    model = mlp()
    lower(model)
    with pytest.raises(PassRefused, match="lowered already"):
        InsertQDQ().requires(model)
    model = mlp()
    plan(model, "uint12-asym-channel-fp16")
    with pytest.raises(PassRefused, match="no ONNX form for weights of format uint12"):
        InsertQDQ().run(model, Silent())


def test_a_table_that_is_only_gathered_from_has_no_bias() -> None:
    model = model_of("agraph (int64[n] i) => (float[n, 16] y) { y = Gather (table, i) }", {"table": (30, 16)})
    model.bias_shift[find_sites(model.ir)[0].name] = np.ones(30, np.float32)
    with pytest.raises(PassRefused, match="no bias to correct"):
        InsertQDQ().run(model, Silent())


def test_a_half_precision_weight_is_decoded_to_half_precision() -> None:
    model = model_of("agraph (float16[n, 20] x) => (float16[n, 6] y) { y = MatMul (x, w) }", {"w": (20, 6)})
    weight = model.graph.initializers["w"]
    assert weight.const_value is not None
    weight.const_value, weight.dtype = (
        ir.tensor(weight.const_value.numpy().astype(np.float16), name="w"),
        ir.DataType.FLOAT16,
    )
    plan(model, "uint4-asym-g8-fp16")
    want = X @ decoded(model)["w"]
    lower(model)
    (product,) = [n for n in model.graph if n.op_type == "MatMul"]
    assert functions.read_weight(product.inputs[1]) is not None
    np.testing.assert_allclose(run(model, x=X.astype(np.float16))[0], want, rtol=1e-2, atol=3e-2)
