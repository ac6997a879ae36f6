"""Tuning brings the outputs closer on held-back data, or changes nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.errors import BadModel, BadOption, MissingExtra, PassRefused
from qcompiler.measure.cache import Cache
from qcompiler.measure.runner import Runner
from qcompiler.model import Model, StaticRange
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.activation_ranges import ActivationRanges
from qcompiler.passes.round.lesson import Lesson
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.passes.round.tune import Tune, _targets
from qcompiler.progress import Silent
from tests.passes.round.small_models import cnn, planned


def rounded(spec: str = "int4-sym-channel-fp32") -> Model:
    model = planned(cnn(40), spec, "static")
    Nearest().run(model, Silent())
    ActivationRanges("minmax").run(model, Silent())
    return model


def error(model: Model) -> float:
    """Of the lowered model on its calibration data, relative to the power of the output."""
    assert model.calibration is not None
    lowered = model.clone()
    InsertQDQ().run(lowered, Silent())
    exact, found, total = Runner(model.ir), Runner(lowered.ir), []
    for feed in model.calibration.batches(1):
        y = exact(feed)["y"]
        total.append(float(np.square(found(feed)["y"] - y).sum() / np.square(y).sum()))
    return float(np.mean(total))


def test_the_twin_computes_what_the_lowered_model_does() -> None:
    pytest.importorskip("torch")
    from qcompiler.passes.round.tuned_twin import TunedTwin

    model = rounded()
    feeds = calibration_feeds(model, 40, 0)
    loss = Lesson(model, feeds).judge(TunedTwin(model, _targets(model)), range(len(feeds)))
    assert loss == pytest.approx(error(model), rel=0.02)


def test_tuning_lowers_the_error_and_keeps_the_codes() -> None:
    pytest.importorskip("torch")
    model = rounded()
    before, codes = error(model), {name: q.codes for name, q in model.weights.items()}
    report = Tune(epochs=12, range_rate=4e-3, scale_rate=2e-3, bias_rate=2e-3).run(model, Silent())
    assert report.metrics["kept"]
    assert error(model) < 0.7 * before
    assert all(model.weights[name].codes is found for name, found in codes.items())
    assert model.ranges["b"].zero == 0
    assert np.float32(255) * np.float32(model.ranges["b"].scale) <= 6
    assert model.ranges["h"] == model.ranges["g"]  # Flatten only moves codes


class Killed(Silent):
    """Progress of a run that is killed after some steps."""

    def __init__(self, after: int) -> None:
        self.after, self.steps, self.notes = after, 0, list[str]()

    def track(self, items: Any, label: str) -> Any:
        for item in items:
            if self.steps == self.after:
                raise KeyboardInterrupt
            self.steps += 1
            yield item

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_killed_run_goes_on_where_it_was_and_a_repeated_one_learns_nothing_anew(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    learn = Tune(epochs=4, scale_rate=2e-3, code_rate=2e-2)
    through = rounded()
    learn.run(through, Silent())
    killed = rounded()
    killed.cache = Cache(tmp_path)
    per_epoch = -(-35 // 4)  # 40 samples, 5 of them held back
    with pytest.raises(KeyboardInterrupt):
        learn.run(killed, Killed(2 * per_epoch + 1))
    progress = Killed(-1)
    learn.run(killed, progress)
    assert progress.steps == 2 * per_epoch - 1
    for name, q in through.weights.items():
        np.testing.assert_array_equal(killed.weights[name].codes, q.codes)
        np.testing.assert_array_equal(killed.weights[name].scale, q.scale)
    again, progress = rounded(), Killed(-1)
    again.cache = Cache(tmp_path)
    learn.run(again, progress)
    assert progress.steps == 0
    for name, q in through.weights.items():
        np.testing.assert_array_equal(again.weights[name].scale, q.scale)


def test_codes_are_learned_if_asked_for() -> None:
    pytest.importorskip("torch")
    model = rounded("int3-sym-channel-fp32")
    before, codes = error(model), {name: q.codes for name, q in model.weights.items()}
    report = Tune(epochs=12, code_rate=3e-2).run(model, Silent())
    assert report.metrics["kept"]
    assert error(model) < before
    assert any((model.weights[name].codes != found).any() for name, found in codes.items())


def test_what_does_not_help_is_not_kept() -> None:
    pytest.importorskip("torch")
    model = rounded("int8-sym-channel-fp32")
    ranges, weights = dict(model.ranges), dict(model.weights)
    report = Tune(epochs=1, bias_rate=50.0).run(model, Silent())
    assert not report.metrics["kept"]
    assert report.changed == 0
    assert (model.ranges, model.weights, model.bias_shift) == (ranges, weights, {})


def test_what_gains_nothing_is_given_up_early_also_when_it_is_repeated(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = rounded("int8-sym-channel-fp32")
    model.cache = Cache(tmp_path)
    per_epoch = -(-35 // 4)
    for patience, steps in ((1, per_epoch), (1, 0), (2, 2 * per_epoch), (0, 35)):
        progress = Killed(-1)
        report = Tune(epochs=4, bias_rate=50.0, patience=patience).run(model, progress)
        assert progress.steps == steps
        assert not report.metrics["kept"]
        told = ["Tuning: stopped, the loss on held-back samples does not fall"]
        assert progress.notes == (told if patience and steps else [])


def test_a_loss_that_has_risen_counts_only_if_that_of_the_mean_has_too() -> None:
    """A place that swings around 0, where the loss is least, is on its way; one that goes away is not."""
    torch = pytest.importorskip("torch")
    from qcompiler.passes.round.patience import Patience

    for places, is_over in (
        ((-1.5, 2.0, -1.0, 1.5), False),
        ((1.5, 2.0, 2.5, 3.0), True),
        ((3.0, 2.0, 9.0, 0.5), False),
    ):
        place = torch.nn.Parameter(torch.tensor([1.0]))
        waiting = Patience(torch.optim.SGD([place]), range(3, 7), lambda at=place: abs(float(at.detach())), 1.0)
        place.data.fill_(99.0)
        assert not waiting.is_over(2)  # of the epoch before
        for number, at in enumerate(places, 3):
            place.data.fill_(at)
            assert waiting.is_over(number) == (is_over and number == 6)
        assert float(place.detach()) == places[-1]


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rounded()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="torch"):
        Tune().requires(model)
    Tune(optional=True).requires(model)
    report = Tune(optional=True).run(model, Silent())
    assert report.changed == 0
    assert "torch" in report.refused[0].reason


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": 0}, {"samples": -3}, {"tokens": 0}, {"scale_rate": float("nan")}, {"seed": -1}],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=f"option '{next(iter(wrong))}'"):
        replace(Tune(), **wrong).requires(rounded())


def test_an_operation_that_has_no_gradient_with_these_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from qcompiler.measure import torch_ops

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("Flatten with five axes")

    monkeypatch.setitem(torch_ops.OPS, "Flatten", fails)
    model = rounded()
    with pytest.raises(BadModel, match="Flatten with five axes"):
        Tune(epochs=1).run(model, Silent())
    report = Tune(epochs=1, optional=True).run(model, Silent())
    assert report.changed == 0
    assert "Flatten with five axes" in report.refused[0].reason


def test_an_infinite_range_is_refused() -> None:
    pytest.importorskip("torch")
    model = rounded()
    model.ranges[next(iter(model.ranges))] = StaticRange(float("inf"), 3)
    with pytest.raises(BadModel, match="infinite"):
        Tune().run(model, Silent())


def test_refusals() -> None:
    with pytest.raises(PassRefused, match="nothing is quantized"):
        Tune().requires(cnn())
    with pytest.raises(PassRefused, match="data"):
        Tune().requires(replace(rounded(), calibration=None))
    with pytest.raises(PassRefused, match="lowered"):
        Tune().requires(replace(rounded(), lowered=True))


def test_ranges_of_their_own_start_where_they_are() -> None:
    pytest.importorskip("torch")
    from qcompiler.passes.round.tuned_twin import Grid

    target = next(t for t in _targets(rounded()) if t.low == 0)
    low, high = Grid(target, StaticRange(4.0 / 255, 0)).found()
    assert float(low) == 0
    assert float(high) == pytest.approx(4.0)
