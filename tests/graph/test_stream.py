from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from scipy.stats import ortho_group

from qcompiler.errors import BadOption, PassRefused, Refusal
from qcompiler.graph.folds import Stream, find_stream, untie
from qcompiler.measure.runner import Runner
from qcompiler.passes.transform.hadamard import mean_kept
from tests.graph.architectures import ARCHITECTURES, LAYERS, WIDTH, Net, feeds_for

PRE_NORM = ["llama", "llama-gqa", "llama-interleaved", "llama-fused", "qwen"]
Q = ortho_group.rvs(WIDTH, random_state=0)


def stream_of(model: ir.Model) -> Stream:
    found = find_stream(model, next(n.outputs[0] for n in model.graph if n.op_type == "Gather"))
    assert isinstance(found, Stream), found
    return found


def run(model: ir.Model) -> np.ndarray:
    return next(iter(Runner(model)(feeds_for(model)).values()))


@pytest.mark.parametrize("name", PRE_NORM)
def test_rotation_is_exact_and_reaches_every_reader_and_writer(name: str) -> None:
    model = ARCHITECTURES[name]()
    before = run(model)
    stream = stream_of(model)
    assert len(stream.writers) == 1 + 2 * LAYERS  # embedding, o and down
    assert len(stream.readers) == 5 * LAYERS + 1  # q, k, v, gate, up; head
    assert len(stream.gains) == 2 * LAYERS + 1
    with pytest.raises(PassRefused, match="fold_gains"):
        stream.rotate(Q)
    assert stream.fold_gains() == []
    name_in = stream.values[0].name or ""
    hidden = Runner(model, outputs=[name_in])(feeds_for(model))[name_in]
    stream.rotate(Q)
    turned = Runner(model, outputs=[name_in])(feeds_for(model))[name_in]
    assert np.allclose(turned, hidden @ Q, atol=1e-5)
    assert np.abs(run(model) - before).max() / np.abs(before).max() < 1e-5


def test_a_tied_head_must_be_untied_for_its_gain_but_not_for_the_rotation() -> None:
    model = ARCHITECTURES["gemma"]()
    before = run(model)
    assert "is tied" in stream_of(model).fold_gains()[0].reason
    untie(model, model.graph[-1], 1)
    assert len(list(model.graph.initializers["embedding.weight"].uses())) == 1
    stream = stream_of(model)
    assert stream.fold_gains() == []
    stream.rotate(Q)
    assert np.abs(run(model) - before).max() / np.abs(before).max() < 1e-5


def test_a_tied_head_without_gain_turns_once() -> None:
    net = Net()
    ids = net.input("ids", ["batch", 5], ir.DataType.INT64)
    table = net.random(40, WIDTH)
    x = net.op("Gather", table, ids)
    x = net.op("Add", x, net.linear(net.op("Relu", net.linear(x, WIDTH, 9)), 9, WIDTH))
    model = net.model(net.op("MatMul", x, net.op("Transpose", table, perm=[1, 0])))
    before = run(model)
    stream_of(model).rotate(Q)
    assert np.abs(run(model) - before).max() / np.abs(before).max() < 1e-5


def test_refuses_what_is_no_rotation_and_what_sees_channels() -> None:
    model = ARCHITECTURES["llama"]()
    with pytest.raises(BadOption, match="not orthogonal"):
        stream_of(model).rotate(np.ones((WIDTH, WIDTH)))
    with pytest.raises(BadOption, match="16 channels"):
        stream_of(model).rotate(np.eye(4))


LAYER_NORMS = ["gpt2", "opt", "parallel", "vit"]


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norms_stay_where_the_matrix_keeps_the_mean(name: str) -> None:
    model = ARCHITECTURES[name]()
    before, kinds = run(model), [node.op_type for node in model.graph]
    stream = stream_of(model) if name != "vit" else stream_at_first_norm(model)
    norms = {node for node in model.graph if node.op_type == "LayerNormalization"}
    assert set(stream.keeps_mean) == norms
    assert stream.fold_gains() == []
    with pytest.raises(BadOption, match="the mean, which LayerNormalization"):
        stream.rotate(Q)
    stream.rotate(mean_kept(Q))
    assert np.abs(run(model) - before).max() / np.abs(before).max() < 1e-5
    assert [node.op_type for node in model.graph] == kinds


def stream_at_first_norm(model: ir.Model) -> Stream:
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    assert norm.inputs[0] is not None
    found = find_stream(model, norm.inputs[0])
    assert isinstance(found, Stream), found
    return found


def test_a_layer_norm_in_elementary_operations_turns_too() -> None:
    net = Net()
    x = net.op("Gather", net.random(40, WIDTH), net.input("ids", ["batch", 5], ir.DataType.INT64))
    x = net.op("Add", x, net.const(np.float32(0.3)))  # one number to all channels
    away = net.op("Sub", x, net.op("ReduceMean", x, net.ints(-1)))
    spread = net.op("ReduceMean", net.op("Pow", away, net.const(np.float32(2))), net.ints(-1))
    even = net.op("Div", away, net.op("Sqrt", net.op("Add", spread, net.const(np.float32(1e-5)))))
    h = net.op("Add", net.op("Mul", even, net.gain(WIDTH)), net.random(WIDTH))
    x = net.op("Add", x, net.linear(net.op("Relu", net.linear(h, WIDTH, 9)), 9, WIDTH))
    model = net.model(net.linear(x, WIDTH, 7))
    before = run(model)
    stream = stream_of(model)
    assert {node.op_type for node in stream.keeps_mean} == {"Add", "Sub", "ReduceMean"}
    assert stream.fold_gains() == []
    stream.rotate(mean_kept(Q))
    assert np.abs(run(model) - before).max() / np.abs(before).max() < 1e-5


def test_a_row_number_times_a_vector_is_no_number_for_all_channels() -> None:
    net = Net()
    x = net.op("Gather", net.random(40, WIDTH), net.input("ids", ["batch", 5], ir.DataType.INT64))
    size = net.op("ReduceMean", net.op("Mul", x, x), net.ints(-1))
    x = net.op("Add", x, net.op("Mul", size, net.gain(WIDTH)))
    found = find_stream(net.model(net.linear(x, WIDTH, 7)), x)
    assert isinstance(found, Refusal)


def test_norms_behind_the_sums_let_no_gain_go() -> None:
    model = ARCHITECTURES["bert"]()
    reasons = {refusal.reason for refusal in stream_at_first_norm(model).fold_gains()}
    assert any("a scale cannot cross LayerNormalization" in reason for reason in reasons)
