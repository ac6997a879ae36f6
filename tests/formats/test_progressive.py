"""Two levels of scales: nothing ever leaves int8, products are integers, and files hold what was counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.backends.onnx.backend import OnnxBackend, fastest_form
from qcompiler.backends.tvm.backend import CpuBackend
from qcompiler.budget import lowered_bytes, stored_bytes
from qcompiler.errors import BadOption
from qcompiler.formats import PerChannel, PerGroup, PerTensor, Progressive, QuantSpec, parse_spec
from qcompiler.formats.fit import METHODS, Method, quantize
from qcompiler.formats.progressive import split_scales
from qcompiler.formats.progressive_fit import row_scales
from qcompiler.graph.functions import read_weight
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent
from tests.passes.round.small_models import cnn, mlp, planned
from tests.properties.test_formats import MATRICES

SPECS = st.builds(
    QuantSpec,
    st.integers(2, 4).map(Progressive),
    st.one_of(st.just(PerTensor()), st.just(PerChannel()), st.integers(1, 40).map(PerGroup)),
    st.just(value=False),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_at_every_scale_and_zero_point_is_an_int8(bits: int) -> None:
    fmt = Progressive(bits)
    seen = 0
    for scale in range(1, fmt.largest_scale + 1):
        lowest, highest = (int(end) for end in fmt.zero_range(np.array(scale, np.float32)))
        assert lowest <= highest
        for zero in range(lowest, highest + 1):
            expanded = [(code - zero) * scale for code in range(fmt.grid.hi + 1)]
            assert min(expanded) >= -128
            assert max(expanded) <= 127
            seen += 1
        for zero in {lowest - 1, highest + 1} & set(range(fmt.grid.hi + 1)):  # and the range is not too narrow
            expanded = [(code - zero) * scale for code in (0, fmt.grid.hi)]
            assert min(expanded) < -128 or max(expanded) > 127
    assert seen > fmt.largest_scale
    assert not np.less_equal(*fmt.zero_range(np.array(fmt.largest_scale + 1, np.float32)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_within_the_protective_range_lose_half_a_step_at_most(bits: int) -> None:
    fmt = Progressive(bits)
    assert Progressive(4).protective == 119  # as in the paper
    rng = np.random.default_rng(bits)
    w = rng.uniform(-fmt.protective, fmt.protective, (400, 8)).astype(np.float32)
    w[:, :2] = np.where(rng.random((400, 2)) < 0.5, -fmt.protective, fmt.protective)
    q = quantize(w, QuantSpec(fmt, PerGroup(4), symmetric=False, scale_dtype="float32"), "minmax")
    steps = np.repeat(q.scale, 4, axis=1)
    # rint of the step itself may cut (2^b - 1) / 2 of a range's ends
    assert (np.abs(q.decode() - w) <= steps / 2 + fmt.grid.hi / 2 + 1e-3).all()


@pytest.mark.parametrize(("reach", "stays"), [(119, True), (120, False)])
def test_the_protective_range_is_what_the_paper_needs(reach: int, stays: bool) -> None:
    """The paper's rule, without limits on zero points: nearest codes stay within int8 up to 119, and no further."""
    low, high = np.meshgrid(np.arange(-reach, 1.0), np.arange(0.0, reach + 1))
    scale = np.maximum(np.rint((high - low) / 15), 1)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    ends = [(np.clip(np.rint(w / scale) + zero, 0, 15) - zero) * scale for w in (low, high)]
    assert (np.min(ends) >= -128 and np.max(ends) <= 127) == stays


@given(SPECS, MATRICES, st.sampled_from(METHODS))
@settings(deadline=None)
def test_both_levels_can_be_told_apart_and_stay_within_int8(spec: QuantSpec, w: np.ndarray, method: Method) -> None:
    q = quantize(w, spec, method)
    assert q.zero is not None
    outer, inner = split_scales(q.scale, spec.scale_dtype)
    np.testing.assert_array_equal(outer * inner, q.scale)
    assert (inner == np.rint(inner)).all()
    assert inner.min() >= 1
    assert inner.max() <= q.spec.format.largest_scale  # type: ignore[attr-defined]
    low, high = Progressive(q.spec.bits).zero_range(inner)
    assert ((low <= q.zero) & (q.zero <= high)).all()
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize("bits", [3, 4])
def test_a_product_with_int8_activations_is_integer_until_the_last_scale(bits: int) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 80)).astype(np.float32)
    q = quantize(w, parse_spec(f"qoq{bits}-asym-g32"))
    a = rng.integers(-127, 128, (5, 80))
    outer, inner = split_scales(q.scale, "float16")
    assert q.zero is not None
    spread = [np.repeat(v, 32, 1)[:, :80].astype(np.int32) for v in (inner, q.zero)]
    expanded = (q.codes.astype(np.int32) - spread[1]) * spread[0]
    later = q.codes.astype(np.int32) * spread[0] - spread[0] * spread[1]  # subtraction after multiplication
    np.testing.assert_array_equal(expanded, later)
    sums = a @ expanded.astype(np.int8).astype(np.int32).T
    np.testing.assert_allclose(sums * outer.T.astype(np.float64), a @ q.decode().T.astype(np.float64), rtol=1e-6)


