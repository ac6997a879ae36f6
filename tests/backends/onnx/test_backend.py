"""The fast form against the QDQ graph, site by site: the kernel that was promised runs, and gives its numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from qcompiler.artifact.agreement import Agreement
from qcompiler.artifact.spread import Reference
from qcompiler.backends.onnx import backend, probe
from qcompiler.backends.onnx.backend import OnnxBackend, fastest_form
from qcompiler.backends.onnx.fast_form import fast_form
from qcompiler.backends.onnx.session import OrtRunnable, reference_options
from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.plan import ActivationMode, Plan, SitePlan
from qcompiler.progress import Silent
from qcompiler.target import Backend, Compiled

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(3)
MATMUL = "agraph (float[n, 96] x) => (float[n, 24] y) { h = MatMul (x, w)  y = Add (h, b) }"
GEMM = "agraph (float[n, 96] x) => (float[n, 24] y) { y = Gemm <transB = 1> (x, w, b) }"
GATHER = "agraph (int64[n, 3] x) => (float[n, 3, 96] y) { y = Gather (w, x) }"
CONV = "agraph (float[n, 8, 9, 9] x) => (float[n, 24, 7, 7] y) { c = Conv (x, w, b)  y = Relu (c) }"
SHAPES = {"matmul": (96, 24), "gemm": (24, 96), "gather": (24, 96), "conv": (24, 8, 3, 3)}
TEXTS = {"matmul": MATMUL, "gemm": GEMM, "gather": GATHER, "conv": CONV}


def lowered(
    kind: str, spec: str, activation: ActivationMode = "float", ranges: dict[str, StaticRange] | None = None,
    shape: tuple[int, ...] | None = None, text: str | None = None, bias: tuple[int, ...] = (24,),
) -> Model:  # fmt: skip
    """A lowered model of one kind of site."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text or TEXTS[kind]}')
    weights = {"w": shape or SHAPES[kind]} | ({} if kind == "gather" else {"b": bias})
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(RNG.standard_normal(s).astype(np.float32), n) for n, s in weights.items()
    )
    model = Model(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    for site in find_sites(model.ir):
        model.weights[site.name] = quantize(site.matrix(), parse_spec(spec), "minmax")
        model.plan = model.plan.with_sites({site.name: SitePlan(parse_spec(spec), activation)})
    model.ranges = ranges or {}
    InsertQDQ().requires(model)
    InsertQDQ().run(model, Silent())
    return model


def feeds(kind: str) -> dict[str, Array]:
    if kind == "gather":
        return {"x": RNG.integers(0, 24, (5, 3))}
    return {"x": RNG.standard_normal((5, 8, 9, 9) if kind == "conv" else (5, 96)).astype(np.float32)}


def compile_and_compare(
    model: Model, kind: str, folder: Path, data: dict[str, Array] | None = None
) -> tuple[Compiled, float]:
    """What was compiled, and the relative distance of its outputs from the QDQ graph's."""
    ir.save(model.ir, folder / "model.onnx")
    compiled = OnnxBackend().compile(model, folder, Silent())
    data = data or feeds(kind)
    got = OnnxBackend(threads=1).load(folder).run(data)
    want = OrtRunnable.open(folder / "model.onnx", reference_options(1)).run(data)
    assert list(got) == list(want)
    assert compiled.facts["unfused"] == {}, compiled.facts["operations"]
    error = max(float(np.linalg.norm(got[k] - want[k]) / np.linalg.norm(want[k])) for k in want)
    agreement = Agreement(
        "test", Reference(ir.load(folder / "model.onnx"), compiled.tolerance.noise), compiled.tolerance, 1
    )
    agreement.add(data, got, None, 5)
    agreement.conclude()
    assert (folder / "model.ort.onnx").stat().st_size < 1.15 * (folder / "model.onnx").stat().st_size + 3000
    return compiled, error


FORMS = [
    ("matmul", "uint4-asym-g32-fp16", "blocks4"),
    ("matmul", "int4-sym-g16-fp32", "blocks4"),
    ("matmul", "uint3-asym-g32-bf16", "blocks4"),
    ("matmul", "int3-sym-g32-fp16", "blocks4"),
    ("matmul", "int2-sym-channel-fp16", "blocks4"),
    ("matmul", "uint4-asym-channel-fp16", "blocks4"),
    ("matmul", "uint4-asym-tensor-fp32", "blocks4"),
    ("matmul", "int4-asym-g48-fp16", "blocks4"),
    ("matmul", "uint4-asym-g8-fp16", "decoded"),
    ("matmul", "uint8-asym-g32-fp16", "decoded"),
    ("matmul", "int6-sym-channel-fp16", "decoded"),
    ("gemm", "uint4-asym-g32-fp16", "blocks4"),
    ("gemm", "uint3-asym-channel-fp16", "blocks4"),
    ("gemm", "int8-sym-channel-fp16", "decoded"),
    ("gather", "uint4-asym-g32-fp16", "gather4"),
    ("gather", "uint3-asym-g16-fp16", "gather4"),
    ("gather", "int2-sym-g32-fp16", "gather2"),
    ("gather", "uint5-asym-g32-bf16", "gather8"),
    ("gather", "int8-sym-g32-fp32", "gather8"),
    ("gather", "uint4-asym-g24-fp16", "decoded"),
    ("conv", "uint4-asym-g32-fp16", "decoded"),
    ("conv", "uint3-asym-channel-fp16", "decoded"),
    ("conv", "int7-sym-tensor-fp32", "decoded"),
    ("matmul", "int4to8p20-sym-g32-fp16", "decoded"),
    ("matmul", "int3to4p30-sym-g32-fp16", "blocks4"),
    ("matmul", "int2to4p30-sym-channel-fp32", "blocks4"),
    ("gemm", "int2to3p30-sym-g32-bf16", "blocks4"),
    ("gather", "int4to8p20-sym-g32-fp16", "gather8"),
    ("gather", "int3to4p20-sym-g16-fp16", "gather4"),
    ("conv", "int4to6p20-sym-g32-fp16", "decoded"),
    ("matmul", "int4to6p20-asym-g32-fp16", "decoded"),
    ("matmul", "int3to4p30-asym-g32-fp16", "blocks4"),
    ("gather", "int4to6p20-asym-g32-fp16", "gather8"),
    ("conv", "int2to5p20-asym-channel-fp16", "decoded"),
]


@pytest.mark.parametrize(("kind", "spec", "form"), FORMS)
def test_weight_only_forms_equal_the_qdq_graph(kind: str, spec: str, form: str, tmp_path: Path) -> None:
    compiled, error = compile_and_compare(lowered(kind, spec), kind, tmp_path)
    assert list(compiled.facts["forms"].values()) == [form]
    assert error < 1e-5
    assert "DequantizeLinear" not in compiled.facts["operations"]  # nothing is decoded in every run


@pytest.mark.parametrize("columns", [70, 100])
@pytest.mark.parametrize(
    "spec", ["uint4-asym-g32-fp16", "int3-sym-g32-fp16", "uint3-asym-channel-fp16", "int3to4p20-g32"]
)
def test_ragged_last_groups(columns: int, spec: str, tmp_path: Path) -> None:
    model = lowered("gemm", spec, shape=(24, columns), text=GEMM.replace("96", str(columns)))
    data = {"x": RNG.standard_normal((4, columns)).astype(np.float32)}
    compiled, error = compile_and_compare(model, "gemm", tmp_path, data)
    assert list(compiled.facts["forms"].values()) == ["blocks4"]
    assert error < 1e-5


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("uint4-asym-g32-fp16", "blocks4-int8"),
        ("uint3-asym-g32-fp16", "blocks4-int8"),
        ("uint2-asym-g32-fp16", "blocks4-int8"),
        ("uint8-asym-g32-fp16", "blocks8-int8"),
        ("int4to8p20-sym-g32-fp16", "blocks8-int8"),
        ("int2to4p20-sym-g32-fp16", "blocks4-int8"),
        ("int4to6p20-asym-g32-fp16", "blocks8-int8"),
    ],
)
@pytest.mark.parametrize("kind", ["matmul", "gemm"])
def test_dynamic_activations_use_int8_kernels_within_the_declared_tolerance(
    kind: str, spec: str, form: str, tmp_path: Path
) -> None:
    compiled, error = compile_and_compare(lowered(kind, spec, "dynamic"), kind, tmp_path)
    assert list(compiled.facts["forms"].values()) == [form]
    assert compiled.facts["operations"]["MatMulNBits"] == 1
    assert 1e-6 < error < 2e-2
    assert "int8" in compiled.tolerance.reason


