"""Weights that several operations multiply: what is fitted to data is fitted to all of their uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompiler.graph.sites import find_sites
from qcompiler.measure.gram import grams, multiplied
from qcompiler.measure.segments import Segments
from qcompiler.model import Model
from qcompiler.passes.round.adaround import AdaRound
from qcompiler.passes.round.bias_correction import BiasCorrection
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.progress import Silent
from tests.passes.round.small_models import build, planned, relative_error

SPEC = "int3-sym-channel-fp32"
SIZE = 24


def twice(near: bool, *, both: bool = True) -> Model:
    """[x W, relu(x M) W], the second input twenty times as large and in the same segment or a later one.

    The first use has a few loud channels, the second one other ones, so that a fit to the first is a bad one for both.
    """
    rng = np.random.default_rng(3)
    x = rng.standard_normal((48, 6, SIZE)).astype(np.float32)
    x[..., :4] *= 10
    weights = {"w.weight": rng.standard_normal((SIZE, SIZE)).astype(np.float32) / 5}
    turned = np.roll(np.eye(SIZE, dtype=np.float32), SIZE // 2, 1) * 20
    weights |= {"m.weight": turned, "e.weight": np.eye(SIZE, dtype=np.float32)}
    node = helper.make_node
    nodes = [node("MatMul", ["x", "e.weight"], ["e"], name="e")] if near else []
    start = "e" if near else "x"
    nodes += [
        node("MatMul", [start, "w.weight"], ["y"], name="first"),
        node("MatMul", [start, "m.weight"], ["a"], name="m"),
        node("Relu", ["a"], ["b"], name="r"),
        node("MatMul", ["b", "w.weight" if both else "m.weight"], ["z"], name="second"),
        node("Concat", ["y", "z"], ["out"], axis=-1, name="out"),
    ]
    return build(nodes, weights, {"x": ["batch", 6, SIZE]}, ["out"], {"x": x})


def only_shared(model: Model) -> Model:
    plans = planned(model, SPEC).plan
    model.plan = type(plans)({"w": plans.sites["w"]})
    return model


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("rounding", [GPTQ(), GPTQ(sequential=False), Nearest(importance="activations")])
def test_all_uses_count(near: bool, rounding: Any) -> None:
    """Against the codes of a model in which the first use is all there is."""
    model = only_shared(twice(near))
    chain = Segments(model.ir)
    assert ("b" in chain[chain.index_of("w")].made) == near
    rounding.run(model, Silent())
    first = only_shared(twice(near, both=False))
    rounding.run(first, Silent())
    by_first = only_shared(twice(near))
    by_first.weights = dict(first.weights)
    assert relative_error(model) < 0.8 * relative_error(by_first)
    (site,) = (site for site in find_sites(model.ir) if site.name == "w")
    assert len(site.users) == 2


def test_one_shift_for_several_outputs_is_refused() -> None:
    """Also where each use has a bias behind it."""
    model = only_shared(twice(near=True))
    Nearest().run(model, Silent())
    report = BiasCorrection(create=True).run(model, Silent())
    assert not model.bias_shift
    assert [refusal.where for refusal in report.refused] == ["w"]
    assert "several operations use it" in report.refused[0].reason


@pytest.mark.parametrize("near", [True, False])
def test_codes_are_not_learned_for_one_of_several_segments(near: bool) -> None:
    """Where all uses are in one segment, they are."""
    pytest.importorskip("torch")
    found, nearest = only_shared(twice(near)), only_shared(twice(near))
    Nearest().run(nearest, Silent())
    report = AdaRound(steps=20).run(found, Silent())
    assert [refusal.where for refusal in report.refused] == ([] if near else ["w"])
    assert list(report.metrics["segments"]) == (["w"] if near else [])
    assert near or np.array_equal(found.weights["w"].codes, nearest.weights["w"].codes)


def test_one_value_that_two_convolutions_read_in_two_ways() -> None:
    """The Gram matrix is of the rows of both."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="a"),
        helper.make_node("Conv", ["x", "w"], ["b"], name="b", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["a"], ["c"], name="c"),
        helper.make_node("GlobalAveragePool", ["b"], ["d"], name="d"),
        helper.make_node("Add", ["c", "d"], ["y"], name="y"),
    ]
    weights = {"w": rng.standard_normal((4, 2, 3, 3)).astype(np.float32)}
    model = build(nodes, weights, {"x": ["batch", 2, 8, 8]}, ["y"], {"x": x})
    (site,) = find_sites(model.ir)
    assert grams(model, [site])[site.name].count == 3 * (6 * 6 + 4 * 4)
    assert [user.name for user in tuple(multiplied(site).values())] == ["a", "b"]