def test_search_is_better_than_the_rule_of_the_paper() -> None:
    w = np.random.default_rng(0).standard_t(4, (32, 256)).astype(np.float32)
    spec = parse_spec("qoq3-asym-g64")
    errors = {m: float(np.square(quantize(w, spec, m).decode() - w).sum()) for m in METHODS}
    assert errors["mse"] < 0.9 * errors["minmax"]
    powers = {m: float((np.abs(quantize(w, spec, m).decode() - w) ** 0.7).sum()) for m in METHODS}
    assert powers["hqq"] < powers["mse"]
    plain = float(np.square(quantize(w, parse_spec("uint3-asym-g64"), "mse").decode() - w).sum())
    assert errors["mse"] < 1.1 * plain


def test_importance_counts() -> None:
    w = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    importance = np.where(np.arange(64) < 8, 10, 1e-3).astype(np.float32)
    spec = parse_spec("qoq3-asym-channel")
    plain, weighted = (np.square(quantize(w, spec, "mse", i).decode() - w) @ importance for i in (None, importance))
    assert weighted.sum() < plain.sum()


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30, 3e-6, -1e-30])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_constant_and_extreme_rows(value: float, dtype: str) -> None:
    w = np.full((3, 20), value, np.float32)
    q = quantize(w, parse_spec(f"qoq4-asym-g8-{dtype}"))
    assert np.isfinite(q.decode()).all()
    split_scales(q.scale, q.spec.scale_dtype)
    assert (np.abs(w) <= 120 * row_scales(w, q.spec.scale_dtype, 119)).all() or abs(value) > 1e20
    if value in (0.0, -3.0):
        np.testing.assert_allclose(q.decode(), w, rtol=0.08)


@pytest.mark.parametrize(
    ("text", "message"),
    [("qoq4-g128", "has zero points"), ("qoq4-asym-r32", "along the columns"), ("qoq5-asym-g32", "2 to 4 bits")],
)
def test_what_is_no_such_format_says_so(text: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        parse_spec(text)


def test_scales_of_another_format_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="no products"):
        split_scales(np.array([[0.1, 0.2345]], np.float32), "float16")


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ()])
@pytest.mark.parametrize(
    ("make", "spec"),
    [(mlp, "qoq4-asym-g8-fp16"), (mlp, "qoq3-asym-g7-fp32"), (mlp, "qoq4-asym-channel-bf16"),
     (cnn, "qoq4-asym-g4-fp16"), (cnn, "qoq2-asym-tensor-fp32")],
)  # fmt: skip
def test_the_graph_holds_what_was_rounded(make: Any, spec: str, rounding: Any, tmp_path: Any) -> None:
    model = planned(make(), spec)
    rounding.run(model, Silent())
    for q in model.weights.values():
        outer, inner = split_scales(q.scale, q.spec.scale_dtype)
        assert q.zero is not None
        low, high = q.spec.format.zero_range(inner)  # type: ignore[attr-defined]
        assert ((low <= q.zero) & (q.zero <= high)).all()
        np.testing.assert_array_equal(outer * inner, q.scale)
    decoded = {site.name: model.weights[site.name].decode() for site in find_sites(model.ir)}
    counted = stored_bytes(model)
    InsertQDQ().run(model, Silent())
    assert lowered_bytes(model.ir) == counted
    read = [read_weight(value) for node in model.graph for value in node.inputs]
    packed = {weight.site: weight for weight in read if weight is not None}
    for name, matrix in decoded.items():
        np.testing.assert_array_equal(packed[name].qtensor().decode(), matrix)
    assert model.calibration is not None
    feed = next(iter(model.calibration.batches(8)))
    wanted = Runner(model.ir)(feed)["y"]
    session = ort.InferenceSession(str(fastest_form(model.ir, tmp_path)), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(np.asarray(session.run(["y"], feed)[0]), wanted, rtol=1e-4, atol=1e-5)


def test_gptq_chooses_codes_for_these_scales() -> None:
    errors = []
    for rounding in (Nearest(), GPTQ(follow=0.0, sequential=False)):
        model = planned(mlp(), "qoq3-asym-g8")
        rounding.run(model, Silent())
        for q in model.weights.values():
            split_scales(q.scale, "float16")
        assert model.calibration is not None
        feed = next(iter(model.calibration.batches(48)))
        before = Runner(model.ir)(feed)["y"]
        InsertQDQ().run(model, Silent())
        errors.append(float(np.square(Runner(model.ir)(feed)["y"] - before).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_targets() -> None:
    site = find_sites(mlp().ir)[0]
    plan = SitePlan(parse_spec("qoq4-asym-g8"))
    assert OnnxBackend().supports(site, plan) is None
    reason = CpuBackend().supports(site, plan)
    assert reason is not None
    assert "qoq4" in reason
