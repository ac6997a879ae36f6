"""What ONNX Runtime wants around an operation before it makes an integer kernel of QDQ."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.backends.base import QuantizedOperation
from qcompiler.backends.onnx.emit import Emitter, replace_output
from qcompiler.backends.reference import quantize_bias
from qcompiler.graph.functions import StaticActivation


def merged_with_add(graph: ir.Graph, use: QuantizedOperation) -> ir.Node | None:
    """MatMul of a matrix and its Add as one Gemm, or None if there is no such Add.

    ONNX Runtime does the same by itself, but with a float bias, and then fails to make QGemm of it.
    """
    node, uses = use.node, tuple(use.node.outputs[0].uses())
    is_matrix = use.data.shape is not None and len(use.data.shape) == 2
    if not is_matrix or len(uses) != 1 or uses[0][0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add, index = uses[0]
    bias = add.inputs[1 - index]
    constant = ir.convenience.get_const_tensor(bias) if bias is not None else None
    if constant is None or constant.size != use.weight.rows:
        return None
    gemm = ir.node("Gemm", [*node.inputs, bias], name=node.name, outputs=[ir.val(None)])
    graph.insert_before(add, [gemm])
    replace_output(graph, add, gemm.outputs[0])
    graph.remove(node, safe=True)
    return gemm


def integer_bias(model: ir.Model, node: ir.Node, use: QuantizedOperation, lift: int) -> None:
    """The bias of a Gemm or Conv as int32 on the accumulator's scale: without that ONNX Runtime does not fuse it."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    constant = ir.convenience.get_const_tensor(bias) if bias is not None else None
    if constant is None or not isinstance(use.activation, StaticActivation):
        return
    emit = Emitter(model, node, f"{use.label}_bias")
    step = use.weight.scale[:, 0] * np.float32(use.activation.scale / lift)
    scale = np.broadcast_to(step, (use.weight.rows,))
    codes = quantize_bias(constant.numpy().reshape(-1), scale)
    zero = emit.constant(np.zeros(scale.shape, np.int32), "zero")
    inputs = emit.constant(codes, "codes"), emit.constant(scale, "scale"), zero
    node.replace_input_with(2, emit.node("DequantizeLinear", *inputs, axis=0))


def is_quantized_next(value: ir.Value) -> bool:
    """Whether every path from here reaches a QuantizeLinear, through activations that ONNX Runtime absorbs."""
    nodes = [node for node, _ in value.uses()]
    return bool(nodes) and all(
        node.op_type == "QuantizeLinear" or (node.op_type in ("Relu", "Clip") and is_quantized_next(node.outputs[0]))
        for node in nodes
    )
