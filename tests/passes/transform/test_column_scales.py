"""AWQ, SmoothQuant+ and the dual scale: searched scales of columns over one engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import parse_spec
from qcompiler.graph.folds import Fold
from qcompiler.graph.sites import find_sites
from qcompiler.measure.gram import grams
from qcompiler.model import Model
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.awq import AWQ
from qcompiler.passes.transform.columns import Columns, centred, fold_all, readers_of
from qcompiler.passes.transform.dual_scale import DualScale
from qcompiler.passes.transform.inputs import find_folds, layer_inputs
from qcompiler.passes.transform.output_error import judged
from qcompiler.passes.transform.smooth import Smooth
from qcompiler.passes.transform.smooth_plus import SmoothPlus
from qcompiler.pipeline import Pass, Pipeline
from qcompiler.progress import Silent
from tests.graph.architectures import ARCHITECTURES
from tests.passes.round.small_models import build, cnn, mlp
from tests.passes.transform.loud import loud_model, run

SPEC = "int3-sym-g4-fp32"
PASSES: list[Any] = [AWQ, SmoothPlus, DualScale]


def total_error(model: Model) -> dict[str, float]:
    """Squared error of the output of every rounded site, by the input of the model as it is."""
    known = grams(model, find_sites(model.ir))
    sites = [site for site in find_sites(model.ir) if site.name in known and site.name in model.weights]
    return {s.name: known[s.name].error(model.weights[s.name].decode() - s.matrix()) for s in sites}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("item", [AWQ(SPEC, grid=4), SmoothPlus(SPEC, "all"), DualScale(SPEC, "all", 2)], ids=str)
def test_the_function_is_kept_everywhere(name: str, item: Pass) -> None:
    """The Pipeline checks it, on the data and on outliers."""
    report = run(loud_model(name), item)
    assert report.changed or report.refused
    assert all(refusal.reason for refusal in report.refused)


def test_awq_finds_channels_that_stand_out_and_never_raises_the_error() -> None:
    model = loud_model("llama-gqa")
    run(model, Uniform(SPEC, embeddings="float"))
    report = run(model, AWQ())
    found = report.metrics["strength_and_error"]
    assert report.changed == len(found) > 4
    assert all(0 < strength < 1 and error < 1 for strength, error in found.values())
    assert min(error for _, error in found.values()) < 0.8


def test_scales_are_centred_and_tied_in_the_heads_of_a_group() -> None:
    model = loud_model("llama-gqa")
    folds, _ = find_folds(model, layer_inputs(model), lambda _: None)
    values = [fold for fold in folds if len(np.unique(fold.ties)) < fold.size and fold.free.all()]
    assert values  # attention outputs: two query heads share the channels of a key-value head
    reach = np.geomspace(0.1, 9.0, values[0].size)
    s = centred(values[0], reach, 0.5)
    assert all(np.ptp(s[values[0].ties == tie]) == 0 for tie in np.unique(values[0].ties))
    free = next(fold for fold in folds if len(np.unique(fold.ties)) == fold.size)
    s = centred(free, np.geomspace(0.1, 9.0, free.size), 0.7)
    assert np.isclose(s.max() * s.min(), 1)
    assert np.array_equal(centred(free, np.zeros(free.size), 0.7), np.ones(free.size))


@pytest.mark.parametrize("importance", ["none", "activations", "moments"])
def test_the_error_that_was_promised_is_the_one_that_nearest_makes(importance: Any) -> None:
    """Where all readers of a value have one format, scales of no other value change their weights' columns."""
    model = loud_model("opt")
    run(model, Uniform(SPEC, embeddings="float"))
    item = DualScale(sites="all", rounds=4, importance=importance)
    plain = model.clone()
    Nearest(importance=importance).run(plain, Silent())
    before = total_error(plain)
    report = run(model, item)
    Nearest(importance=importance).run(model, Silent())
    after = total_error(model)
    assert report.changed
    alone = 0
    for value, promised in report.metrics["relative_error"].items():
        names = [site.name for site in find_sites(plain.ir) if any(v.name == value for v in site.activations)]
        if not any(_rows_scaled(plain, model, name) for name in names):
            assert sum(after[n] for n in names) / sum(before[n] for n in names) == pytest.approx(promised, rel=0.02)
            alone += 1
    assert alone


