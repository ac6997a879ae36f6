"""AdaRound, AdaQuant and AutoRound bring segments closer to the float model than rounding to nearest does."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from qcompiler.errors import BadOption, MissingExtra, PassRefused
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.adaquant import AdaQuant
from qcompiler.passes.round.adaround import AdaRound
from qcompiler.passes.round.autoround import AutoRound
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.round.tune import Tune
from qcompiler.pipeline import Pass
from qcompiler.progress import Silent
from tests.passes.round.small_models import build, cnn, mlp, planned

torch = pytest.importorskip("torch")
METHODS: list[Pass] = [AdaRound(steps=120, rate=3e-2), AdaQuant(steps=60, rate=1e-2), AutoRound(steps=60)]
names = [method.registered_name() for method in METHODS]


def error(model: Model, count: int = 8) -> float:
    """Of the lowered model on its last samples, relative to the power of the output."""
    assert model.calibration is not None
    lowered = model.clone()
    InsertQDQ().run(lowered, Silent())
    exact, found = Runner(model.ir), Runner(lowered.ir)
    feeds = list(model.calibration.part(model.calibration.count - count, model.calibration.count).batches(1))
    pairs = [(exact(feed)["y"], found(feed)["y"]) for feed in feeds]
    return sum(float(np.square(a - b).sum()) for a, b in pairs) / sum(float(np.square(a).sum()) for a, _ in pairs)


def rounded(make: Any, method: Pass, spec: str) -> Model:
    model = planned(make(48), spec)
    whole = model.calibration
    assert whole is not None
    model.calibration = whole.take(40)  # the last eight are only judged by
    method.run(model, Silent())
    model.calibration = whole
    return model


@pytest.mark.parametrize("method", METHODS, ids=names)
@pytest.mark.parametrize(("make", "spec"), [(mlp, "int3-sym-channel-fp32"), (cnn, "uint4-asym-channel-fp32"),
                                            (mlp, "uint2-asym-g12-fp16")])  # fmt: skip
def test_better_than_nearest_on_data_not_seen(method: Pass, make: Any, spec: str) -> None:
    assert error(rounded(make, method, spec)) < 0.9 * error(rounded(make, Nearest(), spec))


@pytest.mark.parametrize("method", METHODS, ids=names)
def test_eight_bits_have_nothing_to_gain(method: Pass) -> None:
    """The control: where rounding loses nothing, learning it does no harm."""
    assert error(rounded(mlp, method, "int8-sym-channel-fp32")) < 1.05 * error(
        rounded(mlp, Nearest(), "int8-sym-channel-fp32")
    )


@pytest.mark.parametrize("method", METHODS, ids=names)
def test_it_goes_on_from_codes_that_are_there_and_never_makes_a_segment_worse(method: Pass) -> None:
    model = planned(cnn(16), "int3-sym-channel-fp32")
    GPTQ().run(model, Silent())
    report = method.run(model, Silent())
    found = report.metrics["segments"]
    assert found
    assert all(entry["after"] <= entry["before"] for entry in found.values())


@pytest.mark.parametrize(("count", "held_back"), [(1, 0), (3, 1), (16, 2)])
def test_it_says_how_many_samples_it_is_judged_by(count: int, held_back: int) -> None:
    model = planned(cnn(count), "int3-sym-channel-fp32")
    found = METHODS[0].run(model, Silent()).metrics["segments"]
    assert {entry["held_back"] for entry in found.values()} == {held_back}


def test_adaround_moves_no_code_by_more_than_one() -> None:
    learned, nearest = (rounded(mlp, m, "int3-sym-channel-fp32") for m in (METHODS[0], Nearest()))
    for site in find_sites(learned.ir):
        moved = learned.weights[site.name].codes.astype(int) - nearest.weights[site.name].codes
        assert abs(moved).max() <= 1
        assert moved.any()
        np.testing.assert_array_equal(learned.weights[site.name].scale, nearest.weights[site.name].scale)


def test_soft_codes_end_at_whole_numbers() -> None:
    from qcompiler.passes.round.learned_codes import SoftCodes

    rng = np.random.default_rng(0)
    exact = rng.uniform(-4, 3, (40, 30)).astype(np.float32)
    nearest = np.clip(np.rint(exact), -4, 3).astype(np.int8)
    soft = SoftCodes(exact, nearest, (-4, 3))
    np.testing.assert_allclose(soft.present(), exact, atol=0.011)
    np.testing.assert_array_equal(
        soft.final()[np.abs(exact - np.rint(exact)) < 0.45], nearest[np.abs(exact - np.rint(exact)) < 0.45]
    )
    adam = torch.optim.Adam([soft.parameter], lr=3e-2)
    for step in range(500):
        soft.press(max(0.0, step / 500 - 0.2) / 0.8)
        soft.collect(1e-5 * rng.standard_normal(exact.shape).astype(np.float32))
        adam.step()
    assert (np.abs(soft.present() - np.rint(soft.present())) < 1e-3).mean() > 0.9


def test_the_same_seed_gives_the_same_codes() -> None:
    found = [rounded(mlp, AutoRound(steps=20, samples=16), "int3-sym-channel-fp32").weights for _ in range(2)]
    for name, tensor in found[0].items():
        np.testing.assert_array_equal(tensor.codes, found[1][name].codes)


@pytest.mark.parametrize("method", METHODS, ids=names)
def test_refusals(method: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PassRefused, match="data"):
        method.requires(replace(mlp(), calibration=None))
    with pytest.raises(PassRefused, match="lowered"):
        method.requires(replace(mlp(), lowered=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="torch"):
        method.requires(mlp())


@pytest.mark.parametrize("method", METHODS, ids=names)
@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"samples": -3}, {"rate": -1.0}, {"rate": float("nan")},
                                   {"rate": float("inf")}, {"seed": -1}], ids=str)  # fmt: skip
def test_wrong_options_are_named(method: Pass, wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=f"option '{next(iter(wrong))}'"):
        replace(method, **wrong).requires(mlp())


def test_adaround_needs_time_behind_its_warm_up() -> None:
    with pytest.raises(BadOption, match="option 'warm'"):
        AdaRound(warm=1.0).requires(mlp())


@pytest.mark.parametrize("method", [*METHODS, Tune(epochs=1)], ids=[*names, "tune"])
@pytest.mark.parametrize("end", ["ArgMax", "Log"])
def test_outputs_without_gradients_change_nothing(method: Pass, end: str) -> None:
    """Integers have none, the logarithms of negative numbers have NaN."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((12, 10)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="fc"), helper.make_node(end, ["h"], ["a"]),
             helper.make_node("Cast", ["a"], ["y"], to=TensorProto.FLOAT)]  # fmt: skip
    data = {"x": rng.standard_normal((16, 12)).astype(np.float32)}
    model = planned(build(nodes, weights, {"x": ["n", 12]}, ["y"], data), "int3-sym-channel-fp32")
    Nearest().run(model, Silent())
    codes = model.weights["fc"].codes.copy()
    assert method.run(model, Silent()).changed == 0
    np.testing.assert_array_equal(model.weights["fc"].codes, codes)
