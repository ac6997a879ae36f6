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
from onnx import helper, numpy_helper
from onnx import TensorProto as T

from qcompiler.formats import QTensor, parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.formats.packing import pack
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
FORMATS += ["uint4-sym", "int4-asym", "uint3-sym", "int5-asym"]
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
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, data)[0]


def weight_value(model: ir.Model) -> ir.Value | None:
    (node,) = [n for n in model.graph if n.name == "op"]
    return node.inputs[0 if node.op_type == "Gather" else 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_site_and_spec_survives_lowering_saving_and_loading(kind: str, form: str, tmp_path: Path) -> None:
    for fmt in FORMATS:
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
