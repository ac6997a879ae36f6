from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import Int, PerChannel, QuantSpec
from qcompiler.graph.sites import find_sites
from qcompiler.measure.fx_twin import fx_twin
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.lower.insert_qdq import InsertQDQ
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.hadamard import factors, hadamard, largest_block, mean_kept, rotation
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.pipeline import PassReport, Pipeline
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent
from tests.graph.architectures import ARCHITECTURES, HEAD, HEADS, LAYERS, WIDTH, Net, feeds_for, inject_outliers


def model_of(graph: ir.Model) -> Model:
    inject_outliers(graph)
    return Model(graph, calibration=Calibration.from_arrays(feeds_for(graph, batch=8), graph))


def run(model: Model, item: Rotate) -> PassReport:
    """The pipeline holds it to its contract, with outliers injected into the inputs."""
    return Pipeline([item]).run(model)[0]


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 60, 64, 108, 140, 192, 576])
def test_hadamard_matrices(order: int) -> None:
    h = hadamard(order)
    assert np.array_equal(np.abs(h), np.ones((order, order)))
    assert np.array_equal(h @ h.T, order * np.eye(order))


def test_every_width_has_an_even_matrix() -> None:
    assert [largest_block(n) for n in (576, 1536, 896, 184, 46, 9, 1)] == [576, 1536, 896, 8, 2, 1, 1]
    for width in (184, 46, 9, 1):
        q = rotation(width)
        assert np.abs(q @ q.T - np.eye(width)).max() < 1e-12
        assert np.abs(q).max() <= np.sqrt(2 / width) + 1e-12
    assert np.abs(rotation(576, block=64)).max() == pytest.approx(1 / 8)
    assert np.count_nonzero(rotation(184, block=8)) == 184 * 8
    assert not np.array_equal(rotation(64, 0), rotation(64, 1))
    with pytest.raises(ValueError, match="don't divide"):
        rotation(36, block=8)
    with pytest.raises(ValueError, match="order 3"):
        hadamard(3)
    with pytest.raises(ValueError, match="order 9"):
        rotation(18, block=9)


def test_factors_are_hadamard_orders_where_that_is_possible() -> None:
    assert [factors(n) for n in (64, 576, 1536, 384, 184, 9, 1)] == [
        (8, 8), (24, 24), (32, 48), (16, 24), (8, 23), (1, 9), (1, 1)
    ]  # fmt: skip


def test_a_matrix_that_keeps_the_mean_is_nearly_flat() -> None:
    q = rotation(576, 3, keep_mean=True)
    assert np.abs(q @ q.T - np.eye(576)).max() < 1e-12
    assert np.abs(q.sum(0) - 1).max() < 1e-12
    assert np.abs(q.sum(1) - 1).max() < 1e-12
    assert np.abs(q).max() < 2 / 24  # 1 / 24 before
    assert np.array_equal(mean_kept(np.eye(5)), np.eye(5))


@pytest.mark.parametrize("name", ["gpt2", "opt", "parallel", "vit"])
def test_streams_between_layer_norms_turn_and_the_norms_stay(name: str) -> None:
    model = model_of(ARCHITECTURES[name]())
    kinds = [node.op_type for node in model.graph]
    (facts,) = run(model, Rotate()).metrics["streams"].values()
    assert facts["width"] == WIDTH
    assert [node.op_type for node in model.graph] == kinds


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "llama-interleaved", "llama-fused", "qwen"])
def test_the_stream_turns_and_the_function_stays(name: str) -> None:
    model = model_of(ARCHITECTURES[name]())
    before = {site.name: site.matrix().copy() for site in find_sites(model.ir)}
    report = run(model, Rotate())
    assert report.changed == 1
    (facts,) = report.metrics["streams"].values()
    assert facts["width"] == facts["block"] == WIDTH
    assert (facts["writers"], facts["readers"]) == (1 + 2 * LAYERS, 5 * LAYERS + 1)
    assert facts["inserted"] == []
    assert facts["peak after"] < facts["peak before"]
    changed = [s.name for s in find_sites(model.ir) if not np.array_equal(before[s.name], s.matrix())]
    assert len(changed) == 1 + 2 * LAYERS + (5 * LAYERS + 1)


@pytest.mark.parametrize("name", ["gemma", "gpt2-tied"])
def test_a_table_that_is_tied_stays_one_and_products_turn_for_it(name: str) -> None:
    model = model_of(ARCHITECTURES[name]())
    table = model.graph.initializers["embedding.weight"]
    before, users, feeds = table.const_value.numpy().copy(), len(list(table.uses())), feeds_for(model.ir)  # type: ignore[union-attr]
    wanted = next(iter(Runner(model.ir)(feeds).values()))
    (facts,) = run(model, Rotate()).metrics["streams"].values()
    assert len(facts["inserted"]) == 2
    assert np.array_equal(table.const_value.numpy(), before)  # type: ignore[union-attr]
    assert len(list(table.uses())) == users
    found = next(iter(Runner(model.ir)(feeds).values()))
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5