@pytest.mark.parametrize(
    "spec", ["int8-sym-channel-fp16", "int3-sym-channel-fp32", "int4-sym-tensor-bf16", "int4to8p20"]
)
@pytest.mark.parametrize("kind", ["matmul", "gemm"])
def test_dynamic_activations_with_one_scale_a_row_are_integer_products(kind: str, spec: str, tmp_path: Path) -> None:
    compiled, error = compile_and_compare(lowered(kind, spec, "dynamic"), kind, tmp_path)
    assert list(compiled.facts["forms"].values()) == ["rows"]
    assert error < 1e-5


def test_row_codes_are_shared_by_the_products_that_read_them(tmp_path: Path) -> None:
    text = "agraph (float[n, 96] x) => (float[n, 24] y, float[n, 24] z) { y = MatMul (x, w)  z = MatMul (x, b) }"
    model = lowered("matmul", "int8-sym-channel-fp16", "dynamic", text=text, bias=(96, 24))
    compiled, error = compile_and_compare(model, "matmul", tmp_path)
    assert compiled.facts["operations"]["ReduceMax"] == 1
    assert compiled.facts["operations"]["MatMulInteger"] == 2
    assert error < 1e-5


@pytest.mark.parametrize(
    "spec",
    ["int8-sym-channel-fp16", "int4-sym-channel-fp16", "int3-sym-tensor-fp32", "int8-sym-channel-fp32", "int4to8p20"],
)
@pytest.mark.parametrize(("kind", "op"), [("conv", "QLinearConv"), ("gemm", "QGemm"), ("matmul", "QGemm")])
def test_static_activations_become_integer_kernels(kind: str, op: str, spec: str, tmp_path: Path) -> None:
    ranges = {"x": StaticRange(0.03, 128)}
    if kind == "conv":
        ranges["y"] = StaticRange(0.3, 0)
    text = CONV.replace("(float[n, 24, 7, 7] y) { c =", "(float[n, 24, 7, 7] z) { c =").replace(
        "Relu (c)", "Relu (c)  z = Neg (y)"
    )
    model = lowered(kind, spec, "static", ranges, text=text if kind == "conv" else None)
    compiled, error = compile_and_compare(model, kind, tmp_path)
    assert list(compiled.facts["forms"].values()) == ["integer"]
    assert compiled.facts["operations"][op] == 1
    assert error < 2e-2


