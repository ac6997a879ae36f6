"""Which values get a grid, which grid, and that ONNX Runtime then runs on integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper

from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.activation_ranges import ActivationRanges
from qcompiler.passes.round.histograms import Histogram, static_range
from qcompiler.passes.round.nearest import Nearest
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent
from tests.passes.round.small_models import build, cnn, mlp, planned


def ranged(method: str = "minmax") -> Model:
    model = planned(cnn(), "int8-sym-channel-fp32", "static")
    Nearest().run(model, Silent())
    ActivationRanges(method).run(model, Silent())  # type: ignore[arg-type]
    return model


def test_every_convolution_becomes_an_integer_kernel(tmp_path: Path) -> None:
    model = ranged()
    InsertQDQ().run(model, Silent())
    ir.save(model.ir, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    ops = Counter(node.op_type for node in ir.load(tmp_path / "fused.onnx").graph)
    assert ops["QLinearConv"] == 3
    assert ops["QLinearAdd"] == 1
    assert ops["QLinearGlobalAveragePool"] == 1
    assert not ops["Clip"]
    assert not ops["Conv"]


def test_values_behind_the_clips_are_chosen_and_the_output_is_not() -> None:
    model = ranged()
    assert list(model.ranges) == ["x", "b", "d", "e", "f", "g", "h"]
    assert model.ranges["b"].zero == model.ranges["d"].zero == 0
    assert np.float32(255) * np.float32(model.ranges["b"].scale) <= 6
    assert model.ranges["h"] == model.ranges["g"]  # Flatten only moves codes
    ActivationRanges("minmax", outputs=True).run(model, Silent())
    assert "y" in model.ranges


def test_minmax_covers_calibration() -> None:
    model = planned(mlp(), "int8-sym-channel-fp32", "static")
    ActivationRanges("minmax").run(model, Silent())
    assert list(model.ranges) == ["x", "r"]
    assert model.calibration is not None
    seen = [Runner(model.ir, outputs=["x", "r"])(feed) for feed in model.calibration.batches(8)]
    for name, found in model.ranges.items():
        values = np.concatenate([s[name].reshape(-1) for s in seen])
        assert found.low - found.scale <= values.min()
        assert values.max() <= found.high + found.scale


def test_no_static_site_no_ranges() -> None:
    model = planned(cnn(), "int8-sym-channel-fp32")
    assert ActivationRanges().run(model, Silent()).changed == 0
    assert not model.ranges


def test_clips_not_around_zero_are_not_absorbed() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 1, 1)).astype(np.float32),
        "low": np.array(1, np.float32),
        "high": np.array(2, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="c"),
        helper.make_node("Clip", ["a", "low", "high"], ["y"], name="clip"),
    ]
    data = {"x": rng.standard_normal((4, 3, 5, 5)).astype(np.float32)}
    model = planned(build(nodes, weights, {"x": [4, 3, 5, 5]}, ["y"], data), "int8-sym-channel-fp32", "static")
    ActivationRanges("minmax").run(model, Silent())
    assert list(model.ranges) == ["x", "a"]


def test_least_error_clips_rare_outliers_and_keeps_uniform_data_whole() -> None:
    rng = np.random.default_rng(0)
    for x, share in ((np.append(rng.standard_normal(200_000), 60.0), 0.95), (rng.uniform(-3, 3, 200_000), 1.0)):
        histogram = Histogram.between(float(x.min()), float(x.max()))
        histogram.add(x)
        low, high = histogram.least_error()
        assert high < share * x.max() if share < 1 else high == pytest.approx(x.max())

        def error(low: float, high: float, x: np.ndarray = x) -> float:
            grid = static_range(low, high)
            codes = np.clip(np.rint(x / grid.scale) + grid.zero, 0, 255)
            return float((((codes - grid.zero) * grid.scale - x) ** 2).sum())

        assert error(low, high) <= 1.001 * error(float(x.min()), float(x.max()))


def test_percentile_leaves_out_its_share() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    histogram = Histogram.between(-1, 1)
    histogram.add(x)
    low, high = histogram.percentile(90)
    assert low == pytest.approx(-0.9, abs=0.01)
    assert high == pytest.approx(0.9, abs=0.01)
    assert histogram.percentile(100) == (-1, 1)


def test_static_range_holds_zero_and_its_limit() -> None:
    assert static_range(2.0, 5.0).low == 0
    found = static_range(-1.0, 3.0)
    assert (found.zero - round(found.zero)) == 0
    assert found.low == pytest.approx(-1, abs=found.scale)
    assert static_range(0.0, 0.0).scale == 1
    for limit in (6.0, 1.1, 0.3):
        assert np.float32(255) * np.float32(static_range(0, 9, limit).scale) <= np.float32(limit)


def test_search_is_no_worse_than_minmax_on_its_judges() -> None:
    errors = []
    for method in ("minmax", "search"):
        model = ranged(method)
        exact = Runner(model.ir)
        InsertQDQ().run(model, Silent())
        assert model.calibration is not None
        found = Runner(model.ir)
        total = 0.0
        for feed in model.calibration.batches(1):
            y = exact(feed)["y"]
            total += float(((found(feed)["y"] - y) ** 2).sum() / (y**2).sum())
        errors.append(total)
    assert errors[1] <= errors[0]


def test_a_float_site_next_to_static_ones_keeps_its_input() -> None:
    model = planned(cnn(), "int8-sym-channel-fp32", "static")
    last = find_sites(model.ir)[-1]
    model.plan = model.plan.with_sites({last.name: SitePlan(None)})
    ActivationRanges("minmax").run(model, Silent())
    assert "x" in model.ranges
    assert "y" not in model.ranges
