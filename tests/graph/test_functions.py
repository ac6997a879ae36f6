"""What InsertQDQ writes, read_weight reads: for every kind of site and every kind of spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompiler.errors import PassRefused
from qcompiler.formats import Int, QTensor, parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.formats.packing import pack
from qcompiler.formats.promoted import FLAG, split_zero
from qcompiler.graph import functions
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Silent

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(0)
# kind -> (op, data shape, weight shape, attributes)
KINDS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "matmul": ("MatMul", (5, 40), (40, 6), {}),
    "batched": ("MatMul", (2, 5, 40), (2, 40, 6), {}),
    "gemm": ("Gemm", (5, 40), (40, 6), {}),
    "gemm-transposed": ("Gemm", (5, 40), (6, 40), {"transB": 1}),
    "gather": ("Gather", (4,), (9, 40), {}),
    "gather-3d": ("Gather", (4,), (9, 8, 5), {}),
    "conv": ("Conv", (2, 5, 7, 7), (6, 5, 3, 3), {}),
    "conv-1d": ("Conv", (2, 5, 9), (6, 5, 3), {}),
    "depthwise": ("Conv", (2, 6, 7, 7), (6, 1, 3, 3), {"group": 6}),
    "conv-transpose": ("ConvTranspose", (2, 4, 5, 5), (4, 6, 3, 3), {}),
    "conv-transpose-grouped": ("ConvTranspose", (2, 4, 5, 5), (4, 3, 3, 3), {"group": 2}),
}
FORMATS = [f"{kind}{bits}-{sym}" for bits in range(2, 9) for kind, sym in (("int", "sym"), ("uint", "asym"))]
OTHERS = ["uint4-sym", "int4-asym", "uint3-sym", "int5-asym"]
FORMS = ["tensor-fp32", "channel-fp16", "g16-fp16", "g32-bf16", "g64-fp32"]


def one_site(kind: str, opset: int = 21) -> Model:
    """A model with one operation of this kind, named "op", and a weight "w"."""
    op, data, shape, attributes = KINDS[kind]
    w = numpy_helper.from_array(RNG.standard_normal(shape, np.float32), "w")
    inputs = ["w", "x"] if op == "Gather" else ["x", "w"]
    node = helper.make_node(op, inputs, ["y"], name="op", **attributes)
    x = helper.make_tensor_value_info("x", T.INT64 if op == "Gather" else T.FLOAT, data)
    graph = helper.make_graph([node], "g", [x], [helper.make_tensor_value_info("y", T.FLOAT, None)], [w])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return Model(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))


def feeds(kind: str) -> dict[str, Array]:
    op, data, shape, _ = KINDS[kind]
    if op == "Gather":
        return {"x": RNG.integers(0, shape[0], data)}
    return {"x": RNG.standard_normal(data, np.float32)}


def lower(kind: str, text: str, opset: int = 21) -> tuple[Model, Site, QTensor]:
    """A lowered model of one site, the site as it was, and its codes."""
    model = one_site(kind, opset)
    (site,) = find_sites(model.ir)
    tensor = quantize(site.matrix(), parse_spec(text), "minmax")
    model.plan = Plan({site.name: SitePlan(tensor.spec)})
    model.weights[site.name] = tensor
    InsertQDQ().requires(model)
    InsertQDQ().run(model, Silent())
    return model, site, tensor


def run(path: Path, data: dict[str, Array]) -> Array:
    """The QDQ semantics exactly: quantization fusions are off."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return np.asarray(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, data)[0])