@pytest.mark.parametrize("spec", ["int2-sym-channel-fp16", "int3-sym-tensor-fp32", "int6-sym-channel-fp32"])
def test_biases_of_narrow_codes_are_as_fine_as_those_of_wide_ones(spec: str, tmp_path: Path) -> None:
    """With codes of 2 bits, multiples of activation scale * weight scale are no good grid for a bias."""
    model = lowered("gemm", spec, "static", {"x": StaticRange(0.03, 128)})
    compiled, error = compile_and_compare(model, "gemm", tmp_path)
    assert compiled.facts["operations"]["QGemm"] == 1
    assert error < 2e-4


def test_a_static_product_of_a_batch_of_matrices_is_an_integer_product(tmp_path: Path) -> None:
    text = MATMUL.replace("float[n, 96]", "float[n, 2, 96]").replace("float[n, 24]", "float[n, 2, 24]")
    model = lowered("matmul", "int8-sym-channel-fp16", "static", {"x": StaticRange(0.03, 128)}, text=text)
    data = {"x": RNG.standard_normal((3, 2, 96)).astype(np.float32)}
    compiled, error = compile_and_compare(model, "matmul", tmp_path, data)
    assert compiled.facts["operations"]["MatMulIntegerToFloat"] == 1
    assert error < 1e-5


