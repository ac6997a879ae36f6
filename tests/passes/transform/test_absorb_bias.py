from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from qcompiler.errors import BadOption, PassRefused
from qcompiler.measure.runner import Runner
from qcompiler.measure.statistics import channel_statistics
from qcompiler.model import Model
from qcompiler.passes.transform.absorb_bias import AbsorbBias
from qcompiler.pipeline import PassReport, Pipeline
from tests.passes.round.small_models import build, mlp


def net(pads: int = 0) -> Model:
    """x -> Conv (large biases on half of the channels) -> Relu -> Conv."""
    rng = np.random.default_rng(0)
    size = 1 + 2 * pads
    weights = {
        "a.weight": rng.uniform(-1, 1, (8, 3, 1, 1)).astype(np.float32),
        "a.bias": np.array([20.0, 0.0] * 4, np.float32),
        "b.weight": rng.normal(size=(5, 8, size, size)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b.weight"], ["y"], pads=[pads] * 4),
    ]
    x = rng.uniform(-3, 3, (16, 3, 6, 6)).astype(np.float32)
    return build(nodes, weights, {"x": ["batch", 3, 6, 6]}, ["y"], {"x": x})


def run(model: Model, item: AbsorbBias) -> PassReport:
    return Pipeline([item]).run(model)[0]


def feeds(model: Model) -> dict[str, np.ndarray]:
    assert model.calibration is not None
    return dict(next(iter(model.calibration.batches(16))))


def test_ranges_shrink_and_the_data_sees_no_difference() -> None:
    model = net()
    data = feeds(model)
    before, range_before = Runner(model.ir)(data)["y"], channel_statistics(model, ["r"], 1)["r"]
    report = run(model, AbsorbBias())
    after, range_after = Runner(model.ir)(data)["y"], channel_statistics(model, ["r"], 1)["r"]
    assert report.metrics["channels"] == {"r": 4}
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    assert range_after.absmax.max() < 0.7 * range_before.absmax.max()
    assert np.allclose(range_after.low[::2], 0.1 * range_before.low[::2], rtol=1e-4)


def test_other_data_may_see_one() -> None:
    """Which is why the pass is not exact."""
    model = net()
    loud = {"x": feeds(model)["x"] * 10}
    before = Runner(model.ir)(loud)["y"]
    run(model, AbsorbBias(margin=0.0))
    assert np.abs(Runner(model.ir)(loud)["y"] - before).max() > 1


def test_what_cannot_be_shifted_is_refused_with_the_reason() -> None:
    report = run(net(pads=1), AbsorbBias())
    assert report.changed == 0
    assert "pads with zeros" in report.refused[0].reason
    assert run(mlp(), AbsorbBias()).changed == 0  # MatMul without bias


def test_options_and_models_that_mean_nothing_are_refused() -> None:
    with pytest.raises(BadOption, match="margin"):
        run(net(), AbsorbBias(margin=1.0))
    bare = net()
    bare.calibration = None
    with pytest.raises(PassRefused, match="calibration data"):
        run(bare, AbsorbBias())