def weight_value(model: ir.Model) -> ir.Value | None:
    (node,) = [n for n in model.graph if n.name == "op"]
    return node.inputs[0 if node.op_type == "Gather" else 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_site_and_spec_survives_lowering_saving_and_loading(kind: str, form: str, tmp_path: Path) -> None:
    for fmt in [*FORMATS, *OTHERS]:
        text, path, data = f"{fmt}-{form}", tmp_path / "m.onnx", feeds(kind)
        expected = one_site(kind)
        (site,) = find_sites(expected.ir)
        model, site, tensor = lower(kind, text)
        ir.save(model.ir, path)
        onnx.checker.check_model(str(path), full_check=True)
        read = functions.read_weight(weight_value(ir.load(path)))
        assert read is not None
        assert (read.site, read.shape, read.layout, read.groups) == (site.name, site.shape, site.layout, site.groups)
        assert (read.rows, read.columns, read.bits) == (site.rows, site.columns, tensor.spec.bits)
        assert read.spec.symmetric == tensor.spec.symmetric
        assert read.spec.scale_dtype == tensor.spec.scale_dtype
        decoded = tensor.decode()
        np.testing.assert_array_equal(read.qtensor().decode(), decoded)
        assert read.qtensor().stored_bits == tensor.stored_bits

        reference = one_site(kind)
        weight = reference.graph.initializers["w"]
        weight.const_value = ir.tensor(site.from_matrix(decoded), name="w")
        ir.save(reference.ir, tmp_path / "float.onnx")
        want = run(tmp_path / "float.onnx", data)
        np.testing.assert_allclose(run(path, data), want, rtol=1e-6, atol=1e-6 * np.abs(want).max(), err_msg=text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "int4to8p30-sym-g16-fp16", "int3to5p12.5-sym-g32-bf16", "int4to8p40-sym-channel-fp32",
        "int2to4p25-sym-g16-fp16", "int4to6p50-sym-g7-fp16", "int4to6p30-asym-g16-fp16", "int3to8p40-asym-channel-fp32",
    ],
)  # fmt: skip
def test_groups_of_two_widths_are_merged_bit_for_bit(kind: str, text: str, tmp_path: Path) -> None:
    model, site, tensor = lower(kind, text)
    path = tmp_path / "m.onnx"
    ir.save(model.ir, path)
    onnx.checker.check_model(str(path), full_check=True)
    read = functions.read_weight(weight_value(ir.load(path)))
    assert read is not None
    assert (read.rows, read.columns, read.shape) == (site.rows, site.columns, site.shape)
    assert tensor.zero is not None
    assert 0 < split_zero(tensor.zero)[0].sum() < tensor.zero.size
    np.testing.assert_array_equal(read.zero, tensor.zero)
    np.testing.assert_array_equal(read.codes(), tensor.codes)
    np.testing.assert_array_equal(read.qtensor().decode(), tensor.decode())
    held = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    assert held * 8 == tensor.stored_bits == read.qtensor().stored_bits

    model.graph.outputs[:] = [weight_value(model.ir)]  # type: ignore[list-item]
    model.graph.inputs[:] = []
    for node in [n for n in model.graph if n.name == "op"]:
        model.graph.remove(node, safe=False)
    ir.save(model.ir, path)
    np.testing.assert_array_equal(run(path, {}), site.from_matrix(tensor.decode()))
    plain = ort.SessionOptions()  # nothing is folded: there must be a kernel for every step
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], site.from_matrix(tensor.decode()))


@pytest.mark.parametrize("text", ["int4to8p1-sym-g32-fp16", "int4to8p99-asym-g32-fp16", "int3to5p10-sym-tensor-fp16"])
def test_where_none_or_all_groups_are_promoted_there_is_one_width(text: str) -> None:
    model, site, tensor = lower("matmul", text)
    read = functions.read_weight(weight_value(model.ir))
    assert read is not None
    assert read.spec.format in (Int(3), Int(4), Int(8))
    np.testing.assert_array_equal(read.qtensor().decode(), tensor.decode())
    held = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    assert held * 8 == tensor.stored_bits == read.qtensor().stored_bits
    assert tensor.stored_bits == tensor.spec.stored_bits(site.rows, site.columns)


def test_other_flags_than_the_format_counts_are_refused() -> None:
    model = one_site("matmul")
    (site,) = find_sites(model.ir)
    tensor = quantize(site.matrix(), parse_spec("int4to8p30-g16"))
    assert tensor.zero is not None
    tensor.zero = np.full_like(tensor.zero, FLAG)
    model.plan, model.weights[site.name] = Plan({site.name: SitePlan(tensor.spec)}), tensor
    with pytest.raises(PassRefused, match="18 of 18 groups are promoted, which is not what int4to8p30"):
        InsertQDQ().run(model, Silent())


@pytest.mark.parametrize("kind", ["matmul", "gather", "conv", "conv-transpose-grouped"])
@pytest.mark.parametrize("text", ["uint2-asym-g16-fp16", "int2-sym-channel-fp16"])
def test_two_bits_are_a_tensor_type_from_opset_25_on(kind: str, text: str, tmp_path: Path) -> None:
    model, _, tensor = lower(kind, text, opset=25)
    ir.save(model.ir, tmp_path / "m.onnx")
    read = functions.read_weight(weight_value(ir.load(tmp_path / "m.onnx")))
    assert read is not None
    np.testing.assert_array_equal(read.qtensor().decode(), tensor.decode())
    assert not model.ir.functions
    run(tmp_path / "m.onnx", feeds(kind))