def test_static_activations_with_group_scales_stay_exact(tmp_path: Path) -> None:
    model = lowered("matmul", "uint4-asym-g32-fp16", "static", {"x": StaticRange(0.03, 128)})
    compiled, error = compile_and_compare(model, "matmul", tmp_path)
    assert list(compiled.facts["forms"].values()) == ["blocks4"]
    assert error < 1e-5


@pytest.mark.parametrize("kind", ["conv", "gemm"])
def test_weights_that_stay_float_between_static_activations_are_not_quantized_by_onnx_runtime(
    kind: str, tmp_path: Path
) -> None:
    """ONNX Runtime would make int8 codes of them, one scale for all, where what follows is quantized too."""
    ranges = {"x": StaticRange(0.03, 128), "y": StaticRange(0.3, 0)}
    text = CONV.replace("float[n, 24, 7, 7] y", "float[n, 24, 7, 7] z").replace("Relu (c)", "Relu (c)  z = Neg (y)")
    if kind == "gemm":
        text = (
            "agraph (float[n, 96] x) => (float[n, 24] z) { y = Gemm <transB = 1, alpha = 2.0> (x, w, b)  z = Neg (y) }"
        )
        ranges["y"] = StaticRange(0.6, 128)
    model = lowered(kind, "uint4-asym-g32-fp16", "static", ranges, text=text)
    compiled, error = compile_and_compare(model, kind, tmp_path)
    assert list(compiled.facts["forms"].values()) == ["decoded"]
    assert error < 1e-5


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("uint2-asym-g32-fp16", "gather4+blocks4"),
        ("uint4-asym-g32-fp16", "gather4+blocks4"),
        ("uint5-asym-g32-fp16", "decoded"),
        ("int8-sym-channel-fp32", "decoded"),
        ("int2to4p20-sym-g32-fp16", "gather4+blocks4"),
        ("int4to8p20-sym-g32-fp16", "decoded"),
    ],
)
def test_a_tied_table_is_written_once_and_serves_gather_and_product(spec: str, form: str, tmp_path: Path) -> None:
    text = """agraph (int64[n, 3] x) => (float[n, 3, 24] y) {
        e = Gather (w, x)
        t = Transpose <perm = [1, 0]> (w)
        y = MatMul (e, t)
    }"""
    compiled, error = compile_and_compare(lowered("gather", spec, text=text), "gather", tmp_path)
    counts = compiled.facts["operations"]
    assert list(compiled.facts["forms"].values()) == [form]
    assert ("GatherBlockQuantized" in counts, "MatMulNBits" in counts) == (form != "decoded",) * 2
    assert error < 1e-5
    held = sum(
        v.const_value.nbytes for v in ir.load(tmp_path / "model.ort.onnx").graph.initializers.values() if v.const_value
    )
    assert held < 24 * 96 * (parse_spec(spec).bits + 1.6) / 8


@pytest.mark.parametrize("row", [24, 10**12, -25])
def test_an_index_outside_the_table_is_refused_and_negative_ones_count_from_the_end(row: int, tmp_path: Path) -> None:
    model = lowered("gather", "uint4-asym-g32-fp16")
    compiled = OnnxBackend().compile(model, tmp_path, Silent())
    assert list(compiled.facts["forms"].values()) == ["gather4"]
    runnable = OnnxBackend(threads=1).load(tmp_path)
    (name, ids), *_ = feeds("gather").items()
    last, same = (next(iter(runnable.run({name: np.full_like(ids, n)}).values())) for n in (-1, 23))
    np.testing.assert_array_equal(last, same)
    with pytest.raises(Exception, match="out of data bounds"):
        runnable.run({name: np.full_like(ids, row)})


def test_a_gemm_that_matmulnbits_cannot_express_is_decoded(tmp_path: Path) -> None:
    text = GEMM.replace("transB = 1", "transB = 1, alpha = 0.5, beta = 2.0")
    compiled, error = compile_and_compare(lowered("gemm", "uint4-asym-g32-fp16", text=text), "gemm", tmp_path)
    assert list(compiled.facts["forms"].values()) == ["decoded"]
    assert error < 1e-5


