"""D2Quant's mean correction: the same as other bias corrections, behind norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.budget import lowered_bytes, stored_bytes
from qcompiler.calibration import Calibration
from qcompiler.graph.norms import behind_norm
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.bias_correction import BiasCorrection
from qcompiler.passes.round.correction_places import clear_mean
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.center_norms import CenterNorms
from qcompiler.pipeline import PassReport
from qcompiler.progress import Silent
from tests.graph.architectures import ARCHITECTURES, LAYERS, feeds_for
from tests.passes.round.small_models import cnn, planned

SPEC = "int3-sym-channel-fp16"


def rounded(name: str, spec: str = SPEC, offset: float = 2.0) -> Model:
    """A rounded model; an offset of some channels of its tokens makes errors of weights an error of means."""
    graph = ARCHITECTURES[name]()
    table = next(site for site in find_sites(graph) if site.op == "Gather")
    moved = table.matrix()
    moved[:, :4] += offset
    table.weight.const_value = ir.tensor(moved, name=table.weight.name)
    model = planned(Model(graph, name, Calibration.from_arrays(feeds_for(graph, batch=16), graph)), spec)
    Nearest().run(model, Silent())
    return model


def corrected(model: Model, **options: Any) -> PassReport:
    usual: dict[str, Any] = {"places": "norms", "create": True}
    return BiasCorrection(samples=1000, **usual | options).run(model, Silent())


def means(model: Model, names: list[str]) -> dict[str, np.ndarray]:
    """Of the lowered model on its calibration data: value name -> mean of each channel."""
    return averages(lowered(model).ir, model, names)


def averages(graph: ir.Model, model: Model, names: list[str]) -> dict[str, np.ndarray]:
    assert model.calibration is not None
    (feeds,) = model.calibration.batches(1000)
    found = Runner(graph, outputs=names)(feeds)
    return {name: array.reshape(-1, array.shape[-1]).mean(0) for name, array in found.items()}


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama-gqa", 2 * LAYERS + 1), ("gpt2", 2 * LAYERS + 1), ("gemma", 2 * LAYERS + 1), ("mobilenet", 0)],
)
def test_norms_are_found_by_what_they_compute(name: str, count: int) -> None:
    graph = ARCHITECTURES[name]()
    values = {value for site in find_sites(graph) for value in site.activations}
    assert sum(behind_norm(value) for value in values) == count
    if name == "gpt2":  # written out, with the same names of values behind
        CenterNorms().run(Model(graph), Silent())
        values = {value for site in find_sites(graph) for value in site.activations}
        assert sum(behind_norm(value) for value in values) == count


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_means_behind_norms_are_those_of_the_float_model(name: str) -> None:
    model = rounded(name)
    report = corrected(model)
    sites = {site.name for site in find_sites(model.ir)}
    assert report.changed == len(model.bias_shift) > 0
    assert not sites & set(model.bias_shift)
    names = list(model.bias_shift)
    wanted, found = averages(model.ir, model, names), means(model, names)
    model.bias_shift, shifts = {}, model.bias_shift
    before = means(model, names)
    for value, shift in shifts.items():
        moved = shift != 0
        assert moved.any()
        assert not moved.all()
        assert np.abs(found[value] - wanted[value])[moved].max() < 1e-4 * np.abs(wanted[value]).max()
        assert np.abs(before[value] - wanted[value])[moved].max() > 1e-3 * np.abs(wanted[value]).max()


def test_biases_that_are_there_take_it_and_new_ones_are_stored_only_if_asked_for() -> None:
    plain, asked, biased = rounded("llama-gqa"), rounded("llama-gqa"), rounded("gpt2")
    report = corrected(plain, create=False)
    assert not plain.bias_shift
    assert {refusal.reason for refusal in report.refused} == {"it has no bias, and a new one would be stored"}
    report = corrected(asked)
    without = stored_bytes(asked)
    InsertQDQ().run(asked, Silent())
    assert lowered_bytes(asked.ir) == without + report.metrics["new_bytes"]
    report = corrected(biased, create=False)
    assert report.changed
    assert "new_bytes" not in report.metrics
    without = stored_bytes(biased)
    InsertQDQ().run(biased, Silent())
    assert lowered_bytes(biased.ir) == without


def test_only_means_that_stand_out_are_corrected() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(4000, 3)).astype(np.float32)
    found = exact + np.array([0, 0.9, 1.1], np.float32) + rng.normal(size=exact.shape).astype(np.float32)
    np.testing.assert_allclose(clear_mean(exact, found), [0, 0, -1.1], atol=0.1)


def test_control_where_nothing_is_lost_nothing_is_corrected() -> None:
    model = rounded("llama-gqa", "int16-sym-channel-fp32")
    corrected(model)
    assert all(np.abs(shift).max() < 1e-3 for shift in model.bias_shift.values())
    flat = rounded("llama-gqa", offset=0.0)  # errors of weights that meet no mean have none
    corrected(flat)
    assert sum(np.count_nonzero(shift) for shift in flat.bias_shift.values()) < 4
    convolutions = planned(cnn(), SPEC)
    Nearest().run(convolutions, Silent())
    assert not corrected(convolutions).changed


def test_norms_and_products_together() -> None:
    """Where products have got their means back, norms lack little."""
    both, products, norms = rounded("gpt2"), rounded("gpt2"), rounded("gpt2")
    for model, places in ((both, "all"), (products, "products"), (norms, "norms")):
        corrected(model, places=places)
    sites = {site.name for site in find_sites(both.ir)}
    assert set(products.bias_shift) == sites & set(both.bias_shift)
    lacking = [len(model.bias_shift.keys() - sites) for model in (norms, both)]
    assert lacking[1] < lacking[0]


def test_tuning_begins_with_them() -> None:
    torch = pytest.importorskip("torch")
    from qcompiler.passes.round.tuned_twin import TunedTwin

    model = rounded("gpt2")
    corrected(model)
    feeds = feeds_for(model.ir)
    (wanted,), (plain,) = (Runner(lowered(m).ir)(feeds).values() for m in (model, replace(model, bias_shift={})))
    twin = TunedTwin(model, [])
    with torch.no_grad(), twin.step():
        found = twin.outputs(feeds)[0].float().numpy()
    exact = 0.02 if twin.narrow else 1e-4  # of bfloat16
    assert np.abs(found - wanted).max() < exact * np.abs(wanted).max() < np.abs(plain - wanted).max()


def lowered(model: Model) -> Model:
    copy = model.clone()
    InsertQDQ().run(copy, Silent())
    return copy
