"""Choosing transforms and rounding by trials: what is tried, what is kept, what is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from qcompiler import registry
from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, NotFinite, PassRefused
from qcompiler.formats.fit import quantize
from qcompiler.measure.cache import Cache
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.search.choose_rounding import ChooseRounding
from qcompiler.passes.search.choose_transforms import ChooseTransforms
from qcompiler.passes.search.held_back import HeldBack
from qcompiler.passes.search.trials import Trial, interactions
from qcompiler.pipeline import Pass, PassReport, parse_pass
from qcompiler.progress import Progress, Silent
from tests.graph.architectures import feeds_for, inject_outliers, llama
from tests.passes.round.small_models import build, cnn, mlp

_GPTQ, _RANGES, _CORRECTION = (f"{name}: samples = 8" for name in ("gptq", "activation-ranges", "bias-correction"))


@dataclass(frozen=True)
class Wreck(Pass):
    """Rounding that is worse than any other."""

    makes_codes: ClassVar[bool] = True

    def run(self, model: Model, progress: Progress) -> PassReport:
        from qcompiler.graph.sites import find_sites

        for site in find_sites(model.ir):
            spec = model.plan.sites[site.name].weight
            assert spec is not None
            model.weights[site.name] = quantize(-site.matrix(), spec)
        return PassReport("wreck", 1)


@dataclass(frozen=True)
class Refuses(Pass):
    """Never runs."""

    makes_codes: ClassVar[bool] = True
    contract: ClassVar[Literal["exact", "lossy"]] = "exact"

    def requires(self, model: Model) -> None:
        raise PassRefused("not here", "everywhere")

    def run(self, model: Model, progress: Progress) -> PassReport:
        raise AssertionError("it refused")


@dataclass(frozen=True)
class Edits(Pass):
    """Changes a weight of the graph."""

    def run(self, model: Model, progress: Progress) -> PassReport:
        value = next(iter(model.graph.initializers.values()))
        assert value.const_value is not None
        value.const_value = ir.tensor(2 * value.const_value.numpy(), name=value.name)
        return PassReport("edits", 1)


@pytest.fixture(autouse=True)
def more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.names("passes"), "wreck", f"{__name__}:Wreck")
    monkeypatch.setitem(registry.names("passes"), "refuses", f"{__name__}:Refuses")
    monkeypatch.setitem(registry.names("passes"), "edits", f"{__name__}:Edits")


def loud_llama() -> Model:
    """A small transformer with outlier channels."""
    graph = llama()
    inject_outliers(graph)
    model = Model(graph)
    model.calibration = Calibration.from_iterable([feeds_for(graph, seed) for seed in range(8)], graph)
    return model


def outputs(model: Model) -> dict[str, np.ndarray]:
    assert model.calibration is not None
    return Runner(model.ir)(next(iter(model.calibration.batches(4, 4))))


def test_rounding_is_never_worse_than_to_nearest() -> None:
    model = mlp()
    Uniform(spec="int3-sym-channel-fp16").run(model, Silent())
    report = ChooseRounding(among=("wreck",), after=("wreck",)).run(model, Silent())
    losses = {tuple(row["steps"]): row["loss"] for row in report.metrics["trials"]}
    assert report.metrics["chosen"] == "nearest"
    assert losses["wreck",] > losses["nearest",] > 0
    assert HeldBack(model).loss(model) == pytest.approx(losses["nearest",])


@pytest.mark.parametrize("make", [mlp, cnn])
def test_the_best_rounding_is_kept_and_refined(make: Callable[[], Model]) -> None:
    model = make()
    data = model.calibration
    Uniform(spec="int3-sym-channel-fp16").run(model, Silent())
    report = ChooseRounding(among=("wreck", _GPTQ), after=(_CORRECTION,)).run(model, Silent())
    losses = {tuple(row["steps"]): row["loss"] for row in report.metrics["trials"]}
    assert len(losses) >= 4
    assert losses[_GPTQ,] < losses["nearest",]
    best = min(losses, key=lambda steps: losses[steps])
    assert report.metrics["chosen"] == " + ".join(best)
    assert HeldBack(model).loss(model) == pytest.approx(losses[best])
    assert model.calibration is data


def test_static_ranges_come_between_rounding_and_refinement() -> None:
    model = cnn()
    Uniform(spec="int8-sym-channel-fp16", activation="static", target="cpu").run(model, Silent())
    report = ChooseRounding(among=(_GPTQ,), then=(_RANGES,), after=(_CORRECTION,)).run(model, Silent())
    assert model.ranges
    rows = {tuple(row["steps"]): row["loss"] for row in report.metrics["trials"]}
    rounded = (_GPTQ, _RANGES)
    assert rows[rounded] > rows[_GPTQ,]  # quantized activations cost something, and are there nevertheless
    assert (*rounded, _CORRECTION) in rows
    chosen = tuple(report.metrics["chosen"].split(" + "))
    assert _RANGES in chosen
    assert HeldBack(model).loss(model) == pytest.approx(rows[chosen])
    assert rows[chosen] == min(loss for steps, loss in rows.items() if _RANGES in steps)


def test_what_is_chosen_is_fitted_on_all_samples_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, told = "gptq: samples = 24", list[str]()
    listening = type("Listening", (Silent,), {"note": lambda self, text: told.append(text)})()
    least = HeldBack.loss
    for outcome, kept in ((0.0, True), (np.inf, False)):
        model, same, less = (mlp(samples=24) for _ in range(3))
        for one in (model, same, less):
            Uniform(spec="int3-sym-channel-fp16").run(one, Silent())
        less.calibration = HeldBack(less).fit
        for one in (same, less):
            parse_pass(steps, "test").run(one, Silent())
        found = iter([1.0, 0.5, outcome])  # to nearest, chosen, once more
        monkeypatch.setattr(HeldBack, "loss", lambda *_, found=found: next(found))
        report = ChooseRounding(among=(steps,), after=(), refit=True).run(model, listening)
        monkeypatch.setattr(HeldBack, "loss", least)
        assert (report.metrics["chosen"], report.metrics["refitted"]) == (steps, kept)
        for name, tensor in (same if kept else less).weights.items():
            assert (model.weights[name].codes == tensor.codes).all()
        assert any((less.weights[name].codes != tensor.codes).any() for name, tensor in same.weights.items())
    assert any("once more with the samples that were held back" in text for text in told)


def test_enough_samples_need_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, losses = cnn(samples=24), iter([1.0, 0.5, 0.4])  # to nearest, chosen, corrected
    Uniform(spec="int3-sym-channel-fp16").run(model, Silent())
    monkeypatch.setattr(HeldBack, "loss", lambda *_: next(losses))
    report = ChooseRounding(among=("gptq: samples = 2",), after=("bias-correction: samples = 2",), refit=True).run(
        model, Silent()
    )
    assert not report.metrics["refitted"]


@pytest.mark.parametrize("step", ["uniform: spec = 'int4-sym-channel-fp16'", "edits"])
def test_steps_that_roundings_cannot_keep_are_refused(step: str) -> None:
    model = mlp()
    Uniform(spec="int3-sym-channel-fp16").run(model, Silent())
    with pytest.raises(BadOption, match="changes the graph or the plan"):
        ChooseRounding(then=(), after=(step,)).run(model, Silent())


def test_where_the_time_ends_first_the_start_is_taken() -> None:
    report = ChooseTransforms(
        among=("scale-fold", "rotate"), start=("rotate",), rounding="nearest", budget=("4bits",), seconds=1e-9
    ).run(loud_llama(), Silent())
    assert report.metrics["chosen"] == "rotate"
    assert [row["steps"] for row in report.metrics["trials"]] == [[]]


def test_plans_that_cannot_be_had_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 0.99, 0.93, 0.95])
    monkeypatch.setattr(HeldBack, "loss", lambda *_: next(losses))
    chooser = ChooseTransforms(
        among=("scale-fold", "rotate"), start=("scale-fold",), rounding="nearest", plan="tune", budget=("4bits",)
    )
    report = chooser.run(loud_llama(), Silent())
    assert (report.metrics["chosen"], report.metrics["decided_by"]) == ("rotate", "rotate")


def test_a_rounding_that_is_nearly_the_best_may_win_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    Uniform(spec="int4-sym-channel-fp16").run(model, Silent())
    # Weights alone: nearest is a little ahead; behind bias correction, GPTQ.
    losses = {"nearest": 1.0, "gptq": 1.2, "nearest, corrected": 0.9, "gptq, corrected": 0.5, "wreck": 9.0}
    names = iter(["nearest", "gptq", "wreck", "nearest, corrected", "gptq, corrected"])
    monkeypatch.setattr(HeldBack, "loss", lambda *_: losses[next(names)])
    report = ChooseRounding(among=("gptq", "wreck"), then=(), after=("bias-correction",)).run(model, Silent())
    assert report.metrics["chosen"] == "gptq + bias-correction"
    assert len(report.metrics["trials"]) == 5  # what is far behind goes no further


def test_a_rounding_that_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    Uniform(spec="int4-sym-channel-fp16").run(model, Silent())
    monkeypatch.setattr(Refuses, "contract", "lossy")
    report = ChooseRounding(among=("refuses", "gptq")).run(model, Silent())
    assert [(r.where, r.reason) for r in report.refused] == [("everywhere", "refuses: not here")]
    assert report.metrics["chosen"].startswith("gptq")


def test_with_too_few_samples_nothing_is_tried() -> None:
    model, told = mlp(samples=3), list[str]()
    listening = type("Listening", (Silent,), {"note": lambda self, text: told.append(text)})()
    report = ChooseTransforms(among=("scale-fold", "smooth"), start=("smooth",)).run(model, listening)
    assert report.metrics["chosen"] == "smooth"
    Uniform(spec="int4-sym-channel-fp16").run(model, Silent())
    report = ChooseRounding(among=("gptq", "wreck"), after=("bias-correction",)).run(model, listening)
    assert report.metrics["chosen"] == "gptq + bias-correction"
    assert [row["loss"] for row in report.metrics["trials"]] == [None, None]
    assert sum("too little data to try anything on (3 " in text for text in told) == 2


def test_transforms_are_chosen_by_the_rounded_loss() -> None:
    model = loud_llama()
    before = outputs(model)
    chooser = ChooseTransforms(
        among=("scale-fold", "smooth", "awq", "rotate"), rounding="nearest", budget=("4bits",), pairs=True
    )
    report = chooser.run(model, Silent())
    rows = report.metrics["trials"]
    losses = {tuple(row["steps"]): row["loss"] for row in rows}
    assert {(), ("scale-fold",), ("smooth",), ("rotate",), ("scale-fold", "smooth")} <= set(losses)
    chosen = tuple(report.metrics["chosen"].split(" + "))
    assert losses[chosen] < 0.9 * losses[()]  # there are outliers to take away
    assert losses[chosen] * 0.99 <= min(losses.values())
    pairs = {(row["first"], row["second"]): row for row in report.metrics["interactions"]}
    row = pairs["scale-fold", "smooth"]
    alone = [np.log(losses[()] / losses[step,]) for step in ("scale-fold", "smooth")]
    assert row["alone"] == pytest.approx(alone)
    assert row["interaction"] == pytest.approx(np.log(losses[()] / losses["scale-fold", "smooth"]) - sum(alone))
    for name, value in outputs(model).items():
        np.testing.assert_allclose(value, before[name], rtol=1e-3, atol=1e-3 * np.abs(before[name]).max())


def test_what_is_close_is_decided_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud_llama()
    plain = {"none": 1.0, "scale-fold": 0.99, "rotate": 0.93, "scale-fold + rotate": 0.95}
    planned = {("rotate",): 2.0, (): 1.5, ("scale-fold",): 1.4}
    losses = iter([*plain.values(), *planned.values()])
    monkeypatch.setattr(HeldBack, "loss", lambda *_: next(losses))
    planner = "uniform: spec = 'int4-sym-channel-fp16'"
    chooser = ChooseTransforms(
        among=("scale-fold", "rotate"), start=("scale-fold",), rounding="nearest", plan=planner, budget=("8bits",)
    )
    report = chooser.run(model, Silent())
    rows = {" + ".join(row["steps"]) or "none": row["loss"] for row in report.metrics["trials"]}
    assert rows == plain | {" + ".join([*steps, planner]): loss for steps, loss in planned.items()}
    assert (report.metrics["chosen"], report.metrics["decided_by"]) == ("scale-fold", f"scale-fold + {planner}")
    assert model.plan.sites == {}  # plans of trials are not the model's


def test_what_is_far_ahead_needs_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([2.0, 1.9, 1.0, 1.5])
    monkeypatch.setattr(HeldBack, "loss", lambda *_: next(losses))
    chooser = ChooseTransforms(
        among=("scale-fold", "rotate"), start=("scale-fold",), rounding="nearest", plan="allocate", budget=("4bits",)
    )
    assert chooser.run(loud_llama(), Silent()).metrics["chosen"] == "rotate"


def test_nothing_is_applied_where_nothing_helps() -> None:
    model = mlp()
    weights = {name: v.const_value for name, v in model.graph.initializers.items()}
    report = ChooseTransforms(among=("scale-fold", "refuses"), rounding="nearest").run(model, Silent())
    assert report.metrics["chosen"] == "none"
    assert {name: v.const_value for name, v in model.graph.initializers.items()} == weights
    refused = [row for row in report.metrics["trials"] if row["refused"]]
    assert [row["steps"] for row in refused] == [["scale-fold"], ["refuses"]]
    assert [row["loss"] for row in refused] == [None, None]
    assert "scale-fold changes nothing" in refused[0]["refused"]


def test_a_model_without_weights_stays_as_it_is() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    model = build([node], {}, {"x": ["n", 4]}, ["y"], {"x": np.ones((8, 4), np.float32)})
    report = ChooseTransforms(among=("awq", "dual-scale"), budget=("4bits",)).run(model, Silent())
    assert report.metrics["chosen"] == "none"


def test_a_step_that_the_numbers_defeat_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflows(*_: object) -> None:
        raise NotFinite("importance must be finite")

    model = loud_llama()
    monkeypatch.setattr("qcompiler.passes.transform.smooth.Smooth.run", overflows)
    report = ChooseTransforms(among=("scale-fold", "smooth"), rounding="nearest").run(model, Silent())
    refused = {tuple(row["steps"]): row["refused"] for row in report.metrics["trials"] if row["refused"]}
    assert refused["smooth",] == "importance must be finite"


def test_without_time_the_start_is_taken_untried() -> None:
    model = loud_llama()
    report = ChooseTransforms(among=("smooth", "scale-fold"), start=("scale-fold",), seconds=0).run(model, Silent())
    assert report.metrics["chosen"] == "scale-fold"
    assert len(report.metrics["trials"]) == 1


def test_trials_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = ChooseTransforms(among=("scale-fold",), rounding="nearest", budget=("3bits",))
    first = loud_llama()
    first.cache = Cache(tmp_path)
    report = chooser.run(first, Silent())
    again = loud_llama()
    again.cache = Cache(tmp_path)
    monkeypatch.setattr(HeldBack, "loss", lambda *_: pytest.fail("measured again"))
    assert chooser.run(again, Silent()).metrics["trials"] == report.metrics["trials"]


def test_interactions_need_all_four_trials() -> None:
    trials = [Trial((), 8.0, 0), Trial(("a",), 4.0, 0), Trial(("b",), 4.0, 0), Trial(("a", "b"), 4.0, 0)]
    (row,) = interactions(trials)
    assert row["interaction"] == pytest.approx(-np.log(2))
    assert interactions(trials[1:]) == []
    assert interactions([*trials[:3], Trial(("a", "b"), float("inf"), 0, "no")]) == []


@pytest.mark.parametrize(
    "text", ["gptq: sweeps", "gptq: swoops = 1", "none-such", "gptq: name = 'x'", "gptq: samples = 'x'"]
)
def test_a_pass_that_is_written_wrongly_is_named(text: str) -> None:
    with pytest.raises(BadOption):
        parse_pass(text, "here")
    with pytest.raises(BadOption):
        ChooseRounding(among=(text,))


@pytest.mark.parametrize("plan", ["gptq", "smooth"])
def test_what_plans_nothing_is_no_planner(plan: str) -> None:
    with pytest.raises(BadOption, match="plans nothing"):
        ChooseTransforms(plan=plan, budget=("4bits",))


def test_a_planner_that_does_not_exist_is_refused_without_a_budget_too() -> None:
    with pytest.raises(BadOption, match="there is no pass 'alocate'"):
        ChooseTransforms(plan="alocate")


def test_options_that_mean_nothing() -> None:
    with pytest.raises(BadOption, match="exact"):
        ChooseTransforms(among=("gptq",))
    with pytest.raises(BadOption, match="rounds nothing"):
        ChooseRounding(among=("smooth",))
    for text in ("tune", "bias-correction", "activation-ranges"):
        with pytest.raises(BadOption, match="rounds nothing"):
            ChooseRounding(among=(text,))
        with pytest.raises(BadOption, match="rounds nothing"):
            ChooseTransforms(rounding=text)
    with pytest.raises(BadOption, match="among"):
        ChooseTransforms(among=("smooth",), start=("rotate",))
    with pytest.raises(BadOption, match="activations"):
        ChooseTransforms(activations="sometimes")
    with pytest.raises(BadOption, match="seconds"):
        ChooseTransforms(seconds=float("nan"))