def test_a_tied_table_may_be_the_stream_s_own_beginning() -> None:
    net = Net()
    table = net.random(40, WIDTH, name="embedding.weight")
    x = net.op("Gather", table, net.input("ids", ["batch", 5], ir.DataType.INT64))
    x = net.op("Add", x, net.linear(net.op("Relu", net.linear(net.rms_norm(x), WIDTH, 24)), 24, WIDTH))
    model = model_of(net.model(net.op("MatMul", net.rms_norm(x), net.op("Transpose", table, perm=[1, 0]))))
    (facts,) = run(model, Rotate()).metrics["streams"].values()
    assert len(facts["inserted"]) == 2


def test_a_gain_of_zero_stops_it_and_leaves_nothing_behind() -> None:
    model = model_of(ARCHITECTURES["gemma"]())
    names, nodes = set(model.graph.initializers), len(list(model.graph))
    constants = [value for value in model.graph.initializers.values() if value.const_value is not None]
    gain = next(value for value in constants if value.const_value.shape == ir.Shape([WIDTH]))  # type: ignore[union-attr]
    array = gain.const_value.numpy().copy()  # type: ignore[union-attr]
    array[3] = -1.0  # Gemma's gains are 1 + this
    gain.const_value = ir.tensor(array, name=gain.name)
    report = run(model, Rotate())
    assert report.changed == 0
    assert "gain of zero" in report.refused[0].reason
    assert len(list(model.graph)) == nodes
    assert set(model.graph.initializers) == names


@pytest.mark.parametrize(
    ("name", "reason"), [("bert", "cannot cross LayerNormalization"), ("mobilenet", "cannot cross")]
)
def test_what_cannot_be_turned_is_left_alone_with_the_reason(name: str, reason: str) -> None:
    model = model_of(ARCHITECTURES[name]())
    report = run(model, Rotate())
    assert report.changed == 0
    assert all(reason in refusal.reason for refusal in report.refused)
    assert report.refused


def test_blocks_must_fit() -> None:
    with pytest.raises(BadOption, match="no Hadamard block of 7"):
        run(model_of(ARCHITECTURES["llama"]()), Rotate(block=7))
    report = run(model_of(ARCHITECTURES["llama"]()), Rotate(block=32))
    assert "not made of Hadamard blocks of 32" in report.refused[0].reason
    (facts,) = run(model_of(ARCHITECTURES["llama"]()), Rotate(block=4)).metrics["streams"].values()
    assert facts["block"] == 4


def test_an_odd_width_turns_too_unless_blocks_are_asked_for() -> None:
    net = Net()
    x = net.op("Gather", net.random(40, 9), net.input("ids", ["batch", 5], ir.DataType.INT64))
    x = net.op("Add", x, net.linear(net.op("Relu", net.linear(x, 9, 12)), 12, 9))
    graph = net.model(net.linear(x, 9, 40))
    assert "9 channels" in run(model_of(graph), Rotate(block=4)).refused[0].reason
    assert run(model_of(graph), Rotate()).changed == 1


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-fused", "gemma", "vit", "bert"])
def test_heads_turn_for_nothing_and_the_rest_where_the_graph_runs(name: str) -> None:
    model = model_of(ARCHITECTURES[name]())
    sites = [site.name for site in find_sites(model.ir)]
    nodes = len(list(model.graph))
    heads = run(model, Rotate(heads=True)).metrics["heads"]
    assert [facts["blocks"] for facts in heads.values()] == [HEADS] * LAYERS
    inserted = 2 if name == "gemma" else 0
    assert len(list(model.graph)) == nodes + inserted  # nothing of it runs
    model = model_of(ARCHITECTURES[name]())
    report = run(model, Rotate(heads=True, online=True))
    online = report.metrics["online"]
    across = [facts for value, facts in online.items() if value in heads and facts["sizes"] == [1, HEADS, HEAD]]
    gates = [facts for facts in online.values() if facts["width"] == 24]
    assert (len(across), len(gates)) == (LAYERS, LAYERS)
    made = [node for node in model.graph if node.domain == "qcompiler"]
    assert len(made) == len(online)
    assert [site.name for site in find_sites(model.ir)][: len(sites)] == sites or name == "gemma"


def test_online_matrices_share_constants_and_reach_every_product_behind_norms_that_cannot_turn() -> None:
    model = model_of(ARCHITECTURES["bert"]())
    report = run(model, Rotate(online=True))
    turned = {name for facts in report.metrics["online"].values() for name in facts["sites"]}
    assert turned == {site.name for site in find_sites(model.ir) if site.op != "Gather"}
    constants = [name for name in model.graph.initializers if name.startswith("hadamard")]
    assert len(constants) == 4  # 4 x 4 and 2 x 12
    assert "cannot cross LayerNormalization" in report.refused[0].reason


