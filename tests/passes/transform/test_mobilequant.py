"""MobileQuant: exact for any scales, better on held-back samples or nothing; and the parts it is made of."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import BadOption, MissingExtra, PassRefused
from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.activation_ranges import ActivationRanges
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.passes.transform.inputs import after_norm, find_folds, layer_inputs
from qcompiler.passes.transform.learning import static_targets, value_ends
from qcompiler.passes.transform.mobilequant import MobileQuant
from qcompiler.pipeline import Pipeline
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Silent
from tests.passes.round.small_models import mlp, planned, relative_error
from tests.passes.transform.loud import loud_model

torch = pytest.importorskip("torch")

QUICK = MobileQuant(epochs=1, samples=16)


def model_of(name: str, spec: str = "int4-sym-channel-fp32", activation: Any = "static", batch: int = 16) -> Model:
    return planned(loud_model(name, batch), spec, activation)


def scaled_twin(model: Model, seed: int = 0) -> tuple[Any, Any, list[Any]]:
    """A twin whose scales are random numbers around 1, and the folds."""
    from qcompiler.passes.transform.learned_scales import LearnedScales
    from qcompiler.passes.transform.transformed_twin import TransformedTwin

    folds, _ = find_folds(model, layer_inputs(model), lambda _fold: None)
    scales, targets = LearnedScales(folds), static_targets(model)
    twin = TransformedTwin(model, scales, targets, value_ends(model, targets, scales.shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logs in scales.parameters():
            logs.copy_(torch.randn(logs.shape, generator=generator) / 2)
    return twin, scales, folds


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-interleaved", "qwen", "gemma", "bert", "resnet"])
def test_the_twin_computes_what_the_folded_and_lowered_model_does(name: str) -> None:
    """Weights of 8 bits and their clipping, static grids that follow their channels: all of it, at random scales."""
    model = model_of(name, "int8-sym-channel-fp32")
    twin, scales, folds = scaled_twin(model)
    feed = calibration_feeds(model, 2, 0)[0]
    exact = Runner(model.ir)(feed)
    with torch.no_grad(), twin.step():
        found = [y.numpy() for y in twin.outputs(feed)]
    for fold, s in zip(folds, scales.found(), strict=True):
        fold.scale(s)
    for name_, y in Runner(model.ir)(feed).items():
        assert np.abs(y - exact[name_]).max() < 1e-4 * np.abs(exact[name_]).max()
    model.weights, model.ranges = twin.codes(model), twin.ranges()
    lowered = model.clone()
    InsertQDQ().run(lowered, Silent())
    for y, wanted, original in zip(found, Runner(lowered.ir)(feed).values(), exact.values(), strict=True):
        error = np.linalg.norm(wanted - original)
        assert error > 0
        assert np.linalg.norm(y - wanted) < 0.35 * error  # values on the edge of two codes fall either way


def test_ranges_without_clipping_are_those_of_the_folded_model() -> None:
    model = model_of("llama-gqa", "int8-sym-channel-fp32")
    twin, scales, folds = scaled_twin(model)
    found = twin.ranges()
    for fold, s in zip(folds, scales.found(), strict=True):
        fold.scale(s)
    ActivationRanges("minmax").run(model, Silent())
    assert found.keys() == model.ranges.keys()
    for name, wanted in model.ranges.items():
        assert found[name].scale == pytest.approx(wanted.scale, rel=1e-3)
        assert abs(found[name].zero - wanted.zero) <= 1


def test_scales_have_no_gradient_where_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function doesn't depend on them: what comes through writers and readers cancels."""
    monkeypatch.setattr("qcompiler.passes.round.learning_twin._has_fast_bfloat16", lambda: False)
    model = mlp()
    model.plan = Plan()
    twin, scales, _ = scaled_twin(model)
    feed = calibration_feeds(model, 2, 0)[0]
    with twin.step():
        (y,) = twin.outputs(feed)
        y.square().sum().backward()
    for logs in scales.parameters():
        assert logs.grad is not None
        assert logs.grad.abs().max() < 1e-5 * y.square().sum()


