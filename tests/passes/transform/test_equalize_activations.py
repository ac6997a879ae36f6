from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, PassRefused
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.sites import find_sites
from qcompiler.measure.cache import fingerprint
from qcompiler.measure.runner import Runner
from qcompiler.measure.statistics import channel_statistics
from qcompiler.model import Model
from qcompiler.passes.transform.equalize_activations import EqualizeActivations
from qcompiler.pipeline import Pipeline
from tests.graph.architectures import ARCHITECTURES, feeds_for


def uneven(name: str, width: float = 1.0) -> Model:
    """Channels of very different ranges below the bounds of every Clip; the function is another one."""
    rng = np.random.default_rng(0)
    graph = ARCHITECTURES[name]()
    for site in (s for s in find_sites(graph) if s.op == "Conv"):
        fold = find_fold(graph, site.activations[0], axis=1, loose=True)
        if isinstance(fold, Fold):
            fold.scale(fold.tied(np.exp(width * np.abs(rng.normal(size=fold.size)) + 1)))
    model = Model(graph)
    feeds = feeds_for(graph)
    model.calibration = Calibration.from_arrays({k: np.concatenate([v] * 2) for k, v in feeds.items()}, graph)
    return model


def outputs(model: Model) -> dict[str, np.ndarray]:
    return Runner(model.ir)(feeds_for(model.ir))


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(a[k] - b[k]).max() / np.abs(a[k]).max()) for k in a)


def evenness(model: Model, value: str) -> float:
    """Median of the channels' ranges, relative to the largest."""
    reach = channel_statistics(model, [value], axis=1)[value].absmax
    return float(np.median(reach) / reach.max())


@pytest.mark.parametrize("name", ["mobilenet", "mobilenet-relu", "resnet"])
def test_channels_fill_the_range_and_calibration_data_sees_the_same_function(name: str) -> None:
    model = uneven(name)
    names = [s.activations[0].name or "" for s in find_sites(model.ir) if s.op == "Conv"][1:]
    before, even = outputs(model), [evenness(model, n) for n in names]
    report = Pipeline([EqualizeActivations(strength=1.0, margin=1.0, activations="static")]).run(model)[0]
    assert report.changed >= 3
    assert difference(before, outputs(model)) < 1e-4
    assert np.mean([evenness(model, n) for n in names]) > 1.5 * np.mean(even)


def test_margin_leaves_room_for_other_data() -> None:
    model = uneven("mobilenet")
    value = next(s for s in find_sites(model.ir) if s.op == "Conv" and s.groups > 1).activations[0].name or ""
    before = channel_statistics(model, [value], axis=1)[value].absmax
    Pipeline([EqualizeActivations(strength=1.0, margin=3.0, activations="static")]).run(model)
    reach = channel_statistics(model, [value], axis=1)[value].absmax
    small = before < before.max() / 3
    assert small.sum() >= 3
    np.testing.assert_allclose(reach[small], reach.max() / 3, rtol=1e-3)
    np.testing.assert_allclose(reach[~small], before[~small], rtol=1e-3)


def test_narrow_weights_leave_only_the_inputs_of_depthwise_layers() -> None:
    changed = {}
    for budget in ("4bits", "8bits"):
        model = uneven("mobilenet")
        weights = {s.name: s.matrix().copy() for s in find_sites(model.ir)}
        Pipeline([EqualizeActivations(strength=1.0, activations="static", budget=(budget,))]).run(model)
        changed[budget] = {
            s.name for s in find_sites(model.ir) if s.columns > 9 and _columns_moved(weights[s.name], s.matrix())
        }
    assert not changed["4bits"]
    assert changed["8bits"]


def test_budgets_next_to_each_other_give_the_same_graph() -> None:
    """So that the losses measured for one serve the other."""
    prints = {}
    for budget in ("2.5bits", "4bits", "5.9bits", "6bits", "7.5bits", "8bits"):
        model = uneven("mobilenet")
        Pipeline([EqualizeActivations(0.35, 2.0, activations="static", budget=(budget,))]).run(model)
        prints[budget] = fingerprint(model.ir)
    assert prints["2.5bits"] == prints["4bits"] == prints["5.9bits"] != prints["6bits"]
    assert prints["6bits"] == prints["7.5bits"] != prints["8bits"]


def _columns_moved(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the columns were scaled, beside the rows."""
    ratio = np.where(before != 0, after / np.where(before == 0, 1, before), np.nan)
    spread = np.nanmax(ratio, 1) / np.nanmin(ratio, 1)
    return bool(np.nanmax(spread) > 1.001)


def test_float_and_dynamic_activations_are_left_alone() -> None:
    for mode in ("float", "dynamic"):
        model = uneven("mobilenet")
        report = Pipeline([EqualizeActivations(activations=mode)]).run(model)[0]
        assert report.changed == 0


def test_bad_options_and_rounded_models_are_refused() -> None:
    model = uneven("mobilenet")
    for option, value in (("strength", 1.5), ("margin", 0.5), ("percentile", 0.0)):
        with pytest.raises(BadOption, match="does not exist"):
            replace(EqualizeActivations(), **{option: value})
    model.calibration = None
    with pytest.raises(PassRefused, match="calibration data"):
        Pipeline([EqualizeActivations(activations="static")]).run(model)


def test_a_clip_is_crossed_only_loosely_and_keeps_its_bounds() -> None:
    model = ARCHITECTURES["mobilenet"]()
    clip = next(n for n in model.graph if n.op_type == "Clip")
    assert not isinstance(find_fold(model, clip.outputs[0], axis=1), Fold)
    fold = find_fold(model, clip.outputs[0], axis=1, loose=True)
    assert isinstance(fold, Fold)
    assert _bounds(clip)[1] == 6
    before = _bounds(clip)
    fold.scale(np.full(fold.size, 2.0))
    assert _bounds(clip) == before
    assert clip in fold.region.loose_clips


def _bounds(clip: ir.Node) -> list[float]:
    tensors = [ir.convenience.get_const_tensor(value) for value in clip.inputs[1:] if value is not None]
    return [float(t.numpy()) for t in tensors if t is not None]
