from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import BadOption, PassRefused, Refusal
from qcompiler.graph.folds import Fold, Kind, find_fold
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.runner import Runner
from tests.graph.architectures import (
    ARCHITECTURES,
    HEAD,
    HEADS,
    WIDTH,
    Net,
    feeds_for,
    inject_outliers,
    llama,
    mobilenet,
)

EXACT = 1e-5


def difference(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(before[k] - after[k]).max() / np.abs(before[k]).max()) for k in before)


def value_named(model: ir.Model, name: str | None) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def axis_of(value: ir.Value, name: str) -> int:
    return 1 if name.startswith(("mobilenet", "resnet")) and len(value.shape or ()) == 4 else -1


def found(model: ir.Model, value: ir.Value, kind: Kind = "scale", **options: object) -> Fold:
    fold = find_fold(model, value, kind, **options)  # type: ignore[arg-type]
    assert isinstance(fold, Fold), fold
    return fold


def refusal(model: ir.Model, value: ir.Value, kind: Kind = "scale", **options: object) -> str:
    fold = find_fold(model, value, kind, **options)  # type: ignore[arg-type]
    assert isinstance(fold, Refusal)
    return fold.reason


def site(model: ir.Model, name: str) -> Site:
    return next(s for s in find_sites(model) if s.name == name)


def output_of(site: Site) -> ir.Value:
    return site.node.outputs[0]


def input_of(site: Site) -> ir.Value:
    assert site.activation is not None
    return site.activation


@pytest.mark.parametrize("loud", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_scale_of_any_value_is_exact_or_refused(name: str, loud: bool) -> None:
    """Every value of every architecture, one after the other in one model."""
    model, rng = ARCHITECTURES[name](), np.random.default_rng(0)
    if loud:
        inject_outliers(model)
    feeds = feeds_for(model, loud=loud)
    before = Runner(model)(feeds)
    folds = 0
    for value in [v for node in model.graph for v in node.outputs]:
        fold = find_fold(model, value, axis=axis_of(value, name), insert=name == "mobilenet")
        if isinstance(fold, Fold):
            fold.scale(fold.tied(np.exp(0.5 * rng.normal(size=fold.size))))
            folds += 1
    assert folds > 5
    assert difference(before, Runner(model)(feeds)) < EXACT


@pytest.mark.parametrize("name", ["gpt2", "opt", "parallel", "vit"])
def test_a_shift_behind_a_norm_is_exact(name: str) -> None:
    model, rng = ARCHITECTURES[name](), np.random.default_rng(0)
    feeds = feeds_for(model)
    before = Runner(model)(feeds)
    norms = [node.outputs[0] for node in model.graph if node.op_type == "LayerNormalization"]
    for value in norms:
        fold = found(model, value, "shift", insert=True)
        fold.shift(rng.normal(size=fold.size))
    assert len(norms) > 2
    assert difference(before, Runner(model)(feeds)) < EXACT


def test_a_shift_really_moves_the_value_and_its_mean_can_be_removed() -> None:
    model = ARCHITECTURES["opt"]()
    value = input_of(find_sites(model)[1])
    feeds = feeds_for(model)
    old = Runner(model, outputs=[value.name or ""])(feeds)[value.name or ""]
    found(model, value, "shift").shift(old.mean((0, 1)))
    new = Runner(model, outputs=[value.name or ""])(feeds)[value.name or ""]
    assert np.abs(new.mean((0, 1))).max() < 1e-5
    assert np.abs(old.mean((0, 1))).max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "vit", "mobilenet", "resnet"])
def test_a_permutation_is_exact(name: str) -> None:
    model, rng = ARCHITECTURES[name](), np.random.default_rng(0)
    feeds = feeds_for(model)
    before = Runner(model)(feeds)
    moved = 0
    for value in [v for node in model.graph for v in node.outputs]:
        fold = find_fold(model, value, "permute", axis=axis_of(value, name))
        if isinstance(fold, Fold) and fold.free.all() and not fold.region.blocks:
            fold.permute(rng.permutation(fold.size))
            moved += 1
    assert moved > 3
    assert difference(before, Runner(model)(feeds)) < EXACT


def test_a_permutation_keeps_channels_in_their_head() -> None:
    model = llama(2)
    value = output_of(site(model, "0.v"))
    order = np.arange(2 * HEAD)
    order[[0, HEAD]] = order[[HEAD, 0]]
    with pytest.raises(BadOption, match="another head"):
        found(model, value, "permute").permute(order)
    feeds = feeds_for(model)
    before = Runner(model)(feeds)
    order = np.concatenate([np.roll(np.arange(HEAD), 1), HEAD + np.roll(np.arange(HEAD), 2)])
    weight = site(model, "0.v").matrix()
    found(model, value, "permute").permute(order)
    assert np.array_equal(site(model, "0.v").matrix(), weight[order])
    assert difference(before, Runner(model)(feeds)) < EXACT


