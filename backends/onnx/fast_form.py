"""The form of a lowered model that ONNX Runtime runs fastest.

Every quantized operation gets the first form that the installed ONNX Runtime was seen to run (probe.py):

    integer    static 8-bit activations, symmetric weights per channel or tensor: stays QDQ, codes widened to
               int8, and ONNX Runtime makes QLinearConv, QLinearMatMul or QGemm of it
    blocks     MatMulNBits, with int8 activations where the plan says "dynamic"; GatherBlockQuantized
    decoded    codes on disk, float32 once a session is made: convolutions and products for which there is
               no integer kernel, or (exact 8-bit products) only one that is many times slower than float
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.backends.base import QuantizedOperation, quantized_operations
from qcompiler.backends.onnx import probe
from qcompiler.backends.onnx.blocks import Blocks, block_size, write_blocks
from qcompiler.backends.onnx.emit import MICROSOFT, Emitter
from qcompiler.backends.reference import quantize_bias
from qcompiler.formats import PerChannel, PerTensor
from qcompiler.graph.functions import DynamicActivation, PackedWeight, StaticActivation

_INTEGER_OPS = ("Conv", "MatMul", "Gemm")


@dataclass
class FastForm:
    """The rewritten model and what was chosen.

    Attributes:
        model: the graph for ONNX Runtime.
        expected: operation types that the optimised graph must hold, with their numbers.
        forms: site name -> "integer", "blocks4", "blocks4-int8", "gather4", "decoded".
    """

    model: ir.Model
    expected: Counter[str] = field(default_factory=Counter[str])
    forms: dict[str, str] = field(default_factory=dict[str, str])


def fast_form(lowered: ir.Model) -> FastForm:
    """Rewrite a copy of a lowered graph; tensors that stay are shared with the original."""
    return _Rewriter(FastForm(lowered.clone())).run()


@dataclass
class _Rewriter:
    form: FastForm
    written: dict[tuple[ir.Node, int, int], Blocks] = field(default_factory=dict[tuple[ir.Node, int, int], Blocks])

    def run(self) -> FastForm:
        model, names = self.form.model, dict[ir.Node, set[str]]()
        for use in quantized_operations(model.graph):
            name = self._rewrite(use)
            names.setdefault(use.weight.dequantize, set()).add(name)
            self.form.forms[use.weight.site] = name
        for node in [n for n, forms in names.items() if "decoded" in forms and "integer" not in forms]:
            _decode(model, node)
        for tidy in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        ):
            tidy(model)
        return self.form

    def _rewrite(self, use: QuantizedOperation) -> str:
        """Put one operation into its form and return the name of that."""
        if use.weight.output.dtype not in (None, ir.DataType.FLOAT):
            return "decoded"
        if isinstance(use.activation, StaticActivation) and _is_integer(use):
            return self._integer(use)
        if use.node.op_type == "Gather":
            return self._gather(use)
        if use.is_product and _is_plain(use):
            return self._product(use)
        return "decoded"

    def _integer(self, use: QuantizedOperation) -> str:
        """Leave QDQ to ONNX Runtime; narrow codes are widened to int8 when a session is made."""
        node, expected = use.weight.dequantize, self.form.expected
        codes = node.inputs[0]
        emit = Emitter(self.form.model, node, f"{use.weight.site}_int8")
        if codes is not None and codes.dtype != ir.DataType.INT8:
            node.replace_input_with(0, emit.cast(codes, ir.DataType.INT8))
        if len(node.inputs) < 3:  # without a zero point ONNX Runtime fuses convolutions, but no products
            node.resize_inputs(3)
            rows = () if isinstance(use.weight.spec.granularity, PerTensor) else (use.weight.rows,)
            node.replace_input_with(2, emit.constant(np.zeros(rows, np.int8), "zero"))
        if use.is_product:
            gemm = use.node if use.node.op_type == "Gemm" else _merged_with_add(self.form.model.graph, use)
            if gemm is not None:
                _integer_bias(self.form.model, gemm, use)
            expected["QLinearMatMul|MatMulIntegerToFloat" if gemm is None else "QGemm"] += 1
        elif _is_quantized_next(use.node.outputs[0]):
            expected["QLinearConv"] += 1
        return "integer"

    def _gather(self, use: QuantizedOperation) -> str:
        container = {2: 2, 3: 4, 4: 4}.get(use.weight.bits, 8)
        block = block_size(use.weight, lambda b: probe.runs_gather_blocks(container, b))
        if block is None or use.weight.columns % block or len(use.weight.shape) != 2:
            return "decoded"
        blocks = self._blocks(use, container, block)
        emit = Emitter(self.form.model, use.node, f"{use.node.name}_fast")
        flat = emit.node("Reshape", blocks.codes, emit.integers(use.weight.rows, use.weight.columns * container // 8))
        result = emit.node(
            "GatherBlockQuantized", flat, use.data, blocks.scale, blocks.zero,
            domain=MICROSOFT, bits=container, block_size=block, quantize_axis=1, gather_axis=0,
        )  # fmt: skip
        self.form.expected["GatherBlockQuantized"] += 1
        _replace(self.form.model.graph, use.node, result)
        return f"gather{container}"

    def _product(self, use: QuantizedOperation) -> str:
        dynamic = isinstance(use.activation, DynamicActivation)
        accuracy = probe.INT8_ACTIVATIONS if dynamic else probe.EXACT
        container = _container(use.weight, dynamic)
        block = block_size(use.weight, lambda b: probe.runs_matmul_nbits(container, b, accuracy))
        if block is None or (container == 8 and not dynamic):
            return "decoded"
        blocks = self._blocks(use, container, block)
        emit = Emitter(self.form.model, use.node, f"{use.node.name}_fast")
        data = use.activation.source if isinstance(use.activation, DynamicActivation) else use.data
        bias = use.node.inputs[2] if use.node.op_type == "Gemm" and len(use.node.inputs) > 2 else None
        if bias is not None:
            bias = emit.node("Reshape", bias, emit.integers(use.weight.rows))
        result = emit.node(
            "MatMulNBits", data, blocks.codes, blocks.scale, blocks.zero, None, bias,
            domain=MICROSOFT, K=use.weight.columns, N=use.weight.rows, bits=container, block_size=block,
            accuracy_level=accuracy,
        )  # fmt: skip
        self.form.expected["MatMulNBits"] += 1
        _replace(self.form.model.graph, use.node, result)
        return f"blocks{container}{'-int8' if dynamic else ''}"

    def _blocks(self, use: QuantizedOperation, container: int, block: int) -> Blocks:
        """A weight in block form, written once for all its users (a tied embedding and head)."""
        key = (use.weight.dequantize, container, block)
        if key not in self.written:
            # In front of the old decoder, which all users come after.
            emit = Emitter(self.form.model, use.weight.dequantize, f"{use.weight.site}_b{container}x{block}")
            self.written[key] = write_blocks(emit, use.weight, container, block)
        return self.written[key]


def _merged_with_add(graph: ir.Graph, use: QuantizedOperation) -> ir.Node | None:
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
    _replace(graph, add, gemm.outputs[0])
    graph.remove(node, safe=True)
    return gemm


def _integer_bias(model: ir.Model, gemm: ir.Node, use: QuantizedOperation) -> None:
    """The bias of a Gemm as int32 on the accumulator's scale: without that ONNX Runtime does not fuse it."""
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    constant = ir.convenience.get_const_tensor(bias) if bias is not None else None
    if constant is None or not isinstance(use.activation, StaticActivation):
        return
    emit = Emitter(model, gemm, f"{gemm.name}_bias")
    scale = np.broadcast_to(use.weight.scale[:, 0] * np.float32(use.activation.scale), (use.weight.rows,))
    codes = quantize_bias(constant.numpy().reshape(-1), scale)
    zero = emit.constant(np.zeros(scale.shape, np.int32), "zero")
    inputs = emit.constant(codes, "codes"), emit.constant(scale, "scale"), zero
    gemm.replace_input_with(2, emit.node("DequantizeLinear", *inputs, axis=0))


