"""Gradients of scales and codes are those that autograd would find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.formats import QTensor, parse_spec, spread
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from tests.passes.round.small_models import cnn, mlp

torch = pytest.importorskip("torch")
SPECS = [
    "int4-sym-channel-fp32",
    "uint3-asym-g7-fp16",
    "int5-sym-tensor-fp32",
    "int3-sym-g32-fp16",
    "uint3-asym-r7-fp16",
]


def sites() -> list[Site]:
    models: list[Model] = [mlp(), cnn()]
    return [site for model in models for site in find_sites(model.ir)]


def learned(site: Site, text: str, *, codes: Any = "fixed") -> tuple[Any, QTensor, Any]:
    """The weight, what it begins with, and the twin's parameter."""
    from qcompiler.passes.round.learned_weights import LearnedWeight

    tensor = quantize(site.matrix(), parse_spec(text))
    parameter = torch.nn.Parameter(torch.zeros(site.shape))
    return LearnedWeight(site, tensor, parameter, codes), tensor, parameter


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("site", sites(), ids=lambda s: s.name)
def test_nothing_changes_before_a_step(site: Site, text: str) -> None:
    for codes in ("fixed", "straight"):
        weight, tensor, parameter = learned(site, text, codes=codes)
        weight.fill()
        np.testing.assert_array_equal(parameter.detach().numpy(), site.from_matrix(tensor.decode()))
        np.testing.assert_array_equal(weight.result().codes, tensor.codes)
        np.testing.assert_array_equal(weight.result().scale, tensor.scale)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("site", sites(), ids=lambda s: s.name)
def test_gradients_of_scales_are_slopes(site: Site, text: str) -> None:
    weight, _, parameter = learned(site, text)
    slope = torch.randn(site.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value() -> float:
        weight.fill()
        return float((parameter.detach().double() * slope).sum())

    weight.fill()
    parameter.grad = slope.float()
    weight.collect()
    found, flat = weight.factor.grad.clone(), weight.factor.data.view(-1)
    for index in range(0, flat.numel(), max(1, flat.numel() // 7)):
        flat[index] = 0.25
        above = value()
        flat[index] = -0.25
        assert (above - value()) / 0.5 == pytest.approx(float(found.view(-1)[index]), rel=1e-3, abs=1e-3)
        flat[index] = 0.0


@pytest.mark.parametrize("text", SPECS)
def test_gradients_of_codes_pass_straight_through(text: str) -> None:
    site = sites()[0]
    weight, tensor, parameter = learned(site, text, codes="straight")
    weight.fill()
    parameter.grad = torch.ones(site.shape)
    weight.collect()
    scale = spread(tensor.scale, tensor.spec, site.columns, site.rows)
    np.testing.assert_allclose(weight.codes.parameter.grad.numpy(), np.broadcast_to(scale, (site.rows, site.columns)))


def test_codes_move_to_the_nearest_and_stay_on_the_grid() -> None:
    weight, tensor, parameter = learned(sites()[0], "int3-sym-channel-fp32", codes="straight")
    with torch.no_grad():
        weight.codes.parameter += 1
    np.testing.assert_array_equal(weight.result().codes, np.minimum(tensor.codes + 1, 3))
    with torch.no_grad():
        weight.codes.parameter += 100
    weight.fill()
    parameter.grad = torch.ones_like(parameter)
    weight.collect()
    assert (weight.result().codes == 3).all()
    assert not weight.codes.parameter.grad.any()


def test_a_weight_that_does_not_matter_has_no_gradient() -> None:
    weight, _, _ = learned(sites()[0], "int3-sym-channel-fp32")
    weight.fill()
    weight.collect()
    assert weight.factor.grad is None


def test_scales_of_two_levels_stay_as_they_are() -> None:
    site = sites()[0]
    weight, tensor, parameter = learned(site, "qoq4-asym-g8", codes="straight")
    weight.fill()
    parameter.grad = torch.ones(site.shape)
    weight.collect()
    assert weight.factor.grad is None
    np.testing.assert_array_equal(weight.result().scale, tensor.scale)