def test_what_the_probe_denies_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "runs_matmul_nbits", lambda bits, block, accuracy: False)
    monkeypatch.setattr(probe, "runs_gather_blocks", lambda bits, block: False)
    for kind in ("matmul", "gather"):
        compiled, error = compile_and_compare(lowered(kind, "uint4-asym-g32-fp16"), kind, tmp_path)
        assert list(compiled.facts["forms"].values()) == ["decoded"]
        assert error < 1e-6


def test_the_probe_tells_kernels_from_hope() -> None:
    assert not probe.runs_matmul_nbits(3, 32, probe.EXACT)  # no release runs 3 bits
    assert not probe.runs_matmul_nbits(4, 48, probe.EXACT)
    assert probe.runs_matmul_nbits(4, 32, probe.EXACT)
    assert probe.runs_gather_blocks(4, 32)
    assert isinstance(probe.runs_row_products(), bool)


def test_missing_fusions_are_noted_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes: list[str] = []

    class Listener(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    form = fast_form(lowered("matmul", "uint4-asym-g32-fp16").ir)
    monkeypatch.setattr(backend, "fast_form", lambda _: replace(form, expected=Counter({"QGemm": 2})))
    compiled = OnnxBackend().compile(lowered("matmul", "uint4-asym-g32-fp16"), tmp_path, Listener())
    assert compiled.facts["unfused"] == {"QGemm": {"expected": 2, "found": 0}}
    assert notes == ["QGemm: 0 of 2 were fused by ONNX Runtime"]


def test_large_weights_get_a_file_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "_LARGE", 100)
    compiled, _ = compile_and_compare(lowered("matmul", "uint4-asym-g32-fp16"), "matmul", tmp_path)
    assert list(compiled.files) == ["model.ort.onnx", "model.ort.onnx.data"]


def test_the_lowered_model_is_left_alone(tmp_path: Path) -> None:
    model = lowered("matmul", "uint3-asym-g32-fp16")
    before = ir.to_proto(model.ir).SerializeToString(deterministic=True)
    assert fastest_form(model.ir, tmp_path) == tmp_path / "model.ort.onnx"
    assert ir.to_proto(model.ir).SerializeToString(deterministic=True) == before


def test_candidates_are_supported_and_few() -> None:
    for kind in TEXTS:
        proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{TEXTS[kind]}')
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(SHAPES[kind], np.float32), "w"))
        (site,) = find_sites(ir.from_proto(proto))
        for activations in ("float", "static", "dynamic"):
            target: Backend = OnnxBackend(activations)
            plans = target.candidates(site, range(2, 9))
            widths = [plan.weight.bits for plan in plans if plan.weight is not None]
            assert sorted(set(widths)) == list(range(2, 9))
            assert max(widths.count(w) for w in widths) <= 2
            assert all(target.supports(site, plan) is None for plan in plans)
            asked = {plan.activation for plan in plans}
            product = kind in ("matmul", "gemm")
            assert asked == {activations if product or (kind, activations) == ("conv", "static") else "float"}


def test_what_is_not_supported_has_a_reason() -> None:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{CONV}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(SHAPES["conv"], np.float32), "w"))
    (site,) = find_sites(ir.from_proto(proto))
    assert "dynamic activations are for MatMul" in str(OnnxBackend().supports(site, SitePlan(None, "dynamic")))
    assert "12 bits" in str(OnnxBackend().supports(site, SitePlan(parse_spec("int8to12p10"))))
    for text in ("int4to8p10-g16", "int4to6p10-asym-g16"):
        assert OnnxBackend().supports(site, SitePlan(parse_spec(text))) is None
    assert "12 bits" in str(OnnxBackend().supports(site, SitePlan(parse_spec("int12"))))
    assert OnnxBackend().supports(site, SitePlan(None)) is None
    with pytest.raises(BadOption, match="unknown activation mode 'sometimes'"):
        OnnxBackend("sometimes")
    with pytest.raises(PassRefused, match="not lowered"):
        OnnxBackend().compile(Model(ir.from_proto(proto), plan=Plan()), Path(), Silent())
