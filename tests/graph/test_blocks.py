"""Orthogonal matrices within heads and between linear layers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from scipy.stats import ortho_group

from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from tests.graph.architectures import ARCHITECTURES, HEAD, HEADS, LAYERS, WIDTH, Net, feeds_for, inject_outliers


def difference(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(before[k] - after[k]).max() / np.abs(before[k]).max()) for k in before)


def matrices(fold: Fold, seed: int = 0) -> list[np.ndarray]:
    return [ortho_group.rvs(block.shape[1], random_state=seed + k) for k, block in enumerate(fold.blocks)]


def folds_of(model: ir.Model) -> list[Fold]:
    """What layers read and a rotation may change, axis 1 for images."""
    found = []
    for site in find_sites(model):
        for value in site.activations:
            axis = 1 if site.op == "Conv" else -1
            fold = find_fold(model, value, "rotate", axis=axis)
            found += [fold] if isinstance(fold, Fold) else []
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rotation_of_any_value_is_exact_or_refused(name: str) -> None:
    model = ARCHITECTURES[name]()
    inject_outliers(model)
    feeds = feeds_for(model, loud=True)
    before = Runner(model)(feeds)
    turned = 0
    for value in [v for node in model.graph for v in node.outputs]:
        rank = len(value.shape or ())
        for axis in range(1, rank):
            fold = find_fold(model, value, "rotate", axis=axis)
            if isinstance(fold, Fold):
                fold.rotate(matrices(fold, turned))
                turned += 1
    assert turned >= (0 if name.startswith(("resnet", "mobilenet")) else LAYERS)
    assert difference(before, Runner(model)(feeds)) < 1e-5


@pytest.mark.parametrize(
    ("name", "kv"), [("llama", HEADS), ("llama-gqa", 2), ("llama-fused", 2), ("gpt2", HEADS), ("bert", HEADS)]
)
def test_values_turn_head_by_head_and_grouped_heads_share_a_matrix(name: str, kv: int) -> None:
    folds = folds_of(ARCHITECTURES[name]())
    assert len(folds) == LAYERS  # what the output projections read
    for fold in folds:
        assert [block.shape for block in fold.blocks] == [(HEADS // kv, HEAD)] * kv
        places = np.sort(np.concatenate([block.reshape(-1) for block in fold.blocks]))
        assert np.array_equal(places, np.arange(WIDTH))


def test_the_value_itself_is_multiplied() -> None:
    model = ARCHITECTURES["llama-gqa"]()
    fold = folds_of(model)[0]
    name, feeds = fold.value.name or "", feeds_for(model)
    old = Runner(model, outputs=[name])(feeds)[name]
    turns = matrices(fold)
    fold.rotate(turns)
    new = Runner(model, outputs=[name])(feeds)[name]
    for block, matrix in zip(fold.blocks, turns, strict=True):
        for channels in block:
            assert np.allclose(new[..., channels], old[..., channels] @ matrix, atol=1e-5)


def test_channels_between_two_linear_layers_are_one_block() -> None:
    net = Net()
    x = net.input("x", ["batch", 8])
    model = net.model(net.linear(net.op("Relu", net.linear(net.linear(x, 8, 6), 6, 9)), 9, 3))
    (fold,) = folds_of(model)
    assert [block.tolist() for block in fold.blocks] == [[[0, 1, 2, 3, 4, 5]]]


@pytest.mark.parametrize("kind", ["Relu", "Gelu", "Mul", "Softmax", "Slice", "LayerNormalization"])
def test_what_sees_single_channels_stops_it(kind: str) -> None:
    net = Net(opset=20)
    h = net.linear(net.input("x", ["batch", 8]), 8, 8)
    if kind == "Mul":
        h = net.op("Mul", h, net.gain(8))
    elif kind == "LayerNormalization":
        h = net.layer_norm(h, 8)
    elif kind == "Slice":  # half of the channels go one way, all of them the other
        half = net.linear(net.op("Slice", h, net.ints(0), net.ints(4), net.ints(1)), 4, 8)
        h = net.op("Add", net.op("Relu", half), net.linear(h, 8, 8))
    else:
        h = net.op(kind, h)
    model = net.model(net.linear(h, 8, 3))
    before = Runner(model)(feeds_for(model))
    for value in [v for node in model.graph for v in node.outputs]:
        fold = find_fold(model, value, "rotate")
        if isinstance(fold, Fold):
            fold.rotate(matrices(fold))
    assert difference(before, Runner(model)(feeds_for(model))) < 1e-5
    if kind != "Slice":
        assert isinstance(find_fold(model, h, "rotate"), Refusal)


def test_matrices_must_fit_and_be_orthogonal() -> None:
    fold = folds_of(ARCHITECTURES["llama"]())[0]
    with pytest.raises(BadOption, match="take matrices of"):
        fold.rotate([np.eye(HEAD)])
    with pytest.raises(BadOption, match="not orthogonal"):
        fold.rotate([2 * np.eye(HEAD)] * HEADS)
    with pytest.raises(BadOption, match="found for a rotate"):
        fold.scale(1)


def test_a_weight_that_others_read_too_stays() -> None:
    net = Net()
    x, shared = net.input("x", ["batch", 8]), net.random(8, 8)
    h = net.op("MatMul", net.op("MatMul", x, shared), shared)
    found = find_fold(net.model(h), net.nodes[0].outputs[0], "rotate")
    assert isinstance(found, Refusal)
    assert "is tied" in found.reason