@pytest.mark.parametrize(
    "text", ["int4-sym-channel-fp32", "uint4-asym-g8-fp16", "int3-sym-tensor-fp32", "int4-sym-g16"]
)
def test_a_range_has_the_slope_of_the_error(text: str) -> None:
    """The mean over many inputs that finite differences see: single weights jump, their sum hardly does."""
    from qcompiler.passes.transform.rounded_weight import RoundedWeight

    model = planned(mlp(), text)
    site = next(s for s in find_sites(model.ir) if s.name == "fc1")
    rng = np.random.default_rng(0)
    tensor = torch.from_numpy(rng.standard_normal(site.shape).astype(np.float32))
    weight = RoundedWeight(site, parse_spec(text), site.to_matrix(tensor.numpy()))
    share = weight.share
    assert share is not None
    with torch.no_grad():
        share.fill_(0.5)  # much is clipped

    def error(shift: float) -> float:
        with torch.no_grad():
            share.add_(shift)
            found = float((weight(tensor) - tensor).square().sum())
            share.sub_(shift)
        return found

    (weight(tensor) - tensor).square().sum().backward()
    assert share.grad is not None
    slope = (error(0.06) - error(-0.06)) / 0.12
    assert float(share.grad.sum()) == pytest.approx(slope, rel=0.3)


@pytest.mark.parametrize(
    "text", ["int4-sym-channel-fp32", "uint4-asym-g7-fp16", "int2-sym-tensor-fp32", "int3to6p10-sym-g8"]
)
def test_rounded_weights_are_what_will_be_stored(text: str) -> None:
    from qcompiler.passes.transform.rounded_weight import RoundedWeight

    model = planned(mlp(), text)
    for site in find_sites(model.ir):
        matrix = site.matrix().copy()
        matrix[3] = 0  # a dead row
        weight = RoundedWeight(site, parse_spec(text), matrix)
        tensor = torch.from_numpy(np.array(site.from_matrix(matrix))).requires_grad_()
        rounded = weight(tensor)
        np.testing.assert_array_equal(rounded.detach().numpy(), site.from_matrix(weight.codes(matrix).decode()))
        rounded.sum().backward()
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        best = quantize(matrix, parse_spec(text), "mse" if weight.share is not None else "minmax").decode()
        assert (
            np.square(rounded.detach().numpy() - tensor.detach().numpy()).sum() < 1.6 * np.square(best - matrix).sum()
        )


def loud(activation: Any) -> Model:
    """Four channels behind every norm are fifty times as large as they need be; the function is the same."""
    model = model_of("opt", "int8-sym-channel-fp32", activation, batch=48)
    folds, _ = find_folds(model, layer_inputs(model), after_norm)
    for fold in folds:
        fold.scale(np.where(np.arange(fold.size) < 4, 0.02, 1.0))
    return model


@pytest.mark.parametrize("activation", ["static", "dynamic"])
def test_outliers_are_learned_away(activation: Any) -> None:
    plain, learned = loud(activation), loud(activation)
    (report,) = Pipeline([MobileQuant(epochs=6, scale_rate=0.2)]).run(learned)
    assert report.metrics["kept"]
    for model in (plain, learned):
        Nearest().run(model, Silent())
        ActivationRanges("minmax").run(model, Silent())
    assert relative_error(learned) < 0.5 * relative_error(plain)


def test_clipping_and_ranges_are_learned_too() -> None:
    """Nothing but them: the scales stay where they are."""
    begun, learned = (planned(mlp(), "int3-sym-channel-fp32", "static") for _ in range(2))
    for model, epochs, rate in ((begun, 1, 0.0), (learned, 12, 6e-3)):
        item = MobileQuant(epochs=epochs, scale_rate=0, share_rate=rate, range_rate=rate, codes=True)
        (report,) = Pipeline([item]).run(model)
        assert report.metrics["kept"] == bool(rate)
    assert relative_error(learned) < 0.95 * relative_error(begun)


