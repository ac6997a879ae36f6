from __future__ import annotations

import networkx as nx

from qcompiler.graph.sites import find_sites
from qcompiler.graph.topology import residual_streams, tie_groups, to_networkx
from tests.graph.architectures import ARCHITECTURES, LAYERS, Net


def test_sites_that_read_one_value_are_tied() -> None:
    model = ARCHITECTURES["llama-gqa"]()
    groups = tie_groups(model, find_sites(model))
    assert groups == [
        ("0.q", "0.k", "0.v"), ("0.gate", "0.up"), ("1.q", "1.k", "1.v"), ("1.gate", "1.up"),
    ]  # fmt: skip


def test_parallel_attention_ties_the_mlp_too() -> None:
    model = ARCHITECTURES["parallel"]()
    assert [len(g) for g in tie_groups(model, find_sites(model))] == [4] * LAYERS


def test_a_shared_weight_ties_all_its_activations() -> None:
    net = Net()
    x = net.input("x", ["batch", 4])
    shared = net.random(4, 4, name="shared.weight")
    a = net.op("MatMul", x, shared)
    b = net.op("MatMul", net.op("Tanh", a), shared)
    c = net.op("MatMul", net.op("Tanh", a), net.random(4, 4, name="other.weight"))
    d = net.op("MatMul", x, net.random(4, 4, name="third.weight"))
    model = net.model(b, c, d)
    assert tie_groups(model, find_sites(model)) == [("shared", "third")]


def test_terms_of_a_sum_are_tied_on_request_only() -> None:
    model = ARCHITECTURES["resnet"]()
    names = [site.name for site in find_sites(model)]
    stem, _, second, third, _, fifth, shortcut, _ = names
    assert tie_groups(model, find_sites(model)) == [(third, shortcut)]
    added = tie_groups(model, find_sites(model), add_inputs=True)
    assert added == [(stem, second), (third, fifth, shortcut)]


def test_a_residual_stream_is_one_class() -> None:
    model = ARCHITECTURES["llama"]()
    (stream,) = residual_streams(model)
    assert len(stream.values) == 1 + 4 * LAYERS
    assert [n.op_type for n in stream.writers] == ["Gather"] + ["MatMul"] * 2 * LAYERS
    assert {n.op_type for n in stream.readers} == {"Pow", "Mul"}


def test_parallel_blocks_have_two_writers_each_in_one_stream() -> None:
    model = ARCHITECTURES["parallel"]()
    longest = residual_streams(model)[0]
    assert sum(n.op_type == "MatMul" for n in longest.writers) == 2 * LAYERS
    assert {n.op_type for n in longest.readers} == {"LayerNormalization"}


def test_the_graph_as_networkx() -> None:
    model = ARCHITECTURES["mobilenet"]()
    graph = to_networkx(model)
    assert nx.is_directed_acyclic_graph(graph)
    assert set(graph.nodes) == set(model.graph)
    assert all(data["value"].producer() is a for a, _, data in graph.edges(data=True))
