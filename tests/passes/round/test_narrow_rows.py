"""Passes that round with knowledge of inputs see rows of activations that are rounded to fewer than 8 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import helper

from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.adaquant import AdaQuant
from qcompiler.passes.round.bias_correction import BiasCorrection
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.round.streams import Streams, calibration_feeds
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Silent
from tests.passes.round.small_models import build, mlp, planned, relative_error

SPEC = "int4-sym-channel-fp32"


def narrow(bits: int = 4, clip: float = 1.0) -> Model:
    model = planned(mlp(), SPEC, "dynamic")
    plans = {n: replace(p, activation_bits=bits, activation_clip=clip) for n, p in model.plan.sites.items()}
    model.plan = Plan(plans)
    return model


@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_the_rounded_stream_is_the_lowered_model(clip: float) -> None:
    """What the second layer reads when the first one is rounded, behind a boundary and in its own segment."""
    model = narrow(4, clip)
    Nearest().run(model, Silent())
    lowered = model.clone()
    InsertQDQ().run(lowered, Silent())
    rows = next(node.outputs[0] for node in lowered.graph if (node.name or "").startswith("r_rows"))
    streams = Streams(model, calibration_feeds(model, 4, 0))
    feeds = calibration_feeds(model, 4, 0)
    want = [Runner(lowered.ir, outputs=[str(rows.name)])(feed)[str(rows.name)] for feed in feeds]
    plain = [Runner(model.ir, outputs=["r"])(feed)["r"] for feed in feeds]
    for segment in streams.segments:
        for site in segment.sites:
            seen = list(streams.inputs(segment, site))
            if site.name == "fc2":
                for (_, x, y), rounded, exact in zip(seen, want, plain, strict=True):
                    np.testing.assert_allclose(x, rounded, rtol=1e-5, atol=1e-5)
                    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
            streams.replace(site, site.from_matrix(model.weights[site.name].decode()))
        streams.advance(segment)


def test_rows_of_eight_bits_change_nothing() -> None:
    found = [narrow(8), planned(mlp(), SPEC)]
    for model in found:
        GPTQ().run(model, Silent())
    for name, tensor in found[0].weights.items():
        np.testing.assert_array_equal(tensor.codes, found[1].weights[name].codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_makes_up_for_the_error_of_rows(bits: int) -> None:
    """Better than the codes of GPTQ that takes activations for exact."""
    aware, blind = narrow(bits), planned(mlp(), SPEC)
    GPTQ().run(aware, Silent())
    GPTQ().run(blind, Silent())
    blind.plan = aware.plan
    assert relative_error(aware) < 0.97 * relative_error(blind)


def test_products_that_read_one_value_at_two_widths_do_not_share_a_hessian() -> None:
    model = narrow(4)
    name = find_sites(model.ir)[0].name
    both = model.plan.with_sites({name: SitePlan(model.plan.sites[name].weight, "dynamic")})
    model.plan = both
    GPTQ().run(model, Silent())
    assert np.isfinite(relative_error(model))


def test_the_twin_rounds_rows_and_lets_gradients_pass() -> None:
    torch = pytest.importorskip("torch")
    from qcompiler.passes.round.tuned_twin import TunedTwin

    model = narrow(4, 0.9)
    Nearest().run(model, Silent())
    lowered = model.clone()
    InsertQDQ().run(lowered, Silent())
    twin, feed = TunedTwin(model, ()), calibration_feeds(model, 2, 0)[0]
    with twin.step():
        (found,) = twin.outputs(feed)
        found.square().sum().backward()
    np.testing.assert_allclose(found.detach().numpy(), Runner(lowered.ir)(feed)["y"], rtol=1e-4, atol=1e-4)
    gradients = [parameter.grad for parameter in twin.parameters()["scale"]]
    assert len(gradients) == 2
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


def test_reconstruction_learns_with_rounded_rows() -> None:
    pytest.importorskip("torch")
    model = narrow(4)
    Nearest().run(model, Silent())
    before = relative_error(model)
    AdaQuant(steps=60).run(model, Silent())
    assert relative_error(model) < before


def test_bias_correction_gives_back_what_clipped_rows_take() -> None:
    """Rows of one large number and many middling ones, which clipping makes smaller: the mean of the output moves."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((64, 3, 24))).astype(np.float32) + 1
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="fc"), helper.make_node("Add", ["h", "b"], ["y"])]
    weights = {"w": np.abs(rng.standard_normal((24, 8))).astype(np.float32), "b": np.zeros(8, np.float32)}
    model = planned(build(nodes, weights, {"x": ["batch", 3, 24]}, ["y"], {"x": x}), "int8-sym-channel-fp32", "dynamic")
    plans = {n: replace(p, activation_bits=4, activation_clip=0.5) for n, p in model.plan.sites.items()}
    model.plan = Plan(plans)
    Nearest().run(model, Silent())
    before = relative_error(model)
    BiasCorrection().run(model, Silent())
    assert relative_error(model) < 0.3 * before