def test_grouped_heads_are_tied_where_a_key_value_head_serves_several_queries() -> None:
    model = llama(2)
    o = site(model, "0.o")
    ties = found(model, input_of(o)).ties.reshape(HEADS, HEAD)
    assert np.array_equal(ties[0], ties[1])
    assert np.array_equal(ties[2], ties[3])
    assert len(np.unique(ties)) == 2 * HEAD


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_pairs_are_tied(interleaved: bool) -> None:
    model = llama(2, interleaved=interleaved)
    ties = found(model, output_of(site(model, "0.k"))).ties.reshape(2, HEAD)
    pairs = ties[:, 0::2], ties[:, 1::2]
    if not interleaved:
        pairs = ties[:, : HEAD // 2], ties[:, HEAD // 2 :]
    assert np.array_equal(*pairs)
    assert len(np.unique(ties)) == HEAD
    query = found(model, output_of(site(model, "0.q"))).ties.reshape(2, 2, HEAD)
    assert np.array_equal(query[:, 0], query[:, 1])


def test_one_plus_gamma_stays_one_plus_gamma() -> None:
    model = ARCHITECTURES["gemma"]()
    value = input_of(site(model, "0.q"))
    fold = found(model, value)
    gamma = fold.writers[0].constant
    assert gamma.offset == 1
    assert gamma.value.const_value is not None
    old = gamma.value.const_value.numpy().copy()
    s = np.linspace(0.5, 2, WIDTH)
    fold.scale(s)
    assert np.allclose(gamma.value.const_value.numpy(), (1 + old) / s - 1, atol=1e-6)


def test_a_gated_mlp_folds_into_the_operand_without_an_activation() -> None:
    model = llama(2)
    down, gate, up = (site(model, f"0.{n}") for n in ("down", "gate", "up"))
    before = gate.matrix(), up.matrix()
    found(model, input_of(down)).scale(np.full(down.columns, 2.0))
    assert np.array_equal(gate.matrix(), before[0])
    assert np.allclose(up.matrix(), before[1] / 2)


def test_a_shared_vector_gets_a_private_copy() -> None:
    net = Net()
    x = net.input("x", ["batch", 4])
    gain, bias = net.gain(4), net.random(4)
    first = net.op("LayerNormalization", x, gain, bias, axis=-1)
    second = net.op("LayerNormalization", net.linear(first, 4, 4), gain, bias, axis=-1)
    model = net.model(net.linear(second, 4, 3))
    feeds = feeds_for(model)
    before = Runner(model)(feeds)
    fold = found(model, second)
    fold.scale([1, 2, 3, 4])
    fold.scale([2, 2, 2, 2])  # a fold may be used again
    assert difference(before, Runner(model)(feeds)) < EXACT
    assert first.producer().inputs[1] is gain
    assert second.producer().inputs[1] is not gain


def test_clip_is_crossed_only_by_inserting_bounds_per_channel() -> None:
    model = mobilenet()
    value = next(n.outputs[0] for n in model.graph if n.op_type == "Clip")
    assert "whose bounds hold for all channels" in refusal(model, value, axis=1)
    feeds = feeds_for(model, loud=True)
    before = Runner(model)(feeds)
    clips = sum(n.op_type == "Clip" for n in model.graph)
    fold = found(model, value, axis=1, insert=True)
    for _ in range(2):
        fold.scale(np.linspace(0.5, 2, fold.size))
    assert difference(before, Runner(model)(feeds)) < EXACT
    assert sum(n.op_type == "Clip" for n in model.graph) < clips


def test_refusals_say_what_stands_in_the_way() -> None:
    gpt2, llama_, gemma = (ARCHITECTURES[n]() for n in ("gpt2", "llama", "gemma"))
    after_gelu = find_sites(gpt2)[4]
    assert "cannot cross Erf" in refusal(gpt2, input_of(after_gelu))
    assert "is an output of the graph" in refusal(gpt2, gpt2.graph.outputs[0])
    head_input = next(n for n in gemma.graph if n.outputs[0].is_graph_output()).inputs[0]
    assert head_input is not None
    assert "weight 'embedding.weight' is tied: 2 operations use it" in refusal(gemma, head_input)
    stream = llama_.graph[-1].inputs[0]
    assert stream is not None
    embedding = output_of(find_sites(llama_)[0])
    assert "cannot cross Pow" in refusal(llama_, embedding)
    assert "cannot cross Sigmoid" in refusal(llama_, output_of(site(llama_, "0.gate")))
    assert "Softmax" in refusal(llama_, next(n.outputs[0] for n in llama_.graph if n.op_type == "Softmax"))


def test_refuses_a_second_consumer_an_input_and_constants() -> None:
    net = Net()
    x = net.input("x", ["batch", 4])
    h = net.layer_norm(x, 4)
    model = net.model(net.linear(h, 4, 4), net.op("Tanh", h))
    assert "cannot cross Tanh" in refusal(model, h)
    assert "is an input of the graph" in refusal(model, x)
    assert "is a constant" in refusal(model, next(iter(model.graph.initializers.values())))
    assert "cannot cross ReLU" not in refusal(model, h, "shift")


def test_refuses_what_a_subgraph_uses() -> None:
    net = Net()
    x, flag = net.input("x", ["batch", 4]), net.input("flag", [], ir.DataType.BOOL)
    h = net.layer_norm(x, 4)
    y = net.linear(h, 4, 4)

    def branch(kind: str) -> ir.Graph:
        node = ir.node(kind, [h])
        node.outputs[0].name = f"{kind}_out"
        return ir.Graph([], [node.outputs[0]], nodes=[node], name=kind)

    extra = net.op("If", flag, then_branch=branch("Neg"), else_branch=branch("Abs"))
    assert "used in a subgraph" in refusal(net.model(y, extra), h)


def test_refuses_a_shift_where_zeros_are_padded_or_an_activation_is_crossed() -> None:
    net = Net()
    x = net.input("x", ["batch", 3, 6, 6])
    h = net.conv(x, 3, 4, 1)
    padded = net.conv(h, 4, 4, 3)
    r = net.op("Relu", net.conv(h, 4, 4, 1))
    model = net.model(padded, net.conv(r, 4, 2, 1))
    assert "pads with zeros" in refusal(model, h, "shift", axis=1)
    assert "a shift cannot cross Relu" in refusal(model, r, "shift", axis=1)


def test_a_cache_of_keys_and_values_is_left_alone() -> None:
    net = Net(opset=23)
    x = net.input("x", ["batch", 5, 8])
    past = [net.input(n, ["batch", 2, 3, 4]) for n in ("past_k", "past_v")]
    q, k, v = (net.linear(x, 8, 8, bias=False) for _ in range(3))
    y, new_k, new_v = net.op("Attention", q, k, v, None, *past, outputs=3, q_num_heads=2, kv_num_heads=2)
    model = net.model(net.linear(y, 8, 8), new_k, new_v)
    assert "cache of keys and values" in refusal(model, v)


def test_a_scale_must_respect_ties_and_be_positive() -> None:
    model = llama(2)
    fold = found(model, input_of(site(model, "0.o")))
    with pytest.raises(BadOption, match="tied channels differ"):
        fold.scale(np.linspace(1, 2, WIDTH))
    with pytest.raises(BadOption, match="positive"):
        fold.scale(np.zeros(WIDTH))
    with pytest.raises(BadOption, match="found for a scale"):
        fold.shift(np.zeros(WIDTH))


def test_overflow_of_half_precision_changes_nothing() -> None:
    net = Net()
    x = net.input("x", ["batch", 4], ir.DataType.FLOAT16)
    gain, bias = (net.const(np.ones(4, np.float16)) for _ in range(2))
    h = net.op("LayerNormalization", x, gain, bias, axis=-1)
    weight = net.const(np.full((4, 2), 1000, np.float16))
    model = net.model(net.op("MatMul", h, weight))
    with pytest.raises(PassRefused, match="overflows FLOAT16"):
        found(model, h).scale(np.full(4, 1000.0))
    assert gain.const_value is not None
    assert np.array_equal(gain.const_value.numpy(), np.ones(4, np.float16))


def test_absmax_reads_rows_of_producers_and_columns_of_consumers() -> None:
    net = Net()
    x = net.input("x", ["batch", 3])
    a, b = (
        net.const(np.array([[1, -5], [2, 3], [0, 4]], np.float32)),
        net.const(np.array([[7, 0, -9], [1, 1, 1]], np.float32)),
    )
    h = net.op("Relu", net.op("MatMul", x, a))
    model = net.model(net.op("MatMul", h, b))
    fold = found(model, h)
    assert fold.absmax(fold.writers).tolist() == [2, 5]
    assert fold.absmax(fold.readers).tolist() == [9, 1]
