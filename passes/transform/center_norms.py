"""LayerNorms become RMS norms: what they read is made to have no mean over the channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.errors import Refusal
from qcompiler.graph.folds import Stream, find_centred
from qcompiler.graph.folds.rewrite import commit, read
from qcompiler.graph.topology import residual_streams
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import require_float
from qcompiler.pipeline import EXACT, Pass, PassReport
from qcompiler.progress import Progress

_RMS_OPSET = 23  # from which on there is an operator for it


@dataclass(frozen=True)
class CenterNorms(Pass):
    """Take the mean over the channels out of everything that writes a residual stream, and RMS norms for LayerNorms.

    A LayerNorm subtracts the mean itself, so nobody misses it, as long as LayerNorms alone read the stream. Gains and
    biases of the norms stay. Afterwards any orthogonal matrix may turn the stream; `rotate` does not need that: it
    turns streams between LayerNorms by matrices that keep the mean. Streams whose norms stand behind the sums (BERT)
    keep their means in the sums and are left alone, as is a table that others than the stream read.

    Source: SliceGPT (2401.15024), section 3.2; QuaRot (2404.00456).
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT

    def requires(self, model: Model) -> None:
        """Float weights, no plan yet."""
        require_float(model, data=False)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Centre what can be centred."""
        refused: list[Refusal] = []
        centred: dict[str, Any] = {}
        changed = 0
        for residual in progress.track(residual_streams(model.ir), "Centring"):
            found = find_centred(model.ir, residual.values[0])
            if not isinstance(found, Refusal):
                reason = next((r for norm in found[1] if (r := _refusal(model.ir, norm)) is not None), None)
                found = found if reason is None else reason
            if isinstance(found, Refusal):
                refused.append(found)
                continue
            stream, norms = found
            _take_mean_out(stream)
            for norm in norms:
                _replace(model.ir.graph, norm)
            changed += len(norms)
            centred[residual.values[0].name or ""] = {"writers": len(stream.writers), "norms": len(norms)}
        return PassReport(self.registered_name(), changed, tuple(refused), {"streams": centred} if centred else {})


def _refusal(model: ir.Model, norm: ir.Node) -> Refusal | None:
    """Squares of float16 overflow where no operator takes care of that."""
    dtype = norm.outputs[0].dtype
    if dtype == ir.DataType.FLOAT or model.graph.opset_imports[""] >= _RMS_OPSET:
        return None
    return Refusal(norm.name or "?", f"it computes in {dtype}, whose squares may overflow outside of a norm")


def _take_mean_out(stream: Stream) -> None:
    changes = {
        turn.constant.value: (array := read(turn.constant.value)) - array.mean(turn.axis, keepdims=True)
        for turn in stream.writers
    }
    commit(changes)


def _replace(graph: ir.Graph, norm: ir.Node) -> None:
    """The norm as an RMS norm, and its bias; written out in the form that ONNX Runtime knows before opset 23."""
    x, gain, bias = (*norm.inputs, None)[:3]
    old = norm.outputs[0]
    assert x is not None
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    tape = ir.tape.Tape()
    if graph.opset_imports[""] >= _RMS_OPSET:
        y = tape.op("RMSNormalization", [x, gain], {"axis": -1, "epsilon": epsilon})
    else:
        y = _written_out(graph, tape, x, epsilon)
        y = tape.op("Mul", [y, gain])
    if bias is not None:
        y = tape.op("Add", [y, bias])
    _name(tape.nodes, norm, x)
    graph.insert_before(norm, tape.nodes)
    name = old.name
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    y.name = name


def _written_out(graph: ir.Graph, tape: ir.tape.Tape, x: ir.Value, epsilon: float) -> ir.Value:
    two, axes, floor = (
        _constant(graph, f"rms_{name}", array)
        for name, array in (
            ("exponent", np.array(2, np.float32)),
            ("axes", np.array([-1], np.int64)),
            (f"epsilon_{epsilon:g}", np.array(epsilon, np.float32)),
        )
    )
    mean = tape.op("ReduceMean", [tape.op("Pow", [x, two]), axes], {"keepdims": 1})
    return tape.op("Div", [x, tape.op("Sqrt", [tape.op("Add", [mean, floor])])])


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer that all norms share."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def _name(nodes: Sequence[ir.Node], norm: ir.Node, x: ir.Value) -> None:
    """Names, and what is known of types and shapes, for the new values."""
    assert x.shape is not None  # its last axis was looked at
    row = ir.Shape([*x.shape.dims[:-1], 1])
    inside = False
    for number, node in enumerate(nodes):
        value = node.outputs[0]
        value.name, value.type = f"{norm.outputs[0].name}_rms_{number}", x.type
        node.name = f"{value.name}_{node.op_type}"
        inside = (inside or node.op_type == "ReduceMean") and node.op_type != "Div"
        value.shape = row if inside else x.shape
