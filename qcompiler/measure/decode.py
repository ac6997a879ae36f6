"""Decoding quantized weights, one at a time.

ONNX Runtime does so itself when it opens a model, but keeps every intermediate result of every weight until it is
through with the whole graph: unpacking 134 million codes of 2 to 8 bits took 4 GB. Here each constant that is made
of codes and that the rest of the graph reads is computed in a session of its own, which frees as it goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common

from qcompiler.measure.in_place import open_in_place
from qcompiler.measure.memory import give_back
from qcompiler.scratch import spilled

_LEAST_BYTES = 1 << 12  # of codes behind a value; ONNX Runtime folds shapes and axes itself
_RANDOM = ("Random", "Bernoulli", "Multinomial")  # how the names of operations begin that differ from run to run
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def decode_constants(model: ir.Model, *, dequantize: bool) -> None:
    """Replace what large integer constants are made into by the results, in place.

    Args:
        model: of which nodes are removed; tensors that others share are left as they are.
        dequantize: whether DequantizeLinear of constants is computed too. If not, it stays for ONNX Runtime to fuse.

    Raises:
        onnxruntime errors: a node cannot be run on its constants.
    """
    graph = model.graph
    wanted = list(_results(graph, dequantize))
    for value in wanted:
        array = _computed(model, value)
        made = ir.val(value.name, const_value=ir.tensor(spilled(array), name=value.name))
        producer = value.producer()
        assert producer is not None
        value.replace_all_uses_with(made)
        value.name = f"{value.name}/folded"
        graph.register_initializer(made)
        _remove(graph, producer)
        give_back([made])
    if wanted:
        common.RemoveUnusedFunctionsPass()(model)


def _results(graph: ir.Graph, dequantize: bool) -> Iterator[ir.Value]:
    """The values that are made of constants alone, large codes among them, and read by nodes that are not."""
    inputs = set(graph.inputs)
    behind = {value: _code_bytes(value) for value in graph.initializers.values() if value not in inputs}
    constant: set[ir.Node] = set()
    for node in graph:
        read = [v for v in node.inputs if v is not None]
        if all(v in behind for v in read) and _is_foldable(node, dequantize):
            constant.add(node)
            behind |= dict.fromkeys(node.outputs, sum(behind[v] for v in read))
    for node in list(constant):
        for value in node.outputs:
            is_read = any(user not in constant for user in value.consumers())
            if is_read and behind[value] >= _LEAST_BYTES and not value.is_graph_output():
                yield value


def _code_bytes(value: ir.Value) -> int:
    tensor = value.const_value
    return 0 if tensor is None or not tensor.dtype.is_integer() else tensor.nbytes


def _is_foldable(node: ir.Node, dequantize: bool) -> bool:
    if node.op_type.startswith(_RANDOM) or any(a.type in _GRAPHS for a in node.attributes.values()):
        return False
    return dequantize or node.op_type != "DequantizeLinear"


def _computed(model: ir.Model, value: ir.Value) -> npt.NDArray[Any]:
    part = ir.convenience.extract(model.graph, [], [value])
    functions = [function.clone() for function in model.functions.values()]
    options: Any = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    session, _arrays = open_in_place(ir.Model(part, ir_version=model.ir_version, functions=functions), options)
    return np.asarray(session.run(None, {})[0])


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node, what only it needed, and the constants that nothing reads any more."""
    inputs = [v for v in node.inputs if v is not None]
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    graph.remove(node, safe=True)
    for value in dict.fromkeys(inputs):
        producer = value.producer()
        if value.uses() or value.is_graph_output():
            continue
        if producer is not None:
            _remove(graph, producer)
        elif value not in graph.inputs:
            graph.initializers.pop(value.name or "", None)