def _rows_scaled(before: Model, after: Model, name: str) -> bool:
    old, new = (next(s for s in find_sites(m.ir) if s.name == name).matrix() for m in (before, after))
    ratio = new / old
    return bool(np.ptp(ratio / ratio[:1], axis=0).max() > 1e-3)


@pytest.mark.parametrize("make", [cnn, mlp])
def test_clipping_by_products_of_inputs_is_better_for_the_output(make: Any) -> None:
    errors: list[float] = []
    for importance in ("none", "activations", "moments"):
        model = make()
        run(model, Uniform("int3-sym-channel-fp32"))
        Nearest(importance=importance).run(model, Silent())
        errors.append(sum(total_error(model).values()))
    assert errors[2] < 0.97 * min(errors[:2])


def test_the_scale_of_a_column_is_the_best_for_its_codes() -> None:
    """The closed form, against least squares."""
    from qcompiler.passes.transform.dual_scale import _Entries

    model = loud_model("opt")
    specs = {s: parse_spec(SPEC) for s in find_sites(model.ir) if s.op != "Gather"}
    folds, _ = find_folds(model, layer_inputs(model), lambda _: None)
    fold, judges = next(iter(judged(model, folds, specs, Silent(), 1 << 20)))
    rounded = [judge.rounded(None) for judge in judges]
    found = _Entries(fold, judges).best_factors(rounded)
    w = np.concatenate([judge.matrix for judge in judges])
    d = np.concatenate(rounded)
    best = [np.linalg.lstsq(d[:, [j]], w[:, j])[0][0] for j in range(w.shape[1])]
    assert np.allclose(found, np.clip(best, 0.5, 2), rtol=1e-4)


@pytest.mark.parametrize(("spread", "low", "high"), [(1.2, 0.0, 0.6), (0.0, 0.95, 1.0)])
def test_a_dual_scale_gains_where_columns_differ_and_not_on_gaussian_ones(
    spread: float, low: float, high: float
) -> None:
    rng = np.random.default_rng(0)
    columns = np.exp(spread * rng.normal(size=(128, 1)))
    weights = {"fc1.weight": rng.normal(size=(48, 128)), "fc2.weight": rng.normal(size=(128, 192)) * columns}
    nodes = [
        helper.make_node("MatMul", ["x", "fc1.weight"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "fc2.weight"], ["y"]),
    ]
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    x = rng.normal(size=(64, 16, 48)).astype(np.float32)
    model = build(nodes, arrays, {"x": ["batch", 16, 48]}, ["y"], {"x": x})
    error = run(model, DualScale("int3-sym-channel-fp32", importance="none")).metrics.get("relative_error", {})
    assert low <= error.get("r", 1.0) <= high


def test_one_strength_for_the_whole_model_is_never_worse_than_none() -> None:
    model = loud_model("opt")
    run(model, Uniform(SPEC, embeddings="float"))
    plain = model.clone()
    report = run(model, SmoothPlus())
    losses, strength = report.metrics["losses"], report.metrics["strength"]
    assert losses[f"{strength:g}"] == min(losses.values()) < losses["none"]
    assert len(losses) <= 11
    run(plain, Smooth(strength))
    for one, other in zip(find_sites(model.ir), find_sites(plain.ir), strict=True):
        assert np.array_equal(one.matrix(), other.matrix())


def test_nothing_is_smoothed_where_that_only_hurts() -> None:
    model = loud_model("opt")
    run(model, Uniform("int8-sym-g4-fp32", embeddings="float"))
    for site in find_sites(model.ir):
        if site.op != "Gather":  # every weight is on the grid already: any scale makes errors
            grid = np.round(site.matrix() * 16).clip(-127, 127)
            grid[:, ::4] = 127
            site.weight.const_value = ir.tensor(site.from_matrix(grid / 16).astype(np.float32), name=site.weight.name)
    report = run(model, SmoothPlus())
    assert report.metrics["strength"] is None
    assert report.changed == 0


