"""The form of a lowered model that ONNX Runtime runs fastest.

Every quantized operation gets the first form that the installed ONNX Runtime was seen to run (probe.py):

    integer    static 8-bit activations, symmetric weights per channel or tensor: stays QDQ, codes widened to
               int8, and ONNX Runtime makes QLinearConv, QLinearMatMul or QGemm of it
    rows       dynamic activations, symmetric weights per channel or tensor: MatMulInteger
    blocks     MatMulNBits, with int8 activations where the plan says "dynamic" at 8 bits (rows of other widths are
               rounded before it); GatherBlockQuantized
    decoded    codes on disk, float32 once a session is made: convolutions and products for which there is
               no integer kernel, or (exact 8-bit products) only one that is many times slower than float
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.backends.base import QuantizedOperation, quantized_operations
from qcompiler.backends.onnx import probe
from qcompiler.backends.onnx.blocks import Blocks, block_size, write_blocks
from qcompiler.backends.onnx.decoded import decode
from qcompiler.backends.onnx.emit import MICROSOFT, Emitter, replace_output
from qcompiler.backends.onnx.integer import integer_bias, is_quantized_next, merged_with_add
from qcompiler.backends.onnx.rows import RowCodes, write_row_codes, write_row_product
from qcompiler.formats import PerChannel, PerTensor, Progressive
from qcompiler.graph.functions import DynamicActivation, StaticActivation

_SAFE_BITS = 7  # of signed codes whose products with uint8 can be added in pairs in 16 bits
_INTEGER_OPS = ("Conv", "MatMul", "Gemm")


@dataclass
class FastForm:
    """The rewritten model and what was chosen.

    Attributes:
        model: the graph for ONNX Runtime.
        expected: operation types that the optimised graph must hold, with their numbers.
        forms: site name -> "integer", "rows", "blocks4", "blocks4-int8", "gather4", "decoded";
            joined by "+" where users differ.
        rounds_activations: whether any operation quantizes its data.
    """

    model: ir.Model
    expected: Counter[str] = field(default_factory=Counter[str])
    forms: dict[str, str] = field(default_factory=dict[str, str])
    rounds_activations: bool = False


def fast_form(lowered: ir.Model) -> FastForm:
    """Rewrite a copy of a lowered graph; tensors that stay are shared with the original."""
    return _Rewriter(FastForm(lowered.clone())).run()


@dataclass
class _Rewriter:
    form: FastForm
    stored: dict[ir.Node, list[tuple[int, int]]] = field(default_factory=dict[ir.Node, list[tuple[int, int]]])
    written: dict[ir.Node, Blocks] = field(default_factory=dict[ir.Node, Blocks])
    users: Counter[ir.Node] = field(default_factory=Counter[ir.Node])
    row_codes: dict[ir.Value, RowCodes] = field(default_factory=dict[ir.Value, RowCodes])

    def run(self) -> FastForm:
        model, names = self.form.model, dict[ir.Node, set[str]]()
        uses = quantized_operations(model.graph)
        self.users.update(use.weight.dequantize for use in uses)
        for use in uses:
            # A weight is stored once: in a form that all its users take, or else as it is.
            node, wanted = use.weight.dequantize, _block_forms(use) if _kind(use) == "blocks" else []
            self.stored[node] = [form for form in self.stored.get(node, wanted) if form in wanted]
        for use in uses:
            name = self._rewrite(use)
            self.form.rounds_activations |= use.activation is not None
            names.setdefault(use.weight.dequantize, set()).add(name)
            earlier = self.form.forms.get(use.weight.site)
            self.form.forms[use.weight.site] = name if earlier in (None, name) else f"{earlier}+{name}"
        for node in [n for n, forms in names.items() if "decoded" in forms and "integer" not in forms]:
            decode(model, node)
        for tidy in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        ):
            tidy(model)
        return self.form

    def _rewrite(self, use: QuantizedOperation) -> str:
        """Put one operation into its form and return the name of that."""
        form = _kind(use)
        if form == "integer":
            return self._integer(use)
        if form == "rows":
            assert isinstance(use.activation, DynamicActivation)
            return self._rows(use, use.activation)
        if form == "decoded" or not self.stored[use.weight.dequantize]:
            return "decoded"
        return self._product(use) if use.is_product else self._gather(use)

    def _integer(self, use: QuantizedOperation) -> str:
        """Leave QDQ to ONNX Runtime; narrow codes are widened to int8 when a session is made."""
        node, expected = use.weight.dequantize, self.form.expected
        codes = node.inputs[0]
        emit = Emitter(self.form.model, node, f"{use.weight.site}_int8")
        lift = self._lift(use)
        if codes is not None and lift > 1:
            wide = emit.node(
                "Mul", emit.cast(codes, ir.DataType.INT32), emit.constant(np.asarray(lift, np.int32), "lift")
            )
            node.replace_input_with(0, emit.cast(wide, ir.DataType.INT8))
            share = emit.constant(np.asarray(1 / lift, np.float32), "share")
            node.replace_input_with(1, emit.node("Mul", node.inputs[1], share))
        elif codes is not None and codes.dtype != ir.DataType.INT8:
            node.replace_input_with(0, emit.cast(codes, ir.DataType.INT8))
        if len(node.inputs) < 3:  # without a zero point ONNX Runtime fuses convolutions, but no products
            node.resize_inputs(3)
            rows = () if isinstance(use.weight.spec.granularity, PerTensor) else (use.weight.rows,)
            node.replace_input_with(2, emit.constant(np.zeros(rows, np.int8), "zero"))
        if use.is_product:
            gemm = use.node if use.node.op_type == "Gemm" else merged_with_add(self.form.model.graph, use)
            if gemm is not None:
                integer_bias(self.form.model, gemm, use, lift)
            expected["QLinearMatMul|MatMulIntegerToFloat" if gemm is None else "QGemm"] += 1
        elif is_quantized_next(use.node.outputs[0]):
            integer_bias(self.form.model, use.node, use, lift)
            expected["QLinearConv"] += 1
        return "integer"

    def _lift(self, use: QuantizedOperation) -> int:
        """By how much narrow codes are multiplied, and their scale divided: the weight stays the same number.

        Biases are rounded to multiples of activation scale * weight scale, which of 2 bits is coarse. Up to 64 no pair
        of products overflows the 16 bits of processors without VNNI.
        """
        alone = self.users[use.weight.dequantize] == 1
        return 1 << max(0, _SAFE_BITS - use.weight.bits) if alone else 1

    def _gather(self, use: QuantizedOperation) -> str:
        blocks = self._blocks(use)
        container, block = blocks.container, blocks.block
        emit = Emitter(self.form.model, use.node, f"{use.label}_fast")
        flat = emit.node("Reshape", blocks.codes, emit.integers(use.weight.rows, use.weight.columns * container // 8))
        # The kernel reads whatever lies behind the table for an index out of bounds; Gather refuses it.
        every = emit.node("Range", *(emit.constant(np.asarray(n, np.int64), "row") for n in (0, use.weight.rows, 1)))
        checked = emit.node("Gather", every, use.data, axis=0)
        result = emit.node(
            "GatherBlockQuantized", flat, checked, blocks.scale, blocks.zero,
            domain=MICROSOFT, bits=container, block_size=block, quantize_axis=1, gather_axis=0,
        )  # fmt: skip
        self.form.expected["GatherBlockQuantized"] += 1
        replace_output(self.form.model.graph, use.node, result)
        return f"gather{container}"

    def _rows(self, use: QuantizedOperation, rows: DynamicActivation) -> str:
        if use.data not in self.row_codes:
            quantizer = use.data.producer()
            assert quantizer is not None
            self.row_codes[use.data] = write_row_codes(
                Emitter(self.form.model, quantizer, f"{use.data.name}_codes"), rows
            )
        emit = Emitter(self.form.model, use.node, f"{use.label}_fast")
        bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
        replace_output(
            self.form.model.graph, use.node, write_row_product(emit, self.row_codes[use.data], use.weight, bias)
        )
        self.form.expected["MatMulInteger"] += 1
        return "rows"

    def _product(self, use: QuantizedOperation) -> str:
        blocks = self._blocks(use)
        container, block = blocks.container, blocks.block
        emit = Emitter(self.form.model, use.node, f"{use.label}_fast")
        rows = _int8_rows(use)
        data = use.data if rows is None else rows.source
        bias = use.node.inputs[2] if use.node.op_type == "Gemm" and len(use.node.inputs) > 2 else None
        if bias is not None:
            bias = emit.node("Reshape", bias, emit.integers(use.weight.rows))
        result = emit.node(
            "MatMulNBits", data, blocks.codes, blocks.scale, blocks.zero, None, bias,
            domain=MICROSOFT, K=use.weight.columns, N=use.weight.rows, bits=container, block_size=block,
            accuracy_level=_accuracy(use),
        )  # fmt: skip
        self.form.expected["MatMulNBits"] += 1
        replace_output(self.form.model.graph, use.node, result)
        return f"blocks{container}{'-int8' if rows is not None else ''}"

    def _blocks(self, use: QuantizedOperation) -> Blocks:
        """A weight in block form, written once for all its users (a tied embedding and head)."""
        node = use.weight.dequantize
        if node not in self.written:
            container, block = self.stored[node][0]
            # In front of the old decoder, which all users come after.
            emit = Emitter(self.form.model, node, f"{use.weight.site}_b{container}x{block}")
            self.written[node] = write_blocks(emit, use.weight, container, block)
        return self.written[node]


def _kind(use: QuantizedOperation) -> str:
    """What suits an operation best: "integer", "rows", "blocks" or "decoded"."""
    if use.weight.output.dtype not in (None, ir.DataType.FLOAT) or isinstance(use.weight.spec.format, Progressive):
        return "decoded"  # no kernel takes two levels of scales
    if isinstance(use.activation, StaticActivation) and _is_integer(use):
        return "integer"
    dynamic = isinstance(use.activation, DynamicActivation)
    if use.is_product and _is_plain(use) and dynamic and _is_symmetric_by_row(use) and probe.runs_row_products():
        return "rows"
    return "blocks" if _block_forms(use) else "decoded"


def _block_forms(use: QuantizedOperation) -> list[tuple[int, int]]:
    """Bits of a code in memory and columns that share a scale, best first, of the block kernels that take a weight."""
    weight, dynamic = use.weight, _int8_rows(use) is not None
    if len(weight.shape) != 2 or (use.is_product and not _is_plain(use)):
        return []
    found: list[tuple[int, int]] = []
    for container in _containers(use, dynamic):
        kernel = (
            partial(probe.runs_matmul_nbits, accuracy=_accuracy(use)) if use.is_product else probe.runs_gather_blocks
        )
        block = block_size(weight, partial(kernel, container))
        if block is not None and (use.is_product or weight.columns % block == 0):
            found.append((container, block))
    return found


def _containers(use: QuantizedOperation, dynamic: bool) -> list[int]:
    """Bits of a code in memory: measured, 2 bits pay in products only with int8 activations and large blocks."""
    weight = use.weight
    if weight.bits > 4:
        return [8] if dynamic or not use.is_product else []
    size = weight.spec.granularity.group_size(weight.columns)
    two = weight.bits == 2 and (not use.is_product or (dynamic and size >= 128))
    return [2, 4] if two else [4]


def _accuracy(use: QuantizedOperation) -> int:
    """accuracy_level of MatMulNBits."""
    return probe.EXACT if _int8_rows(use) is None else probe.INT8_ACTIVATIONS


def _int8_rows(use: QuantizedOperation) -> DynamicActivation | None:
    """How an operation's data is rounded, if that is what MatMulNBits can do itself."""
    found = use.activation
    return found if isinstance(found, DynamicActivation) and found.is_int8 else None


def _is_integer(use: QuantizedOperation) -> bool:
    """Whether ONNX Runtime fuses Q/DQ around this operation."""
    plain = not use.is_product or _is_plain(use)
    return use.node.op_type in _INTEGER_OPS and _is_symmetric_by_row(use) and plain


def _is_symmetric_by_row(use: QuantizedOperation) -> bool:
    """Whether codes fit int8 and one scale serves a whole sum."""
    spec = use.weight.spec
    return spec.symmetric and spec.bits <= 8 and isinstance(spec.granularity, PerChannel | PerTensor)


def _is_plain(use: QuantizedOperation) -> bool:
    """Whether a product is data @ matrix^T + bias of one number a row, which is all that MatMulNBits does."""
    node, weight = use.node, use.weight
    if len(weight.shape) != 2 or node.op_type == "MatMul":
        return len(weight.shape) == 2
    factors = [node.attributes[n].as_float() for n in ("alpha", "beta") if n in node.attributes]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    constant = ir.convenience.get_const_tensor(bias) if bias is not None else None
    return all(f == 1 for f in factors) and (bias is None or (constant is not None and constant.size == weight.rows))