def test_blocks_of_online_matrices() -> None:
    model = model_of(ARCHITECTURES["bert"]())
    online = run(model, Rotate(online=True, block=8)).metrics["online"]
    assert {tuple(facts["sizes"]) for facts in online.values()} == {(2, 2, 4), (3, 2, 4)}
    report = run(model_of(ARCHITECTURES["bert"]()), Rotate(online=True, block=16))
    assert any("not made of Hadamard blocks of 16" in refusal.reason for refusal in report.refused)


def test_a_weight_with_two_inputs_is_not_turned_online() -> None:
    net = Net()
    shared = net.random(12, 12)
    h = net.op("Relu", net.op("MatMul", net.op("Relu", net.input("x", ["batch", 12])), shared))
    model = model_of(net.model(net.op("MatMul", h, shared)))
    report = run(model, Rotate(online=True))
    assert report.changed == 0
    assert "read other values too" in report.refused[0].reason


def test_online_matrices_survive_lowering_and_the_differentiable_twin() -> None:
    model = model_of(ARCHITECTURES["llama-gqa"]())
    feeds = feeds_for(model.ir)
    wanted = next(iter(Runner(model.ir)(feeds).values()))
    run(model, Rotate(heads=True, online=True))
    twin = fx_twin(model.ir)
    found = twin(*(torch.from_numpy(feeds[v.name or ""]) for v in model.graph.inputs))[0].detach().numpy()
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5
    eight = QuantSpec(Int(8), PerChannel(), True)
    plans = {s.name: SitePlan(eight, "float" if s.op == "Gather" else "dynamic") for s in find_sites(model.ir)}
    model.plan = model.plan.with_sites(plans)
    Pipeline([Nearest(), InsertQDQ()]).run(model)
    lowered = next(iter(Runner(model.ir)(feeds).values()))
    assert 0 < np.abs(lowered - wanted).max() / np.abs(wanted).max() < 0.1
    rows = [node for node in model.graph if node.op_type == "QuantizeRows"]
    assert sum(node.inputs[0].producer().op_type.startswith("Hadamard") for node in rows) == 2 * LAYERS  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-fused", "packed", "merged", "vit"])
def test_queries_and_keys_turn_together(name: str) -> None:
    model = model_of(ARCHITECTURES[name]())
    report = run(model, Rotate(keys=True))
    assert [facts["width"] for facts in report.metrics["keys"].values()] == [HEAD] * LAYERS
    assert sum(node.op_type.startswith("Hadamard") for node in model.graph) == 2 * LAYERS


def test_keys_in_a_cache_that_others_see_stay() -> None:
    net = Net(opset=23)
    parts = [net.input(part, ["batch", HEADS, 5, HEAD]) for part in "qkv"]
    past = [net.input(part, ["batch", HEADS, 3, HEAD]) for part in ("past_key", "past_value")]
    y, key, value = net.op("Attention", *parts, None, *past, outputs=3)
    model = net.model(y, key, value)
    report = Rotate(keys=True).run(Model(model), Silent())
    assert "a cache holds keys" in report.refused[0].reason
    assert report.changed == 0


def test_keys_that_others_read_transposed_stay() -> None:
    net = Net()
    q, k = net.input("q", ["batch", 5, HEAD]), net.input("k", ["batch", 5, HEAD])
    across = net.op("Transpose", k, perm=[0, 2, 1])
    model = net.model(net.op("MatMul", q, across), net.op("Relu", across))
    assert Rotate(keys=True).run(Model(model), Silent()).changed == 0


def test_a_weight_that_would_overflow_stays_and_says_so() -> None:
    net = Net()
    table = net.const(np.full((40, 8), 60000, np.float16))
    x = net.op("Gather", table, net.input("ids", ["batch", 5], ir.DataType.INT64))
    x = net.op("Add", x, net.op("MatMul", x, net.const(net.rng.normal(size=(8, 8)).astype(np.float16))))
    graph = net.model(net.op("MatMul", x, net.const(np.ones((8, 3), np.float16))))
    before = table.const_value
    with pytest.raises(PassRefused, match="overflows"):
        Rotate().run(Model(graph), Silent())
    assert table.const_value is before


def test_channels_that_are_dead_are_no_trouble() -> None:
    graph = ARCHITECTURES["llama"]()
    for site in find_sites(graph):
        array = site.weight.const_value.numpy().copy()  # type: ignore[union-attr]
        array[..., :3] = 0
        site.weight.const_value = ir.tensor(array, name=site.weight.name)
    assert run(model_of(graph), Rotate(heads=True, online=True)).changed == 7


def test_after_rounding_it_is_too_late() -> None:
    model = model_of(ARCHITECTURES["llama"]())
    model.weights["x"] = None  # type: ignore[assignment]
    with pytest.raises(PassRefused, match="rounded already"):
        run(model, Rotate())