def test_a_model_without_folds_is_left_alone_and_says_why() -> None:
    report = run(cnn(), SmoothPlus("int4"))
    assert report.changed == 0
    assert report.refused


@pytest.mark.parametrize("kind", PASSES)
def test_what_is_asked_for_must_mean_something(kind: Any) -> None:
    model = loud_model("opt")
    with pytest.raises(BadOption, match="neither a plan nor an option"):
        run(model, kind())
    with pytest.raises(BadOption, match="does not exist"):
        run(model, kind("int99"))
    run(model, Uniform(SPEC))
    with pytest.raises(BadOption, match="there is a plan"):
        run(model, kind(SPEC))
    with pytest.raises(PassRefused, match="calibration data"):
        run(Model(ARCHITECTURES["opt"]()), kind(SPEC))
    model.lowered = True
    with pytest.raises(PassRefused, match="rounded already"):
        run(model, kind())


@pytest.mark.parametrize(("kind", "options"), [
    (AWQ, {"grid": 0}), (AWQ, {"spec": "int99"}), (DualScale, {"rounds": 0}), (DualScale, {"sites": "some"}),
    (DualScale, {"spec": "x"}), (SmoothPlus, {"samples": -1}), (SmoothPlus, {"spec": "x"}),
])  # fmt: skip
def test_options_out_of_range_are_errors_at_once(kind: type[Pass], options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        kind(**options)


@pytest.mark.parametrize("item", [AWQ(SPEC, grid=4), DualScale(SPEC, "all", 3)], ids=str)
def test_dead_channels_keep_their_scale(item: Pass) -> None:
    model = loud_model("opt")
    norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
    for value in norm.inputs[1:3]:
        assert value is not None
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[3] = 0
        value.const_value = ir.tensor(array, name=value.name)
    fc1 = next(s for s in find_sites(model.ir) if s.columns == 16 and s.rows == 24)
    matrix = fc1.matrix().copy()
    matrix[:, 5] = 0
    fc1.weight.const_value = ir.tensor(fc1.from_matrix(matrix), name=fc1.weight.name)
    run(model, item)
    assert all(np.isfinite(site.matrix()).all() for site in find_sites(model.ir))


def test_options_survive_toml() -> None:
    pipeline = Pipeline([AWQ("int4", 10), SmoothPlus(sites="all", loss="squared"), DualScale(sites="all", rounds=3)])
    assert Pipeline.from_toml(pipeline.to_toml()).passes == list(pipeline.passes)


def test_effects_on_columns_are_what_the_fold_does() -> None:
    model = loud_model("mobilenet-relu")
    sites = [s for s in find_sites(model.ir) if s.op != "Gather"]
    folds, _ = find_folds(model, layer_inputs(model), lambda _: None)
    assert folds
    fold: Fold = folds[0]
    numbers = fold.tied(np.random.default_rng(0).uniform(0.5, 2, fold.size))
    expected = {
        site.name: Columns.of(fold, site, numbers).change(site.matrix(), parse_spec(SPEC))[0]
        for site in readers_of(fold, sites)
    }
    fold.scale(numbers)
    for site in find_sites(model.ir):
        if site.name in expected:
            assert np.allclose(site.matrix(), expected[site.name], rtol=1e-6)


def test_scales_under_which_a_weight_overflows_are_refused_and_the_others_folded() -> None:
    model = loud_model("opt")
    folds, _ = find_folds(model, layer_inputs(model), lambda _: None)
    first, second = folds[:2]
    before = {site.name: site.matrix() for site in find_sites(model.ir)}
    refused = fold_all([(first, np.full(first.size, 1e39)), (second, np.full(second.size, 2.0))])
    assert [refusal.where for refusal in refused] == [first.value.name]
    assert "overflows" in refused[0].reason
    changed = {site.name for site in find_sites(model.ir) if not np.array_equal(site.matrix(), before[site.name])}
    assert changed == {site.name for site in readers_of(second, find_sites(model.ir))} | {
        site.name for site in find_sites(model.ir) if any(e.constant.value is site.weight for e in second.writers)
    }