def test_what_does_not_help_is_not_kept() -> None:
    model = model_of("opt", "int8-sym-channel-fp32")
    weights = {site.name: site.matrix().copy() for site in find_sites(model.ir)}
    (report,) = Pipeline([replace(QUICK, scale_rate=3.0, codes=True)]).run(model)
    assert not report.metrics["kept"]
    assert report.changed == 0
    for site in find_sites(model.ir):
        np.testing.assert_array_equal(site.matrix(), weights[site.name])
    start = model_of("opt", "int8-sym-channel-fp32")
    ActivationRanges("minmax").run(start, Silent())
    for name, found in start.ranges.items():
        assert model.ranges[name].scale == pytest.approx(found.scale, rel=1e-5)
    assert model.weights.keys() == weights.keys()


def test_a_vector_that_others_read_too_is_scaled_for_its_own_operand_only() -> None:
    """All norms of a model share one gain, as some exporters write it."""
    model = model_of("opt", "int8-sym-channel-fp32")
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    for node in norms[1:]:
        node.replace_input_with(1, norms[0].inputs[1])
    twin, scales, folds = scaled_twin(model)
    feed = calibration_feeds(model, 2, 0)[0]
    exact = Runner(model.ir)(feed)
    model.plan = Plan()
    for fold, s in zip(folds, scales.found(), strict=True):
        fold.scale(s)
    with torch.no_grad(), twin.step():
        (y,) = twin.outputs(feed)
    (wanted,) = exact.values()
    assert np.linalg.norm(y.numpy() - wanted) < 0.05 * np.linalg.norm(wanted)
    assert len({node.inputs[1] for node in norms}) == len(norms)


def test_a_repeated_run_is_taken_from_the_cache(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model = model_of("opt")
        model.cache = Cache(tmp_path)
        steps = _Counting()
        MobileQuant(epochs=2).run(model, steps)
        found.append((steps.count, [site.matrix() for site in find_sites(model.ir)]))
    assert found[0][0] > 0
    assert found[1][0] == 0
    for a, b in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_array_equal(a, b)


class _Counting(Silent):
    def __init__(self) -> None:
        self.count = 0

    def track(self, items: Any, label: str) -> Any:
        for item in items:
            self.count += "Learning" in label
            yield item


def test_dead_channels_and_constant_activations_are_no_trouble() -> None:
    model = model_of("opt")
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    for value in norm.inputs[1:3]:
        assert value is not None
        array = np.zeros_like(value.const_value.numpy())  # type: ignore[union-attr]
        array[:2] = 1
        value.const_value = ir.tensor(array, name=value.name)
    (report,) = Pipeline([QUICK]).run(model)
    assert np.isfinite(report.metrics["held_back_loss_after"])


def test_nothing_to_scale_is_said() -> None:
    (report,) = Pipeline([QUICK]).run(model_of("mobilenet"))
    assert report.changed == 0
    assert any("nothing to scale" in refusal.reason for refusal in report.refused)


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("opt")
    with pytest.raises(PassRefused, match="no formats are planned"):
        QUICK.requires(Model(model.ir, calibration=model.calibration))
    with pytest.raises(PassRefused, match="calibration data"):
        QUICK.requires(Model(model.ir, plan=model.plan))
    one = model_of("opt", batch=1)
    with pytest.raises(PassRefused, match="too few"):
        QUICK.run(one, Silent())
    rounded = model_of("opt")
    Nearest().run(rounded, Silent())
    with pytest.raises(PassRefused, match="rounded already"):
        QUICK.requires(rounded)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="mobilequant"):
        QUICK.requires(model)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": 0}, {"scale_rate": -1.0}, {"share_rate": float("nan")}], ids=str
)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=f"option '{next(iter(wrong))}'"):
        replace(QUICK, **wrong).requires(model_of("opt"))


def test_activations_alone_may_be_planned() -> None:
    model = model_of("opt")
    model.plan = Plan({name: SitePlan(None, "static") for name in model.plan.sites})
    (report,) = Pipeline([QUICK]).run(model)
    assert np.isfinite(report.metrics["held_back_loss_before"])
