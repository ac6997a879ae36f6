from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import PassRefused
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.transform.equalize import Equalize
from qcompiler.pipeline import Pipeline
from tests.graph.architectures import ARCHITECTURES, mobilenet


def unbalanced(graph: ir.Model) -> Model:
    """Badly scaled channels, as depthwise convolutions have; the function is that of the graph."""
    rng = np.random.default_rng(0)
    for site in (s for s in find_sites(graph) if s.activation is not None):
        fold = find_fold(graph, site.activations[0], axis=1 if site.op == "Conv" else -1)
        if isinstance(fold, Fold):
            fold.scale(fold.tied(np.exp(2 * rng.normal(size=fold.size))))
    return Model(graph)


def worst_ratio(model: Model, axis: int) -> float:
    ratios = [1.0]
    for site in find_sites(model.ir):
        fold = find_fold(model.ir, site.activations[0], axis=axis if site.op == "Conv" else -1, insert=True)
        if isinstance(fold, Fold):
            made, read = fold.absmax(fold.writers), fold.absmax(fold.readers)
            ratios.append(float(np.maximum(made / read, read / made).max()))
    return max(ratios)


@pytest.mark.parametrize("name", ["mobilenet-relu", "resnet"])
def test_both_sides_of_every_activation_end_with_one_range(name: str) -> None:
    model = unbalanced(ARCHITECTURES[name]())
    before = worst_ratio(model, 1)
    report = Pipeline([Equalize(sweeps=200)]).run(model)[0]
    assert before > 20
    assert worst_ratio(model, 1) < 1.01
    assert report.changed >= 4
    assert report.metrics["scales_moved"][-1] < 1e-4
    assert report.metrics["range_ratio_after"] < 1.01


def test_two_layers_are_balanced_in_one_sweep_and_the_product_of_ranges_is_kept() -> None:
    model = unbalanced(ARCHITECTURES["opt"]())
    fc1, fc2 = find_sites(model.ir)[5:7]
    product = np.abs(fc1.matrix()).max(1) * np.abs(fc2.matrix()).max(0)
    Pipeline([Equalize(sweeps=1)]).run(model)
    rows, columns = np.abs(fc1.matrix()).max(1), np.abs(fc2.matrix()).max(0)
    assert np.allclose(rows, columns, rtol=1e-5)
    assert np.allclose(rows * columns, product, rtol=1e-5)


def test_a_balanced_model_stays_as_it_is() -> None:
    model = unbalanced(ARCHITECTURES["resnet"]())
    Pipeline([Equalize(sweeps=200)]).run(model)
    weights = [s.matrix() for s in find_sites(model.ir)]
    Pipeline([Equalize()]).run(model)
    assert all(np.allclose(a, s.matrix(), rtol=1e-3) for a, s in zip(weights, find_sites(model.ir), strict=True))


def test_relu6_is_left_alone_unless_its_bound_may_follow_the_channels() -> None:
    model = Model(mobilenet())
    clips = sum(n.op_type == "Clip" for n in model.graph)
    refused = Pipeline([Equalize()]).run(model)[0].refused
    assert any("whose bounds hold for all channels" in r.reason for r in refused)
    report = Pipeline([Equalize(clips=True)]).run(model)[0]
    assert report.changed > 3
    assert sum(n.op_type == "Clip" for n in model.graph) < clips
    assert report.metrics["range_ratio_after"] < report.metrics["range_ratio_before"]


def test_channels_without_weights_keep_their_scale() -> None:
    model = Model(ARCHITECTURES["opt"]())
    fc1 = find_sites(model.ir)[5]
    matrix = fc1.matrix().copy()
    matrix[2] = 0
    fc1.weight.const_value = ir.tensor(fc1.from_matrix(matrix), name=fc1.weight.name)
    column = find_sites(model.ir)[6].matrix()[:, 2]
    Pipeline([Equalize()]).run(model)
    assert np.array_equal(find_sites(model.ir)[6].matrix()[:, 2], column)


def test_refuses_rounded_models() -> None:
    with pytest.raises(PassRefused, match="rounded already"):
        Equalize().requires(Model(ARCHITECTURES["opt"](), lowered=True))