def _is_integer(use: QuantizedOperation) -> bool:
    """Whether ONNX Runtime fuses Q/DQ around this operation: see onnx.md 1.4 in the sources of this project."""
    spec = use.weight.spec
    return (
        use.node.op_type in _INTEGER_OPS
        and spec.symmetric
        and spec.bits <= 8
        and isinstance(spec.granularity, PerChannel | PerTensor)
        and (not use.is_product or _is_plain(use))
    )


def _is_plain(use: QuantizedOperation) -> bool:
    """Whether a product is data @ matrix^T + bias of one number a row, which is all that MatMulNBits does."""
    node, weight = use.node, use.weight
    if len(weight.shape) != 2 or node.op_type == "MatMul":
        return len(weight.shape) == 2
    factors = [node.attributes[n].as_float() for n in ("alpha", "beta") if n in node.attributes]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    constant = ir.convenience.get_const_tensor(bias) if bias is not None else None
    return all(f == 1 for f in factors) and (bias is None or (constant is not None and constant.size == weight.rows))


def _container(weight: PackedWeight, dynamic: bool) -> int:
    """Bits of a code in memory: measured, 2 bits pay only with int8 activations and large blocks (onnx.md 1.7)."""
    if weight.bits > 4:
        return 8
    size = weight.spec.granularity.group_size(weight.columns)
    return 2 if weight.bits == 2 and dynamic and size >= 128 else 4


