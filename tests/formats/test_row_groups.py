"""Groups of rows: the groups of columns of the transposed matrix, wherever granularities matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from qcompiler.backends.onnx.backend import fastest_form
from qcompiler.backends.reference import group_sums
from qcompiler.backends.tvm.backend import CpuBackend
from qcompiler.budget import lowered_bytes, stored_bytes
from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import Int, PerGroup, PerRowGroup, QuantSpec, UInt, parse_spec, spread
from qcompiler.formats.fit import METHODS, Method, quantize
from qcompiler.formats.scales import with_scales_that_fit
from qcompiler.graph.functions import read_weight
from qcompiler.graph.sites import find_sites
from qcompiler.measure.proxy import column_costs
from qcompiler.measure.runner import Runner
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.decoupleq import alternate
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.gptq_core import factorize, gptq_round, hessian_loss
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.round.refine import refine, refine_scales
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent
from tests.passes.round.small_models import build, cnn, mlp, planned
from tests.passes.round.test_gptq_core import problem
from tests.properties.test_formats import MATRICES


@given(MATRICES, st.integers(1, 40), st.integers(2, 8), st.booleans(), st.sampled_from(METHODS), st.booleans())
@settings(deadline=None)
def test_rows_of_the_transposed_are_columns(
    w: np.ndarray, size: int, bits: int, symmetric: bool, method: Method, weighted: bool
) -> None:
    fmt = Int(bits) if symmetric else UInt(bits)
    importance = np.random.default_rng(0).uniform(0, 1, w.shape) if weighted else None
    by_column = quantize(w, QuantSpec(fmt, PerGroup(size), symmetric), method, importance)
    turned = None if importance is None else importance.T
    by_row = quantize(w.T, QuantSpec(fmt, PerRowGroup(size), symmetric), method, turned)
    np.testing.assert_array_equal(by_row.codes, by_column.codes.T)
    np.testing.assert_array_equal(by_row.scale, by_column.scale.T)
    np.testing.assert_array_equal(by_row.decode(), by_column.decode().T)
    assert by_row.stored_bits == by_column.stored_bits
    assert by_row.scale.shape == by_row.spec.granularity.grid(*by_row.shape)


def test_large_matrices_are_decoded_in_parts() -> None:
    w = np.random.default_rng(0).standard_normal((5000, 300)).astype(np.float32)
    q = quantize(w, parse_spec("uint4-asym-r48"), "minmax")
    assert q.zero is not None
    scale, zero = (spread(v, q.spec, 300, 5000) for v in (q.scale, q.zero))
    np.testing.assert_array_equal(q.decode(), (q.codes.astype(np.float32) - zero) * scale)
    with pytest.raises(ValueError, match="how many rows"):
        spread(q.scale, q.spec, 300)


def test_names_and_what_cannot_be() -> None:
    assert str(parse_spec("uint3-asym-r64")) == "uint3-asym-r64-fp16"
    with pytest.raises(BadOption, match="not positive"):
        parse_spec("int4-r0")
    with pytest.raises(BadOption, match="along the columns"):
        parse_spec("int4to8p10-r32")


def test_measures_see_the_groups() -> None:
    w = np.random.default_rng(0).standard_normal((12, 10)).astype(np.float32)
    w[:, 3] *= 100
    curvature = np.ones((1, 10))
    rows, columns = (column_costs(w, curvature, kind(4)) for kind in (PerRowGroup, PerGroup))
    assert rows[[2, 4]].max() < 0.01 * columns[2]  # the large column is alone
    tiny = np.float32(1e-9) * w
    assert with_scales_that_fit(tiny, [parse_spec("int8-r4")])[0].scale_dtype == "float32"


@pytest.mark.parametrize("name", ["uint3-asym-r5-fp16", "int2-sym-r4-fp32", "int3-sym-tensor-fp16"])
def test_every_step_lowers_the_loss(name: str) -> None:
    w, gram = problem()
    factor = factorize(gram)
    start = quantize(w, parse_spec(name))

    def loss(q: Any) -> float:
        return float(hessian_loss(q.decode() - w, factor.hessian).sum())

    (rounded,) = gptq_round(w, factor, [start])
    pull = (w - rounded.decode()) @ factor.hessian[0]
    stepped = refine_scales(rounded, factor.hessian, pull)
    (refined,) = refine(w, factor.hessian, [rounded], 2)
    (alternated,) = alternate(w, factor, [rounded], 2)
    assert loss(rounded) < loss(start)
    assert loss(stepped) < loss(rounded)
    assert loss(refined) < loss(stepped)
    assert loss(alternated) < loss(rounded)


def test_scales_of_groups_over_several_blocks() -> None:
    parts = [problem(3, 9, seed) for seed in range(4)]
    w = np.concatenate([p[0] for p in parts])
    factor = factorize(np.stack([p[1] for p in parts]))
    (rounded,) = gptq_round(w, factor, [quantize(w, parse_spec("int3-r5"))])  # the second group is of two blocks
    pull = np.concatenate([(w - rounded.decode())[3 * b : 3 * b + 3] @ factor.hessian[b] for b in range(4)])
    found = refine_scales(rounded, factor.hessian, pull)
    losses = [hessian_loss(q.decode() - w, factor.hessian).sum() for q in (rounded, found)]
    assert losses[1] < losses[0]


def batched() -> Any:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((3, 8, 12)).astype(np.float32)}
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    x = rng.standard_normal((3, 5, 8)).astype(np.float32)
    return build([node], weights, {"x": [3, 5, 8]}, ["y"], {"x": x})


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ()])
@pytest.mark.parametrize(
    ("make", "spec"),
    [(mlp, "uint4-asym-r16-fp16"), (mlp, "int3-sym-r7-fp32"), (cnn, "uint4-asym-r3-fp16"), (batched, "uint4-asym-r4"),
     (mlp, "uint4-asym-r100"), (mlp, "int2-sym-r1-bf16")],
)  # fmt: skip
def test_the_graph_holds_what_was_rounded(make: Any, spec: str, rounding: Any, tmp_path: Any) -> None:
    model = planned(make(), spec)
    rounding.run(model, Silent())
    changed = {site.name: (site, model.weights[site.name].decode()) for site in find_sites(model.ir)}
    counted = stored_bytes(model)
    assert model.calibration is not None
    feed = next(iter(model.calibration.batches(3)))
    float_model = model.clone()
    for site, matrix in changed.values():
        value = float_model.graph.initializers[str(site.weight.name)]
        value.const_value = ir.tensor(site.from_matrix(matrix), name=value.name)
    wanted = Runner(float_model.ir)(feed)["y"]
    InsertQDQ().run(model, Silent())
    assert lowered_bytes(model.ir) == counted
    np.testing.assert_allclose(Runner(model.ir)(feed)["y"], wanted, rtol=1e-4, atol=1e-5)
    read = [read_weight(value) for node in model.graph for value in node.inputs]
    packed = {weight.site: weight for weight in read if weight is not None}
    for name, (_, matrix) in changed.items():
        np.testing.assert_allclose(packed[name].qtensor().decode(), matrix, rtol=1e-6)
    session = ort.InferenceSession(str(fastest_form(model.ir, tmp_path)), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(np.asarray(session.run(["y"], feed)[0]), wanted, rtol=1e-3, atol=1e-4)


def test_refusals() -> None:
    model = planned(batched(), "uint4-asym-r5")
    Nearest().run(model, Silent())
    with pytest.raises(PassRefused, match="do not divide matrices of 12 rows"):
        InsertQDQ().run(model, Silent())
    site = find_sites(mlp().ir)[0]
    reason = CpuBackend().supports(site, SitePlan(parse_spec("uint4-asym-r32")))
    assert reason is not None
    assert "before they are scaled" in reason
    q = quantize(site.matrix(), parse_spec("uint4-asym-r8"))
    with pytest.raises(ValueError, match="scaled before"):
        group_sums(np.ones((1, site.columns), np.int8), q)
