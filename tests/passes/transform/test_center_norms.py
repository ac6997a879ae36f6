from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from scipy.stats import ortho_group

from qcompiler.calibration import Calibration
from qcompiler.errors import PassRefused
from qcompiler.graph.folds import Stream, find_stream
from qcompiler.measure.runner import Runner
from qcompiler.model import Model
from qcompiler.passes.transform.center_norms import CenterNorms
from qcompiler.pipeline import PassReport, Pipeline
from tests.graph.architectures import ARCHITECTURES, LAYERS, WIDTH, Net, feeds_for, inject_outliers


def model_of(graph: ir.Model) -> Model:
    inject_outliers(graph)
    return Model(graph, calibration=Calibration.from_arrays(feeds_for(graph, batch=8), graph))


def run(model: Model) -> PassReport:
    """The pipeline holds it to its contract, with outliers injected into the inputs."""
    return Pipeline([CenterNorms()]).run(model)[0]


def norms_of(model: Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "LayerNormalization"]


@pytest.mark.parametrize("name", ["gpt2", "opt", "parallel", "vit"])
def test_norms_that_alone_read_the_stream_become_rms_norms(name: str) -> None:
    model = model_of(ARCHITECTURES[name]())
    norms = norms_of(model)
    data = norms[0].inputs[0].name  # type: ignore[union-attr]
    report = run(model)
    assert report.changed == len(norms) > LAYERS
    assert norms_of(model) == []
    assert report.refused == ()
    stream = Runner(model.ir, outputs=[str(data)])(feeds_for(model.ir))[str(data)]
    assert np.abs(stream.mean(-1)).max() < 1e-5 * np.abs(stream).max()
    assert run(model).changed == 0  # there are none left


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_any_matrix_may_turn_the_stream_then(name: str) -> None:
    model = model_of(ARCHITECTURES[name]())
    feeds = feeds_for(model.ir)
    wanted = next(iter(Runner(model.ir)(feeds).values()))
    data = norms_of(model)[0].inputs[0]
    assert data is not None
    run(model)
    stream = find_stream(model.ir, data)
    assert isinstance(stream, Stream)
    assert stream.keeps_mean == ()
    assert stream.fold_gains() == []
    stream.rotate(ortho_group.rvs(WIDTH, random_state=0))
    found = next(iter(Runner(model.ir)(feeds).values()))
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5


def test_from_opset_23_on_there_is_an_operator_for_it() -> None:
    net = Net(opset=23)
    x = net.op("Gather", net.random(40, WIDTH), net.input("ids", ["batch", 5], ir.DataType.INT64))
    x = net.op("Add", x, net.linear(net.op("Relu", net.linear(net.layer_norm(x), WIDTH, 9)), 9, WIDTH))
    model = model_of(net.model(net.linear(net.layer_norm(x), WIDTH, 7)))
    run(model)
    assert sum(node.op_type == "RMSNormalization" for node in model.graph) == 2


def after_layer_norm(read: bool = False, dtype: ir.DataType = ir.DataType.FLOAT) -> Model:
    net = Net()
    x = net.input("x", ["batch", 5, 8], dtype)
    kind = dtype.numpy()
    weights = [net.const(net.rng.normal(size=(8, 8)).astype(kind)) for _ in range(4)]
    gains = [net.const(np.ones(8, kind)) for _ in range(2)]
    x = net.op("MatMul", x, weights[0])
    y = net.op("MatMul", net.op("LayerNormalization", x, gains[0], axis=-1), weights[1])
    x = net.op("Add", x, net.op("MatMul", y, weights[2]))
    out = net.op("MatMul", x if read else net.op("LayerNormalization", x, gains[1], axis=-1), weights[3])
    return Model(net.model(out))


def test_what_sees_the_mean_stops_it() -> None:
    report = run(model_of(ARCHITECTURES["bert"]()))
    assert report.changed == 0
    assert all("writes the stream" in r.reason or "cannot cross" in r.reason for r in report.refused)
    assert report.refused
    report = run(model_of(ARCHITECTURES["gpt2-tied"]()))
    assert any("is tied" in refusal.reason for refusal in report.refused)
    report = run(after_layer_norm(read=True))
    assert "before any norm" in report.refused[0].reason
    report = run(model_of(ARCHITECTURES["llama"]()))
    assert report.changed == 0
    assert report.refused


def test_float16_is_left_alone_and_codes_come_too_late() -> None:
    model = after_layer_norm(dtype=ir.DataType.FLOAT16)
    report = CenterNorms().run(model, progress=_Quiet())  # type: ignore[arg-type]
    assert "may overflow" in report.refused[0].reason
    assert len(norms_of(model)) == 2
    assert run(after_layer_norm()).changed == 2
    model = after_layer_norm()
    model.lowered = True
    with pytest.raises(PassRefused, match="rounded already"):
        run(model)


class _Quiet:
    def track(self, items: list[object], _what: str) -> list[object]:
        return items