def _is_quantized_next(value: ir.Value) -> bool:
    """Whether every path from here reaches a QuantizeLinear, through activations that ONNX Runtime absorbs."""
    nodes = [node for node, _ in value.uses()]
    return bool(nodes) and all(
        node.op_type == "QuantizeLinear" or (node.op_type in ("Relu", "Clip") and _is_quantized_next(node.outputs[0]))
        for node in nodes
    )


def _replace(graph: ir.Graph, node: ir.Node, result: ir.Value) -> None:
    """`result` takes the place and the name of the node's output."""
    old = node.outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _decode(model: ir.Model, node: ir.Node) -> None:
    """DequantizeLinear -> Cast, Sub, Mul.

    ONNX Runtime never folds a DequantizeLinear of constants while it may still fuse it: it would decode the
    whole weight in every run, or fuse it with int8 activations. Plain arithmetic is folded at once.
    """
    emit = Emitter(model, node, f"{node.outputs[0].name}_decoded")
    codes, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    assert codes is not None
    assert scale is not None
    spread = _Spread.of(node)
    numbers = emit.cast(codes, ir.DataType.FLOAT)
    if zero is not None:
        numbers = emit.node("Sub", numbers, spread.write(emit, emit.cast(zero, ir.DataType.FLOAT)))
    _replace(model.graph, node, emit.node("Mul", numbers, spread.write(emit, scale)))


@dataclass(frozen=True)
class _Spread:
    """Scales as DequantizeLinear takes them -> a form that broadcasts against the codes."""

    shape: tuple[int, ...]
    axis: int | None
    size: int | None

    @staticmethod
    def of(node: ir.Node) -> _Spread:
        axis, size = (node.attributes[n].as_int() if n in node.attributes else None for n in ("axis", "block_size"))
        shape = node.outputs[0].shape
        assert shape is not None
        return _Spread(tuple(shape.numpy()), axis, size)

    def write(self, emit: Emitter, value: ir.Value) -> ir.Value:
        if self.axis is None:
            return value
        if self.size is None:
            dims = (-1 if i == self.axis else 1 for i in range(len(self.shape)))
            return emit.node("Reshape", value, emit.integers(*dims))
        blocked, flat = list(self.shape), list(self.shape)
        groups = -(-self.shape[self.axis] // self.size)
        blocked[self.axis : self.axis + 1] = [groups, self.size]
        flat[self.axis] = groups * self.size
        column = emit.node("Unsqueeze", value, emit.integers(self.axis + 1))
        repeated = emit.node("Reshape", emit.node("Expand", column, emit.integers(*blocked)), emit.integers(*flat))
        if flat == list(self.shape):
            return repeated
        end = emit.integers(self.shape[self.axis])
        return emit.node("Slice", repeated, emit.integers(0), end, emit.integers(self.axis))
