"""Where a sample is a single row, as many count as one as say as much."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from qcompiler.build.samples import Source, gather
from qcompiler.graph.sites import find_sites
from qcompiler.measure.curvature import fisher
from qcompiler.measure.experiment import Experiment
from qcompiler.measure.samples import samples_for_one
from qcompiler.model import Model
from qcompiler.passes.round import nearest
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.progress import Silent
from tests.passes.round.small_models import build, cnn, mlp, planned, relative_error

FEATURES = 96


def table(rows: int, fixed: int | None = None) -> Model:
    """x [rows, 96] -> 64, Relu, 8; the features are correlated."""
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((FEATURES, FEATURES)) * np.geomspace(0.02, 2, FEATURES)[:, None]
    x = (rng.standard_normal((rows, FEATURES)) @ mix).astype(np.float32)
    weights = {
        "fc1.weight": rng.standard_normal((FEATURES, 64)).astype(np.float32) / 9,
        "fc2.weight": rng.standard_normal((64, 8)).astype(np.float32) / 8,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "fc1.weight"], ["h"], name="fc1"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "fc2.weight"], ["y"], name="fc2"),
    ]
    return build(nodes, weights, {"x": [fixed or "batch", FEATURES]}, ["y"], {"x": x})


@pytest.mark.parametrize(("model", "together"), [(table(8), 128), (table(64, 32), 128), (mlp(), 25), (cnn(), 3)])
def test_rows_decide(model: Model, together: int) -> None:
    """Of the site that has most of them: 36 places of a convolution."""
    assert model.calibration is not None
    assert samples_for_one(model.ir, model.calibration) == together


@pytest.mark.parametrize(("rows", "fixed", "batches", "used"), [
    (20_000, None, 64, 64 * 128), (1000, None, 63, 1000), (50, None, 50, 50), (20_000, 32, 256, 64 * 128),
])  # fmt: skip
def test_all_rows_are_used_in_as_many_batches(rows: int, fixed: int | None, batches: int, used: int) -> None:
    feeds = calibration_feeds(table(rows, fixed), 64, 4096)
    assert (len(feeds), sum(len(feed["x"]) for feed in feeds)) == (batches, used)


def test_losses_and_judgement_see_the_rows() -> None:
    model = table(3000)
    sites = find_sites(model.ir)
    menu = {site.name: planned(table(4), "int4-g32").plan.sites[site.name].weight for site in sites}
    assert Experiment(model, sites, {name: (spec,) for name, spec in menu.items()}).samples == 512
    assert gather(Source(model.calibration), model, 0, Silent()).held.count == 375


def test_second_moments_of_passes_are_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = planned(table(3000), "int4-g32"), list[int | None]()
    known = nearest.grams
    monkeypatch.setattr(nearest, "grams", lambda m, s, n: seen.append(n) or known(m, s, n))
    nearest.Nearest(importance="moments", samples=8).run(model, Silent())
    assert seen == [8 * 128]


def test_gradients_see_the_rows() -> None:
    pytest.importorskip("torch")
    model = table(500)
    assert fisher(model, find_sites(model.ir), samples=8).samples == 500


def test_gptq_gains_from_rows() -> None:
    """Thousands say more than 64: on other rows than those that it was fitted on."""
    whole = table(6000)
    assert whole.calibration is not None
    errors: list[float] = []
    for count in (64, 4000):
        model = planned(whole.clone(), "int3-sym-channel-fp32")
        model.calibration = whole.calibration.take(count)
        GPTQ().run(model, Silent())
        model.calibration = whole.calibration.part(4000, 6000)
        errors.append(relative_error(model))
    assert errors[1] < 0.9 * errors[0]