@pytest.mark.parametrize(
    "text", ["uint3-asym-g16-fp16", "int5-sym-tensor-fp32", "uint4-asym-g32-bf16", "uint7-asym-tensor-fp16"]
)
@pytest.mark.parametrize("kind", ["matmul", "conv", "depthwise", "conv-transpose-grouped", "gather-3d"])
def test_initializers_take_exactly_the_stored_bits(kind: str, text: str) -> None:
    model, site, tensor = lower(kind, text)
    held = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    assert held * 8 == tensor.spec.stored_bits(site.rows, site.columns)


@given(
    bits=st.sampled_from([2, 3, 5, 6, 7]),
    signed=st.booleans(),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_unpack_is_the_inverse_of_pack(bits: int, signed: bool, shape: list[int]) -> None:
    raw = RNG.integers(0, 1 << bits, shape)
    function = functions.unpack_function(bits, signed, 21)
    planes = [
        ir.val(f"p{i}", const_value=ir.tensor(p, name=f"p{i}")) for i, p in enumerate(pack(raw.reshape(-1), bits))
    ]
    node = ir.node(function.name, planes, {"shape": shape}, domain=functions.DOMAIN)
    got = _evaluate([node], planes, function, ir.DataType.INT8 if signed else ir.DataType.UINT8)
    np.testing.assert_array_equal(got, raw - (1 << (bits - 1)) if signed else raw)


@pytest.mark.parametrize("opset", [21, 26])
def test_quantize_rows_rounds_every_row_with_its_own_scale(opset: int) -> None:
    x = RNG.standard_normal((3, 4, 8)).astype(np.float32)
    x[0, 0], x[1, 2], x[2, 1] = 0, np.float32(1e-44), x[2, 1] * 1e30
    x[0, 1, :4] = [127, 0.5, 1.5, -2.5]  # ties go to even codes
    x[0, 1, 4:] = 0
    scale = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    scale[scale == 0] = 1
    want = np.clip(np.rint(x / scale), -127, 127) * scale
    value = ir.val("x", const_value=ir.tensor(x, name="x"))
    node = ir.node(functions.QUANTIZE_ROWS, [value], domain=functions.DOMAIN)
    got = _evaluate([node], [value], functions.quantize_rows_function(opset), ir.DataType.FLOAT, opset)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[0, 1, :4], [127, 0, 2, -2])


def _evaluate(
    nodes: list[ir.Node], constants: list[ir.Value], function: ir.Function, dtype: ir.DataType, opset: int = 21
) -> Array:
    nodes[-1].outputs[0].name, nodes[-1].outputs[0].dtype = "y", dtype
    imports = {"": opset, functions.DOMAIN: 1}
    graph = ir.Graph([], nodes[-1].outputs, nodes=nodes, initializers=constants, opset_imports=imports, name="g")
    proto = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
    return np.asarray(ort.InferenceSession(proto.SerializeToString()).run(None, {})[0])


def test_activations_are_recognised_and_other_values_are_not() -> None:
    x, scale = ir.val("x", dtype=ir.DataType.FLOAT), ir.val("s", const_value=ir.tensor(np.float32(0.5), name="s"))
    zero = ir.val("z", const_value=ir.tensor(np.uint8(7), name="z"))
    codes = ir.node("QuantizeLinear", [x, scale, zero]).outputs[0]
    static = functions.read_activation(ir.node("DequantizeLinear", [codes, scale, zero]).outputs[0])
    assert isinstance(static, functions.StaticActivation)
    assert (static.source, static.scale, static.zero, static.dtype) == (x, 0.5, 7, ir.DataType.UINT8)
    rows = functions.read_activation(ir.node("QuantizeRows", [x], domain=functions.DOMAIN).outputs[0])
    assert isinstance(rows, functions.DynamicActivation)
    assert rows.source is x
    assert functions.read_activation(x) is None
    assert functions.read_activation(ir.node("QuantizeRows", [x]).outputs[0]) is None
    assert functions.read_weight(ir.node("DequantizeLinear", [codes, scale, zero]).outputs[0]) is None


def test_a_transpose_of_the_model_is_not_taken_for_the_weight() -> None:
    model, _, _ = lower("conv-transpose-grouped", "int4-sym-g16-fp16")
    value = weight_value(model.ir)
    assert value is not None
    assert functions.read_weight(value) is not None
    assert functions.read_weight(ir.node("Transpose", [value]).outputs[0]) is None
    inner = value.producer()
    assert inner is not None
    assert functions.read_weight(inner.inputs[0]) is None
