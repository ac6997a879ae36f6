from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.graph.sites import find_sites, skipped_weights
from tests.graph.architectures import ARCHITECTURES, VOCABULARY, WIDTH, Net


def test_names_are_unique_stable_and_in_topological_order() -> None:
    for make in ARCHITECTURES.values():
        model = make()
        sites = find_sites(model)
        names = [site.name for site in sites]
        assert len(set(names)) == len(names) > 4
        assert names == [site.name for site in find_sites(model.clone())]
        order = {node: k for k, node in enumerate(model.graph)}
        assert [order[s.node] for s in sites] == sorted(order[s.node] for s in sites)


def test_a_tied_head_is_one_site_in_the_layout_of_its_table() -> None:
    model = ARCHITECTURES["gemma"]()
    embedding = find_sites(model)[0]
    assert [node.op_type for node in embedding.users] == ["Gather", "MatMul"]
    assert (embedding.op, embedding.name) == ("Gather", "embedding")
    assert (embedding.rows, embedding.columns, embedding.layout) == (VOCABULARY, WIDTH, "rows-first")
    assert embedding.activation is None
    assert [v is embedding.users[1].inputs[0] for v in embedding.activations] == [True]


@pytest.mark.parametrize(
    ("op", "shape", "groups", "rows", "columns"),
    [
        ("Conv", (6, 4, 3, 3), 1, 6, 36),
        ("Conv", (6, 2, 3, 3), 2, 6, 18),
        ("Conv", (4, 1, 5, 5), 4, 4, 25),
        ("ConvTranspose", (4, 3, 2, 2), 1, 3, 16),
        ("ConvTranspose", (4, 3, 2, 2), 2, 6, 8),
    ],
)
def test_convolutions_as_matrices(op: str, shape: tuple[int, ...], groups: int, rows: int, columns: int) -> None:
    """Site.matrix() times the unfolded input is the output: checked against a 1-pixel convolution."""
    net = Net()
    kernel = net.rng.normal(size=shape).astype(np.float32)
    y = net.op(op, net.input("x", ["batch", 4, 8, 8]), net.const(kernel), group=groups)
    (site,) = find_sites(net.model(y))
    assert (site.rows, site.columns, site.groups, site.count) == (rows, columns, groups, kernel.size)
    assert np.array_equal(site.from_matrix(site.to_matrix(kernel)), kernel)
    taps = np.prod(shape[2:])
    o, i = rows - 1, columns // taps - 1  # the last output, the last input of its group
    expected = kernel[-1, -1] if op == "Conv" else kernel[(groups - 1) * (4 // groups) + i, -1]
    assert np.array_equal(site.matrix()[o].reshape(i + 1, *shape[2:])[i], expected)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.booleans())
def test_matrix_form_of_products_is_inverted(shape: list[int], flip: bool) -> None:
    net = Net()
    weight = np.arange(float(np.prod(shape) + 1))[1:].reshape(shape).astype(np.float32)
    x = net.input("x", [2, shape[-2]])
    if len(shape) == 2 and flip:
        y = net.op("Gemm", x, net.const(weight.T.copy()), transB=1)
    else:
        y = net.op("MatMul", x, net.const(weight))
    found = find_sites(net.model(y))
    if weight.size == 1:
        return
    (site,) = found
    tensor = weight.T if site.layout == "rows-first" else weight
    assert np.array_equal(site.from_matrix(site.to_matrix(tensor)), tensor)
    if len(shape) == 2:
        assert np.array_equal(site.matrix(), weight.T)


def test_weights_behind_identity_cast_and_transpose_are_sites() -> None:
    net = Net()
    x = net.input("x", ["batch", 4])
    half = net.const(np.ones((4, 4), np.float16))
    y = net.op("MatMul", x, net.op("Cast", half, to=ir.DataType.FLOAT))
    y = net.op("MatMul", y, net.op("Identity", net.random(4, 4)))
    y = net.op("MatMul", y, net.op("Transpose", net.random(3, 4), perm=[1, 0]))
    sites = find_sites(net.model(y))
    assert [s.layout for s in sites] == ["columns-first", "columns-first", "rows-first"]
    assert (sites[2].rows, sites[2].columns) == (3, 4)


def test_what_is_no_site_is_named_with_its_reason() -> None:
    net = Net()
    x = net.input("x", ["batch", 4])
    left, both, used, out, turned = (net.random(4, 4, name=n) for n in ("left", "both", "used", "out", "turned"))
    y = net.op("MatMul", left, net.op("Transpose", x, perm=[1, 0]))
    y = net.op("Transpose", y, perm=[1, 0])
    y = net.op("MatMul", net.op("MatMul", y, both), net.op("Transpose", both, perm=[1, 0]))
    y = net.op("Mul", net.op("MatMul", y, used), net.op("ReduceMax", used))
    y = net.op("MatMul", y, out)
    y = net.op("Gemm", y, turned, transA=1)
    model = net.model(y, out)
    reasons = {r.where: r.reason for r in skipped_weights(model)}
    assert find_sites(model) == []
    assert "left operand" in reasons["left"]
    assert "different matrices" in reasons["both"]
    assert "also used by ReduceMax" in reasons["used"]
    assert "output of the graph" in reasons["out"]
    assert "transposes its data" in reasons["turned"]


def test_weights_of_subgraphs_are_left_alone() -> None:
    net = Net()
    x, flag = net.input("x", ["batch", 4]), net.input("flag", [], ir.DataType.BOOL)
    weight = net.random(4, 4, name="shared")
    y = net.op("MatMul", x, weight)

    def branch(name: str) -> ir.Graph:
        node = ir.node("MatMul", [y, weight])
        node.outputs[0].name = name
        return ir.Graph([], [node.outputs[0]], nodes=[node], name=name)

    model = net.model(net.op("If", flag, then_branch=branch("a"), else_branch=branch("b")))
    assert find_sites(model) == []
    assert "used in a subgraph" in skipped_weights(model)[0].reason


def test_biases_gains_and_index_tables_are_no_sites() -> None:
    net = Net()
    ids = net.input("ids", ["batch"], ir.DataType.INT64)
    x = net.op("Gather", net.random(9, 4), net.op("Gather", net.const(np.arange(9)), ids))
    model = net.model(net.op("Add", net.op("Mul", x, net.gain(4)), net.random(1, 4)))
    assert [s.op for s in find_sites(model)] == ["Gather"]
    assert skipped_weights(model) == []


def test_module_paths_of_exporters_name_sites() -> None:
    net = Net()
    z = net.linear(net.linear(net.input("x", ["batch", 4]), 4, 4, bias=False), 4, 4, bias=False)
    key = "pkg.torch.onnx.name_scopes"
    net.nodes[0].metadata_props[key] = "['', 'layers.0', 'layers.0.fc', 'linear']"
    net.nodes[1].metadata_props[key] = "__import__('os')"
    assert [s.name for s in find_sites(net.model(z))] == ["layers.0.fc", "n1"]
