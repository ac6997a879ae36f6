"""Panels of two precisions: ResQ's basis and COMET's order keep the function, and put what is strong into the first."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.backends.onnx.backend import OnnxBackend
from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, PassRefused
from qcompiler.graph.folds import Stream, find_stream
from qcompiler.graph.folds.widen import widen
from qcompiler.graph.panels import find_cuts, is_high
from qcompiler.graph.sites import find_sites
from qcompiler.graph.topology import residual_streams
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.plan.candidates import Rows, menu
from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.center_norms import CenterNorms
from qcompiler.passes.transform.channel_order import ChannelOrder
from qcompiler.passes.transform.join_panels import JoinPanels
from qcompiler.passes.transform.pca_split import PCASplit
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.pipeline import Pass, Pipeline
from qcompiler.progress import Silent
from tests.graph.architectures import ARCHITECTURES, LAYERS, WIDTH, Net, feeds_for, inject_outliers
from tests.passes.transform.loud import loud_model, run

ROTATABLE = ["llama", "llama-gqa", "llama-interleaved", "llama-fused", "qwen", "gemma"]
ORDER = ChannelOrder(block=4, theta=2.0, most=0.5)


def small(reach: Any, samples: int = 64, seed: int = 0) -> Model:
    """x [batch, 32], channel c of magnitude reach[c] -> 24, and 8 more rows read it too."""
    rng, net = np.random.default_rng(seed), Net(seed)
    x = net.input("x", ["batch", 32])
    graph = net.model(net.linear(x, 32, 24, name="a"), net.linear(x, 32, 8, name="b"))
    data = {"x": (rng.uniform(-1, 1, (samples, 32)) * np.asarray(reach)).astype(np.float32)}
    return Model(graph, calibration=Calibration.from_arrays(data, graph))


def lopsided() -> np.ndarray:
    reach = np.ones(32)
    reach[[3, 9, 17, 30]] = [20, 50, 30, 10]
    return reach


def decibels(model: Model, *passes: Pass) -> float:
    """Of a copy that has gone through passes, on its calibration data."""
    copy = model.clone()
    Pipeline([*passes, InsertQDQ()], verify=False).run(copy)
    assert model.calibration is not None
    exact, found, power, error = Runner(model.ir), Runner(copy.ir), 0.0, 0.0
    for feed in model.calibration.batches(16):
        want = exact(feed)
        got = found(feed)
        power += sum(float(np.square(y).sum()) for y in want.values())
        error += sum(float(np.square(want[name] - got[name]).sum()) for name in want)
    return float(10 * np.log10(power / error))


def w4a4(high: str = "int8-sym-channel-fp32", **options: Any) -> Uniform:
    four = "int4-sym-channel-fp32"
    return Uniform(four, "dynamic", embeddings="float", high=high, activation_bits=4, **options)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("item", [PCASplit(), PCASplit(share=0.25, append=True), ORDER])
def test_the_function_stays_or_there_is_a_reason(name: str, item: Pass) -> None:
    model = loud_model(name, 16)
    report = run(model, item)
    onnx.checker.check_model(ir.to_proto(model.ir), full_check=True)
    assert report.changed or report.refused
    high = [site for site in find_sites(model.ir) if is_high(site)]
    cuts = find_cuts(model.graph, find_sites(model.ir))
    assert len(high) == report.changed == len(cuts)
    assert all(is_high(cut.sum.sites[0]) and not is_high(cut.sum.sites[1]) for cut in cuts)


@pytest.mark.parametrize("name", ROTATABLE)
def test_a_stream_is_cut_at_all_its_readers(name: str) -> None:
    report = run(loud_model(name, 16), PCASplit(share=0.25))
    (facts,) = report.metrics["streams"].values()
    assert (facts["width"], facts["high"], facts["readers cut"]) == (WIDTH, 4, 5 * LAYERS + 1)
    assert 0.5 < facts["power"] <= 1


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "parallel", "vit"])
def test_streams_between_layer_norms_once_these_see_no_mean(name: str, append: bool) -> None:
    report = run(loud_model(name, 16), CenterNorms(), PCASplit(share=0.25, append=append))
    assert report.changed or any("may hold the number of channels" in r.reason for r in report.refused)
    assert report.changed or append


@pytest.mark.parametrize("name", ROTATABLE)
def test_appended_directions_make_the_stream_wider_and_no_longer(name: str) -> None:
    model = loud_model(name, 16)
    report = run(model, PCASplit(share=0.25, append=True))
    (facts,) = report.metrics["streams"].values()
    assert (facts["width"], facts["high"], facts["readers cut"]) == (WIDTH, 4, 5 * LAYERS + 1)
    cuts = find_cuts(model.graph, find_sites(model.ir))
    assert {cut.sizes for cut in cuts} == {(4, WIDTH)}
    values = [str(cut.value.name) for cut in cuts]
    shown = Runner(model.ir, outputs=sorted(set(values)))(feeds_for(model.ir))
    for array in shown.values():  # norms divide by the number of channels that there was
        assert array.shape[-1] == WIDTH + 4
        np.testing.assert_allclose(np.square(array).sum(-1), WIDTH, rtol=1e-2)
    assert all(cut.value.shape is not None and cut.value.shape[-1] == WIDTH + 4 for cut in cuts)


def test_only_orthonormal_rows_widen_and_only_streams_without_gains() -> None:
    model = loud_model("llama", 16)
    stream = find_stream(model.ir, residual_streams(model.ir)[0].values[0])
    assert isinstance(stream, Stream)
    wide = np.concatenate([np.eye(WIDTH), np.zeros((WIDTH, 2))], 1)
    with pytest.raises(BadOption, match="gain for each channel"):
        widen(stream, wide)
    stream.fold_gains()
    for matrix in (2 * wide, wide[1:], wide.T):
        with pytest.raises(BadOption, match="orthonormal"):
            widen(stream, matrix)
    before = Runner(model.ir)(feeds_for(model.ir))
    widen(stream, wide)
    for name, array in Runner(model.ir)(feeds_for(model.ir)).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-4, atol=1e-4)


def test_appended_directions_gain_at_four_bits() -> None:
    """QUAD: less error than rotation alone, with the same bits in what was there."""
    model = loud_model("llama", 16)
    plain = decibels(model, Rotate(), w4a4(), Nearest())
    for high in ("int8-sym-channel-fp32", "float"):
        assert decibels(model, PCASplit(share=0.25, append=True), w4a4(high), Nearest()) > plain + 1


def moments(model: Model) -> np.ndarray:
    """Mean second moments of the values that are cut, each in units of its power: [WIDTH, WIDTH]."""
    names = {str(cut.value.name) for cut in find_cuts(model.graph, find_sites(model.ir))}
    assert model.calibration is not None
    rows = [Runner(model.ir, outputs=sorted(names))(feed) for feed in model.calibration.batches(16)]
    found = [np.concatenate([feed[name].reshape(-1, WIDTH) for feed in rows]).astype(np.float64) for name in names]
    return np.mean([x.T @ x / np.square(x).sum() for x in found], axis=0)


def test_no_other_basis_has_more_power_in_its_first_channels() -> None:
    """Monte Carlo over random bases: what the transform reports is what is there, and none of them has more."""
    model = loud_model("llama", 16)
    (facts,) = run(model, PCASplit(share=0.25)).metrics["streams"].values()
    found = moments(model)
    assert np.trace(found[:4, :4]) == pytest.approx(facts["power"], rel=1e-3)
    rng = np.random.default_rng(0)
    bases = (np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0][:, :4] for _ in range(500))
    assert max(float(np.trace(q.T @ found @ q)) for q in bases) < facts["power"]


def test_power_is_shared_out_within_either_part() -> None:
    model = loud_model("llama", 16)
    run(model, PCASplit(share=0.5))
    found = moments(model)
    for part in (found[:8, :8], found[8:, 8:]):
        power = np.diagonal(part)
        assert power.max() < 2 * power.mean()
    assert np.trace(found[:8, :8]) > 3 * np.trace(found[8:, 8:])


def test_two_precisions_beat_one_and_this_basis_any_other() -> None:
    """Less error than rotation alone, and than the same share of the channels of a rotated stream."""
    model = loud_model("llama", 16)
    rest = ChannelOrder(block=2, theta=0.0, most=0.25)
    plain = decibels(model, Rotate(), w4a4(), Nearest())
    any_channels = decibels(model, Rotate(), rest, w4a4(), Nearest())
    split = decibels(model, PCASplit(share=0.25), rest, w4a4(), Nearest())
    assert split > any_channels + 1
    assert split > plain + 3


def test_isotropic_streams_have_no_strong_directions() -> None:
    """The control: all directions have the same power, up to what few samples make of it."""

    def stream(outliers: bool) -> float:
        net = Net(1)
        table = net.random(512, WIDTH, name="embedding.weight")
        x = net.op("Gather", table, net.input("ids", ["batch", 64], ir.DataType.INT64))
        x = net.op("Add", x, net.linear(net.op("Relu", net.linear(net.rms_norm(x), WIDTH, 24)), 24, WIDTH, bias=False))
        graph = net.model(net.linear(net.rms_norm(x), WIDTH, 8))
        for name, value in graph.graph.initializers.items():  # a stream that is the table's rows only
            if name != "embedding.weight" and value.const_value is not None and value.const_value.shape == (24, WIDTH):
                value.const_value = ir.tensor(np.zeros((24, WIDTH), np.float32), name=name)
        if outliers:
            inject_outliers(graph)
        ids = np.random.default_rng(0).integers(0, 512, (32, 64))
        model = Model(graph, calibration=Calibration.from_arrays({"ids": ids}, graph))
        (facts,) = run(model, PCASplit(share=0.25)).metrics["streams"].values()
        return float(facts["power"])

    assert stream(outliers=True) > 0.9
    assert stream(outliers=False) < 0.45


def test_outliers_come_first_and_take_as_few_blocks_as_they_can() -> None:
    model = small(lopsided())
    report = run(model, ORDER)
    (facts,) = report.metrics["panels"].values()
    assert (facts["columns"], facts["order"], facts["outliers"], facts["blocks"]) == ([4, 28], "gather", 4, 8)
    assert (facts["blocks with outliers"], facts["high blocks"]) == (4, 1)
    assert report.changed == 2
    index = next(node for node in model.graph if node.op_type == "Gather").inputs[1]
    assert index is not None
    assert index.const_value.numpy()[:4].tolist() == [9, 17, 3, 30]  # type: ignore[union-attr]


def test_blocks_moved_whole_leave_outliers_behind() -> None:
    model = small(lopsided())
    (facts,) = run(model, ChannelOrder(block=4, theta=2.0, most=0.25, order="blocks")).metrics["panels"].values()
    assert (facts["high blocks"], facts["columns"]) == (2, [8, 24])
    index = next(node for node in model.graph if node.op_type == "Gather").inputs[1]
    assert index is not None
    assert index.const_value.numpy()[:8].tolist() == [8, 9, 10, 11, 16, 17, 18, 19]  # type: ignore[union-attr]


def test_a_producer_absorbs_the_order() -> None:
    net = Net(0)
    net.rng = np.random.default_rng(3)
    hidden = net.op("Relu", net.linear(net.input("x", ["batch", 16]), 16, 32, name="a"))
    graph = net.model(net.linear(hidden, 32, 8, name="b"))
    value = graph.graph.initializers["a.weight"]
    array = value.const_value.numpy().copy()  # type: ignore[union-attr]
    array[:, [5, 20]] *= 50
    value.const_value = ir.tensor(array, name=value.name)
    data = {"x": np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)}
    model = Model(graph, calibration=Calibration.from_arrays(data, graph))
    panels = run(model, ChannelOrder(block=8, theta=4.0)).metrics["panels"]
    assert [facts["order"] for facts in panels.values()] == ["folded"]
    assert not any(node.op_type == "Gather" for node in model.graph)


def test_most_of_the_gap_between_rows_of_four_and_eight_bits_is_closed() -> None:
    model = small(lopsided(), 256)
    spec = "int8-sym-channel-fp32"
    four, eight = (decibels(model, Uniform(spec, "dynamic", activation_bits=b), Nearest()) for b in (4, 8))
    mixed = decibels(model, ORDER, Uniform(spec, "dynamic", activation_bits=4), Nearest())
    unsorted = ChannelOrder(block=4, theta=2.0, most=0.125, order="blocks")
    whole = decibels(model, unsorted, Uniform(spec, "dynamic", activation_bits=4), Nearest())
    assert mixed > four + 6
    assert mixed > eight - 3
    assert mixed > whole + 3


@pytest.mark.parametrize(
    ("reach", "item", "reason"),
    [
        (np.ones(32), ORDER, "no channel"),
        (np.zeros(32), ORDER, "no channel"),
        (lopsided(), ChannelOrder(block=16, most=0.4), "is more than 0.4 of its 2"),
        (lopsided(), ChannelOrder(block=32), "32 columns only"),
        (lopsided(), ChannelOrder(block=4, keep=("*",)), "stay float"),
    ],
)
def test_what_is_not_worth_it_or_not_possible_is_said(reach: np.ndarray, item: Pass, reason: str) -> None:
    model = small(reach)
    nodes = len(list(model.graph))
    report = run(model, item)
    assert report.changed == 0
    assert len(report.refused) == 2
    assert reason in report.refused[0].reason
    assert len(list(model.graph)) == nodes


def test_matrices_in_panels_are_not_cut_again() -> None:
    model = loud_model("llama", 16)
    run(model, PCASplit(share=0.25))
    before = len(find_cuts(model.graph, find_sites(model.ir)))
    report = run(model, ChannelOrder(block=2, theta=0.0, most=0.25))
    assert report.changed > 0
    assert len(find_cuts(model.graph, find_sites(model.ir))) == before + report.changed
    assert any("a panel already" in refusal.reason for refusal in report.refused)


def test_dead_streams_and_wrong_options_are_refused() -> None:
    model = loud_model("gemma", 16)
    nodes = len(list(model.graph))
    table = model.graph.initializers["embedding.weight"]
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.shape == ir.Shape([WIDTH]):
            value.const_value = ir.tensor(np.full(WIDTH, -0.5, np.float32), name=value.name)
    table.const_value = ir.tensor(np.zeros(tuple(table.const_value.shape), np.float32), name=table.name)  # type: ignore[union-attr, arg-type]
    report = Pipeline([PCASplit()], verify=False).run(model)[0]
    assert report.changed == 0
    assert "zero or not finite" in report.refused[0].reason
    assert len(list(model.graph)) == nodes
    tiny = run(loud_model("llama", 16), PCASplit(share=0.01))
    assert "none or all" in tiny.refused[0].reason
    for share in (0.0, 1.0, np.nan):
        with pytest.raises(BadOption):
            run(loud_model("llama", 16), PCASplit(share=share))
    for options in ({"block": 0}, {"theta": -1.0}, {"theta": np.nan}, {"most": 0.0}, {"most": 1.0}, {"order": "x"}):
        with pytest.raises(BadOption):
            ChannelOrder(**options)  # type: ignore[arg-type]
    model = loud_model("llama", 16)
    model.calibration = None
    for item in (PCASplit(), ORDER):
        with pytest.raises(PassRefused, match="calibration data"):
            run(model, item)


def test_plans_give_high_panels_more() -> None:
    model = loud_model("llama", 16)
    run(model, PCASplit(share=0.25))
    w4a4(activation_clip=0.9).run(model, Silent())
    sites = [site for site in find_sites(model.ir) if site.op == "MatMul"]
    assert any(map(is_high, sites))
    for site in sites:
        plan = model.plan.sites[site.name]
        wanted = (8, 8, 1.0) if is_high(site) else (4, 4, 0.9)
        assert plan.weight is not None
        assert (plan.weight.bits, plan.activation_bits, plan.activation_clip) == wanted
        offered = menu(OnnxBackend("dynamic"), site, (4, 8), (), "dynamic", rows=Rows(4, 0.9)).plans
        assert {(p.activation_bits, p.activation_clip) for p in offered} == {wanted[1:]}
    with pytest.raises(BadOption):
        w4a4("int99")


def test_panels_of_two_widths_are_not_joined_and_whole_matrices_lose_their_mark() -> None:
    model = small(lopsided())
    run(model, ORDER, w4a4("int4-sym-channel-fp32"))
    assert run(model, JoinPanels()).changed == 0
    Uniform("int4-sym-channel-fp32", "dynamic").run(model, Silent())
    assert run(model, JoinPanels()).changed == 2
    assert not any(map(is_high, find_sites(model.ir)))


def test_resq_and_comet_compile_and_round_together(tmp_path: Any) -> None:
    model = loud_model("llama", 16)
    order = ChannelOrder(block=2, theta=0.0, most=0.25)
    Pipeline([PCASplit(share=0.25), order, w4a4(), GPTQ(), InsertQDQ()]).run(model)
    want = Runner(model.ir)(feeds_for(model.ir))
    OnnxBackend().compile(model, tmp_path, Silent())
    got = OnnxBackend(threads=1).load(tmp_path).run(feeds_for(model.ir))
    for name, array in want.items():
        assert np.linalg.norm(got[name] - array) < 2e-2 * np.linalg.norm(array)
