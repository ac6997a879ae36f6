"""SpinQuant: exact with what was learned, better on held-back samples or the start; descent stays orthogonal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import BadOption, PassRefused
from qcompiler.graph.folds import Stream, blocks, find_stream
from qcompiler.graph.sites import find_sites
from qcompiler.graph.topology import residual_streams
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.passes.transform.inner_rotation import head_folds
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.passes.transform.spinquant import SpinQuant
from qcompiler.pipeline import Pipeline
from qcompiler.plan import Plan
from qcompiler.progress import Silent
from tests.graph.architectures import LAYERS, WIDTH
from tests.passes.round.small_models import planned
from tests.passes.transform.loud import loud_model

torch = pytest.importorskip("torch")

QUICK = SpinQuant(epochs=1, samples=16)


def model_of(name: str, bits: int = 4, batch: int = 16) -> Model:
    """Weights of 4 bits, rows of activations of so many."""
    model = loud_model(name, batch)
    plans = planned(model, "int4-sym-channel-fp32", "dynamic").plan.sites
    dynamic = {n: replace(p, activation_bits=bits) if p.activation == "dynamic" else p for n, p in plans.items()}
    model.plan = Plan(dynamic)
    return model


def stream_of(model: Model) -> Stream:
    stream = find_stream(model.ir, residual_streams(model.ir)[0].values[0])
    assert isinstance(stream, Stream)
    assert not stream.fold_gains()
    return stream


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_descent_stays_orthogonal_and_finds_a_rotation(keeps_mean: bool) -> None:
    """The distance to a rotation nearby, in a unit that no rate could have been meant for."""
    from qcompiler.passes.transform.cayley import CayleySGD

    n = 24
    skew = np.random.default_rng(0).standard_normal((n, n)) * 0.05
    if keeps_mean:
        skew = skew - skew.mean(0) - skew.mean(1)[:, None] + skew.mean()
    goal = torch.matrix_exp(torch.from_numpy(skew - skew.T)).float()
    matrix = torch.nn.Parameter(torch.eye(n))
    descent = CayleySGD([{"params": [matrix], "lr": 0.05}], [matrix] if keeps_mean else [])
    losses = []
    for step in range(60):
        descent.param_groups[0]["lr"] = 0.05 * (1 - step / 60)
        loss = 1e-6 * (matrix - goal).square().sum()
        losses.append(loss.item())
        matrix.grad = None
        loss.backward()
        descent.step()
        found = matrix.detach().double()
        assert (found @ found.T - torch.eye(n)).abs().max() < 1e-6
        if keeps_mean:
            assert (found.sum(0) - 1).abs().max() < 1e-5
    assert losses[-1] < 0.01 * losses[0]


def test_no_gradient_turns_nothing() -> None:
    from qcompiler.passes.transform.cayley import CayleySGD

    matrix = torch.nn.Parameter(torch.eye(5))
    descent = CayleySGD([{"params": [matrix], "lr": 0.1}])
    descent.step()
    matrix.grad = torch.zeros(5, 5)
    descent.step()
    assert torch.equal(matrix.detach(), torch.eye(5))


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-fused", "qwen", "vit"])
def test_the_twin_computes_what_the_folded_model_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a matrix that is no rotation, without rounding: reads and writes don't cancel, so none is forgotten."""
    from qcompiler.passes.transform.learned_turns import LearnedTurns
    from qcompiler.passes.transform.transformed_twin import TransformedTwin

    monkeypatch.setattr("qcompiler.passes.round.learning_twin._has_fast_bfloat16", lambda: False)
    model = model_of(name)
    model.plan = Plan()
    stream = stream_of(model)
    turns = LearnedTurns([stream])
    twin = TransformedTwin(model, turns, [], {})
    matrix = np.eye(stream.width) + np.random.default_rng(0).standard_normal((stream.width, stream.width)) / 10
    with torch.no_grad():
        turns.parameters()[0].copy_(torch.from_numpy(matrix))
    feed = calibration_feeds(model, 2, 0)[0]
    with torch.no_grad(), twin.step():
        found = twin.outputs(feed)
    exact = next(iter(Runner(model.ir)(feed).values()))
    monkeypatch.setattr(Stream, "_checked", lambda self, Q: np.asarray(Q))
    stream.rotate(matrix)
    wanted = next(iter(Runner(model.ir)(feed).values()))
    assert np.abs(wanted - exact).max() > 0.01 * np.abs(exact).max()
    assert np.abs(found[0].numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-fused", "qwen", "packed"])
def test_the_twin_turns_heads_as_folds_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At matrices that are no rotations, so that what is forgotten on either side would show; streams turn too."""
    from qcompiler.passes.transform.learned_turns import LearnedTurns
    from qcompiler.passes.transform.transformed_twin import TransformedTwin

    monkeypatch.setattr("qcompiler.passes.round.learning_twin._has_fast_bfloat16", lambda: False)
    model = model_of(name)
    model.plan = Plan()
    stream = stream_of(model)
    folds = [fold for _, fold in head_folds(model.ir, set(stream.values))]
    assert len(folds) == LAYERS
    turns = LearnedTurns([stream], folds)
    twin = TransformedTwin(model, turns, [], {})
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for matrix in turns.parameters()[1:]:
            matrix += torch.from_numpy(rng.standard_normal(matrix.shape) / 4)
        if not stream.keeps_mean:  # which keeps the function
            turns.parameters()[0].copy_(torch.from_numpy(np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]))
    feed = calibration_feeds(model, 2, 0)[0]
    with torch.no_grad(), twin.step():
        found = twin.outputs(feed)
    exact = next(iter(Runner(model.ir)(feed).values()))
    left = iter(turns.parameters()[1:])
    for fold in folds:
        matrices = [next(left).detach().double().numpy() for _ in fold.blocks]
        blocks.rotate(model.ir, fold.region, fold.start, fold.blocks, matrices)
    wanted = next(iter(Runner(model.ir)(feed).values()))
    assert np.abs(wanted - exact).max() > 0.01 * np.abs(exact).max()
    assert np.abs(found[0].numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()


def loud_values(model: Model) -> None:
    """Another function: one channel of the values of each head reaches ten times as far."""
    for _, fold in head_folds(model.ir, set(stream_of(model).values)):
        for edit in fold.writers:
            axis, places = blocks.places_of(fold.region, fold.start, fold.blocks, edit)
            value = edit.constant.value
            assert value.const_value is not None
            array = np.moveaxis(value.const_value.numpy().copy(), axis, 0)
            for _, here in places:
                array[here[0]] *= 10
            value.const_value = ir.tensor(np.ascontiguousarray(np.moveaxis(array, 0, axis)), name=value.name)


def test_heads_are_learned_together_with_streams() -> None:
    """Loud channels of values, which no rotation of the stream shares out, are learned away too."""
    reports = {}
    for heads in (False, True):
        model = model_of("llama", batch=32)
        loud_values(model)
        (reports[heads],) = Pipeline([SpinQuant(epochs=4, rate=0.3, start="present", heads=heads)]).run(model)
        assert reports[heads].changed == (1 + LAYERS if heads else 1)
    losses = [reports[heads].metrics["held_back_loss_after"] for heads in (False, True)]
    assert reports[True].metrics["held_back_loss_before"] == reports[False].metrics["held_back_loss_before"]
    assert losses[1] < 0.8 * losses[0]


def test_heads_begin_with_hadamard_matrices_like_streams() -> None:
    model, start = model_of("llama-gqa"), model_of("llama-gqa")
    (report,) = Pipeline([replace(QUICK, rate=0.0, heads=True)]).run(model)
    assert not report.metrics["kept"]
    Rotate(heads=True).run(start, Silent())
    for a, b in zip(find_sites(model.ir), find_sites(start.ir), strict=True):
        np.testing.assert_allclose(a.matrix(), b.matrix(), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "qwen"])
def test_the_function_stays_and_the_loss_does_not_rise(name: str) -> None:
    """The pipeline holds it to its contract, with outliers injected."""
    model = model_of(name)
    before = {site.name: site.matrix().copy() for site in find_sites(model.ir)}
    (report,) = Pipeline([SpinQuant(epochs=4)]).run(model)
    assert report.changed == 1
    metrics = report.metrics
    assert metrics["kept"] == (metrics["held_back_loss_after"] < metrics["held_back_loss_before"])
    assert any(not np.array_equal(before[site.name], site.matrix()) for site in find_sites(model.ir))


def test_outliers_are_learned_away() -> None:
    """From a stream with three loud channels, which no Hadamard matrix has shared out."""
    (report,) = Pipeline([SpinQuant(epochs=4, rate=0.3, start="present")]).run(model_of("llama", batch=32))
    assert report.metrics["kept"]
    assert report.metrics["held_back_loss_after"] < 0.6 * report.metrics["held_back_loss_before"]


def test_what_does_not_help_is_not_kept_but_the_start_is() -> None:
    model, start = model_of("llama"), model_of("llama")
    (report,) = Pipeline([replace(QUICK, rate=0.0)]).run(model)
    assert not report.metrics["kept"]
    assert Rotate().run(start, Silent()).changed == 1
    for a, b in zip(find_sites(model.ir), find_sites(start.ir), strict=True):
        np.testing.assert_allclose(a.matrix(), b.matrix(), atol=1e-6)


def test_it_goes_on_from_where_the_stream_is() -> None:
    """Behind `rotate`, which has put products in for a tied table."""
    model = model_of("gemma")
    Rotate().run(model, Silent())
    names = {site.name for site in find_sites(model.ir)}
    (report,) = Pipeline([replace(QUICK, start="present")]).run(model)
    assert report.changed == 1
    assert {site.name for site in find_sites(model.ir)} == names


@pytest.mark.parametrize(("name", "reason"), [("gemma", "is tied"), ("mobilenet", "cannot cross"), ("bert", "")])
def test_what_cannot_be_turned_is_left_alone_with_the_reason(name: str, reason: str) -> None:
    model = model_of(name)
    before = [site.matrix().copy() for site in find_sites(model.ir)]
    (report,) = Pipeline([QUICK]).run(model)
    assert report.changed == 0
    assert report.refused
    assert all(reason in refusal.reason for refusal in report.refused)
    for array, site in zip(before, find_sites(model.ir), strict=True):
        np.testing.assert_array_equal(array, site.matrix())


@pytest.mark.parametrize("wrong", [{"rate": -1.0}, {"epochs": 0}, {"start": "identity"}], ids=str)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=str(next(iter(wrong)))):
        replace(QUICK, **wrong).requires(model_of("llama"))


def test_without_a_plan_it_says_so() -> None:
    model = model_of("llama")
    model.plan = Plan()
    with pytest.raises(PassRefused, match="no formats are planned"):
        QUICK.requires(model)
