"""Nearest, GPTQ and BiasCorrection on whole small models."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.budget import lowered_bytes, stored_bytes
from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, NotFinite, PassRefused
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.bias import has_bias
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round import gptq
from qcompiler.passes.round.activation_ranges import ActivationRanges
from qcompiler.passes.round.bias_correction import BiasCorrection
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.progress import Silent
from tests.passes.round.small_models import cnn, mlp, planned


def outputs(model: Model, lowered: bool = True) -> np.ndarray:
    copy = model.clone()
    if lowered:
        InsertQDQ().run(copy, Silent())
    runner = Runner(copy.ir)
    assert model.calibration is not None
    return np.concatenate([runner(feed)["y"] for feed in model.calibration.batches(8)])


def error(model: Model) -> float:
    return float(((outputs(model) - outputs(model, lowered=False)) ** 2).mean())


def test_nearest_fills_the_planned_sites_only() -> None:
    model = planned(mlp(), "int4-sym-channel-fp32")
    first, second = find_sites(model.ir)
    model.plan = model.plan.with_sites({second.name: type(model.plan.sites[second.name])(None)})
    report = Nearest().run(model, Silent())
    assert list(model.weights) == [first.name]
    assert report.changed == 1
    expected = quantize(first.matrix(), model.weights[first.name].spec)
    np.testing.assert_array_equal(model.weights[first.name].codes, expected.codes)


@pytest.mark.parametrize("spec", ["int3-sym-channel-fp32", "int3to5p25-sym-g8-fp16"])
def test_importance_lowers_the_output_error(spec: str) -> None:
    errors = []
    for importance in ("none", "activations"):
        model = planned(mlp(), spec)
        Nearest(importance=importance).run(model, Silent())
        errors.append(error(model))
    assert errors[1] < errors[0]


def test_moments_that_overflow_name_the_site() -> None:
    model = planned(mlp(), "int4-sym-g8-fp32")
    value = model.graph.initializers["fc1.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1e30), name=value.name)
    with pytest.raises(NotFinite, match="fc2: importance must be finite"), np.errstate(over="ignore", invalid="ignore"):
        Nearest(importance="moments").run(model, Silent())


def test_nearest_importance_reaches_convolutions() -> None:
    model = planned(cnn(), "int3-sym-channel-fp32")
    Nearest(importance="activations").run(model, Silent())
    assert len(model.weights) == 4


@pytest.mark.parametrize(
    ("make", "spec"), [(mlp, "uint3-asym-g8-fp16"), (cnn, "int4-sym-channel-fp32"), (mlp, "int3to5p20-g8")]
)
def test_gptq_beats_nearest(make: Any, spec: str) -> None:
    near, better = planned(make(), spec), planned(make(), spec)
    Nearest().run(near, Silent())
    report = GPTQ().run(better, Silent())
    assert error(better) < 0.8 * error(near)
    assert set(report.metrics["relative_error"]) == set(better.weights)
    assert all(v["error"] <= v["nearest"] for v in report.metrics["relative_error"].values())


def test_following_the_float_stream_helps_at_the_output() -> None:
    errors = {}
    for follow in (0.0, 0.5):
        model = planned(mlp(samples=96), "int3-sym-channel-fp32")
        GPTQ(follow=follow, samples=96).run(model, Silent())
        errors[follow] = error(model)
    assert errors[0.5] < errors[0.0]


def test_gptq_is_deterministic_and_not_sequential_on_request() -> None:
    codes = []
    for sequential in (True, True, False):
        model = planned(cnn(), "int4-sym-channel-fp32")
        GPTQ(sequential=sequential).run(model, Silent())
        codes.append(np.concatenate([q.codes.reshape(-1) for q in model.weights.values()]))
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()


@pytest.mark.parametrize(
    ("make", "spec"),
    [(mlp, "uint4-asym-g8-fp16"), (mlp, "int3-sym-channel-fp32"), (cnn, "int4-sym-channel-fp32"),
     (mlp, "int4-sym-tensor-fp32"), (mlp, "int3to5p20-g8")],
)  # fmt: skip
def test_rows_in_parts_come_out_as_together(make: Any, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = planned(make(), spec), planned(make(), spec)
    report = GPTQ().run(whole, Silent())
    monkeypatch.setattr(gptq, "_PART", 100)  # weights: a few rows
    in_parts = GPTQ().run(parts, Silent())
    for name, tensor in whole.weights.items():
        other = parts.weights[name]
        assert other.codes.shape == tensor.codes.shape
        assert (other.codes != tensor.codes).mean() < 0.02  # a sum in another order may turn a tie
        assert (other.zero is None) == (tensor.zero is None)
        errors = (in_parts.metrics["relative_error"][name], report.metrics["relative_error"][name])
        assert errors[0]["error"] <= errors[1]["error"] * 1.001


@pytest.mark.parametrize(
    "options", [{"damping": -0.1}, {"damping": float("nan")}, {"follow": 1.5}, {"sweeps": -1}, {"samples": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="gptq"):
        GPTQ(**options)


def test_eight_bits_and_more_return_the_weights() -> None:
    model = planned(mlp(), "int16-sym-channel-fp32")
    GPTQ(follow=0.0).run(model, Silent())
    for site in find_sites(model.ir):
        np.testing.assert_allclose(model.weights[site.name].decode(), site.matrix(), atol=1e-3)


@pytest.mark.parametrize("activation", ["float", "static"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_bias_correction_restores_the_means(make: Any, activation: Any) -> None:
    model = planned(make(), "int3-sym-channel-fp32", activation)
    Nearest().run(model, Silent())
    ActivationRanges("minmax").run(model, Silent())
    reference = outputs(model, lowered=False)
    axes = tuple(range(reference.ndim - 1))

    def offset() -> float:
        return float(np.abs((outputs(model) - reference).mean(axes)).max())

    before, spread_before = offset(), (outputs(model) - reference).std()
    report = BiasCorrection(samples=1000, create=True).run(model, Silent())
    assert report.changed == len(model.weights)
    assert offset() < 0.5 * before  # the median may be preferred to the mean
    assert (outputs(model) - reference).std() < 1.5 * spread_before


@pytest.mark.parametrize("create", [False, True])
def test_bias_correction_makes_no_biases_unless_told_to(create: bool) -> None:
    model = planned(mlp(), "int3-sym-channel-fp32")
    Nearest().run(model, Silent())
    bare = {site.name for site in find_sites(model.ir) if not has_bias(site)}
    assert bare
    report = BiasCorrection(create=create).run(model, Silent())
    assert bare.isdisjoint(model.bias_shift) == (not create)
    assert {refusal.where for refusal in report.refused} == (set() if create else bare)


@pytest.mark.filterwarnings("error")
def test_bias_correction_of_enormous_data_is_silent() -> None:
    model = planned(cnn(), "int4-sym-channel-fp32")
    assert model.calibration is not None
    feeds = [{name: 1e25 * array for name, array in feed.items()} for feed in model.calibration.batches(8)]
    model.calibration = Calibration.from_iterable(feeds, model.ir)
    Nearest().run(model, Silent())
    report = BiasCorrection(create=True).run(model, Silent())
    assert report.changed == len(model.weights)


@pytest.mark.parametrize("activation", ["float", "static"])
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("two_widths", [False, True])
def test_what_is_counted_before_lowering_is_what_the_file_holds(make: Any, activation: Any, two_widths: bool) -> None:
    single = "uint5-asym-g32-fp16" if make is mlp else "int4-sym-channel-fp32"
    model = planned(make(), "int3to5p20-sym-g8-fp16" if two_widths else single, activation)
    Nearest().run(model, Silent())
    ActivationRanges("minmax").run(model, Silent())
    BiasCorrection().run(model, Silent())
    counted = stored_bytes(model)
    InsertQDQ().run(model, Silent())
    assert lowered_bytes(model.ir) == counted


def test_passes_refuse_what_they_cannot_do() -> None:
    model = planned(mlp(), "int4-sym-channel-fp32")
    with pytest.raises(PassRefused, match="nothing is quantized"):
        BiasCorrection().requires(model)
    Nearest().run(model, Silent())
    model.calibration = None
    for item in (GPTQ(), BiasCorrection(), Nearest(importance="activations"), Nearest(importance="fisher")):
        with pytest.raises(PassRefused, match="calibration data"):
            item.requires(model)
    Nearest().requires(model)
    InsertQDQ().run(model, Silent())
    for item in (GPTQ(), Nearest(), BiasCorrection(), ActivationRanges()):
        with pytest.raises(PassRefused, match="lowered"):
            item.requires(model)
