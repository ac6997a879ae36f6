"""QDQ graph -> the same graph with one node of domain "qcompiler" for every packed kernel.

These nodes (QcRows, QcMatMul, QcGather, QcConv) carry the name of their kernel; `importer` turns them into
calls. Packed weights and large float constants become graph inputs, so that the library holds only code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from qcompiler.backends.tvm.conv_sites import conv_problem, geometry_of
from qcompiler.backends.tvm.decompose import decompose
from qcompiler.backends.tvm.geometry import FlatFormat
from qcompiler.backends.tvm.kernels import KernelSet
from qcompiler.backends.tvm.layout import QUAD, Tiling
from qcompiler.backends.tvm.parameters import Parameters
from qcompiler.errors import BadModel
from qcompiler.formats import Promoted
from qcompiler.graph.functions import (
    DOMAIN,
    LAYOUT,
    DynamicActivation,
    PackedWeight,
    StaticActivation,
    read_activation,
    read_weight,
)  # fmt: skip

LARGE = 4096  # bytes: constants from this size on are parameters instead of code


@dataclass
class Rewrite:
    """One run over a graph, which it edits in place.

    Attributes:
        model: the graph; afterwards its inputs are the model's own, then `parameters.values`.
        kernels, parameters: filled on the way.
        counts: packed nodes by kind.
    """

    model: ir.Model
    kernels: KernelSet
    parameters: Parameters = field(default_factory=Parameters)
    counts: dict[str, int] = field(default_factory=dict[str, int])
    _rows: dict[tuple[ir.Value, str], list[ir.Value]] = field(
        default_factory=dict[tuple[ir.Value, str], list[ir.Value]]
    )

    def run(self) -> None:
        """Replace all packed weights; BadModel names the first one that no kernel takes."""
        decompose(self.model)
        rules = {"MatMul": self._matmul, "Gemm": self._gemm, "Gather": self._gather, "Conv": self._conv}
        for node in list(self.model.graph):
            rule = rules.get(node.op_type)
            if rule is not None and not node.domain:
                rule(node)
        common.RemoveUnusedNodesPass()(self.model)
        for node in self.model.graph.all_nodes():
            if node.op_type == "DequantizeLinear" and LAYOUT in node.metadata_props:
                user = next(iter(node.outputs[0].uses()))[0]
                where = f"{node.metadata_props['qcompiler.site']} ({user.op_type} {user.name})"
                raise BadModel("target cpu has no packed kernel for this weight", where, "keep it in float (--keep)")
        common.InlinePass()(self.model)
        # Functions that stay (`qcompiler::Hadamard`) hold lists of integers, which TVM's importer does not read.
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(self.model)
        self._large_constants()
        self._read_constants()
        self.model.graph.inputs.extend(self.parameters.values)
        self.model.graph.opset_imports.setdefault(DOMAIN, 1)

    def _matmul(self, node: ir.Node) -> None:
        weight = _product_weight(node.inputs[1])
        if weight is not None:
            self._replace(node, self._product(node, weight))

    def _product(self, node: ir.Node, weight: PackedWeight) -> ir.Value:
        tiling, arrays = self.parameters.tiled(weight)
        activation = read_activation(node.inputs[0])
        rows = activation if isinstance(activation, DynamicActivation) else None
        integer, source = rows is not None, node.inputs[0] if rows is None else rows.source
        assert source is not None
        operands = self._row_operands(node, source, tiling, rows)
        kernel = self.kernels.matmul(tiling, integer)
        inputs: list[ir.Value | None] = [source, *operands, *arrays]
        return self._emit(node, "QcMatMul", inputs, {"kernel": kernel, "rows": tiling.rows})

    def _row_operands(
        self, node: ir.Node, source: ir.Value, t: Tiling, rows: DynamicActivation | None
    ) -> list[ir.Value]:
        """Rows quantized (codes, scales, sums) or padded, once for all products that read them."""
        integer = rows is not None
        kernel = self.kernels.quantize_rows(t, rows.limit, rows.clip) if rows else self.kernels.pad_rows(t)
        if (source, kernel) not in self._rows:
            attributes = {"kernel": kernel, "columns": t.words * QUAD, "groups": t.groups, "integer": int(integer)}
            made = ir.node(
                "QcRows", [source], attributes, domain=DOMAIN, num_outputs=3 if integer else 1,
                name=f"{node.name}_rows",
            )  # fmt: skip
            self.model.graph.insert_before(node, made)
            self._rows[source, kernel] = list(made.outputs)
        return self._rows[source, kernel]

    def _gemm(self, node: ir.Node) -> None:
        weight = _packed(node.inputs[1])
        if weight is None:
            return
        transposed = node.attributes.get_int("transB", 0) == 1
        if transposed != (weight.layout == "rows-first") or node.attributes.get_int("transA", 0):
            return
        value = self._scaled(node, self._product(node, weight), node.attributes.get_float("alpha", 1.0))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            bias = self._scaled(node, bias, node.attributes.get_float("beta", 1.0))
            value = self._emit(node, "Add", [value, bias], {}, domain="")
        self._replace(node, value)

    def _scaled(self, node: ir.Node, value: ir.Value, factor: float) -> ir.Value:
        if factor == 1.0:
            return value
        return self._emit(node, "Mul", [value, self._initializer(node, np.float32(factor))], {}, domain="")

    def _gather(self, node: ir.Node) -> None:
        weight = _packed(node.inputs[0])
        if weight is None or weight.layout != "rows-first" or node.attributes.get_int("axis", 0) != 0:
            return
        tiling, arrays = self.parameters.tiled(weight)
        attributes = {"kernel": self.kernels.gather(tiling), "columns": tiling.columns}
        self._replace(node, self._emit(node, "QcGather", [node.inputs[1], *arrays], attributes))

    def _conv(self, node: ir.Node) -> None:
        weight = _packed(node.inputs[1])
        if weight is None or conv_problem(node, weight) is not None:
            return
        geometry, spatial = geometry_of(node, weight)
        activation = read_activation(node.inputs[0])
        integer = isinstance(activation, StaticActivation) and activation.dtype == ir.DataType.UINT8
        per_row = weight.scale.shape[1] == 1
        integer = integer and (geometry.groups == 1 or per_row)
        if integer:
            assert isinstance(activation, StaticActivation)
            before = node.inputs[0].producer()  # type: ignore[union-attr]
            assert before is not None
            scale = self._initializer(node, np.array([activation.scale], np.float32))
            zero = self._initializer(node, np.array([activation.zero], np.int32))
            data = [before.inputs[0], scale, zero]
        else:
            data = [node.inputs[0]]
        kernel, arrays = self._conv_kernel(weight, geometry, integer)
        attributes = {
            "kernel": kernel, "rows": geometry.rows, "spatial": len(spatial.kernel), "size": spatial.kernel,
            "strides": spatial.strides, "dilations": spatial.dilations, "pads": spatial.pads, "data": len(data),
        }  # fmt: skip
        value = self._emit(node, "QcConv", [*data, *arrays], attributes)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            shape = self._initializer(node, np.array([1, -1] + [1] * len(spatial.kernel), np.int64))
            shaped = self._emit(node, "Reshape", [bias, shape], {}, domain="")
            value = self._emit(node, "Add", [value, shaped], {}, domain="")
        self._replace(node, value)

    def _conv_kernel(self, weight: PackedWeight, geometry: Any, integer: bool) -> tuple[str, list[ir.Value]]:
        if geometry.groups == 1:
            tiling, arrays = self.parameters.tiled(weight, row_sums=integer)
            return self.kernels.dense_conv(geometry, tiling, integer), arrays
        columns, groups = weight.columns, weight.scale.shape[1]
        size = columns if groups == 1 else weight.spec.granularity.group_size(columns)
        fmt = FlatFormat(weight.bits, groups, size, weight.zero is not None, weight.spec.scale_dtype)
        return self.kernels.grouped_conv(geometry, fmt, integer), self.parameters.flat(weight)

    def _emit(
        self, node: ir.Node, op: str, inputs: list[ir.Value | None], attributes: dict[str, Any], domain: str = DOMAIN
    ) -> ir.Value:
        if domain == DOMAIN:
            self.counts[op] = self.counts.get(op, 0) + 1
        made = ir.node(op, inputs, attributes, domain=domain, name=f"{node.name}_{op}")
        self.model.graph.insert_before(node, made)
        made.outputs[0].type = node.outputs[0].type
        return made.outputs[0]

    def _initializer(self, node: ir.Node, array: Any) -> ir.Value:
        name = f"{node.name}_constant_{len(self.model.graph.initializers)}"
        value = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
        self.model.graph.register_initializer(value)
        return value

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        old = node.outputs[0]
        name, value.shape = old.name, old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)
        value.name = name

    def _large_constants(self) -> None:
        for name, value in list(self.model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.nbytes < LARGE:
                continue
            if value.is_graph_output():
                continue
            value.replace_all_uses_with(self.parameters.constant(tensor.numpy()))
            del self.model.graph.initializers[name]

    def _read_constants(self) -> None:
        """Read the constants that are left from their files, which TVM does not know."""
        for value in self.model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name)


def _packed(value: ir.Value | None) -> PackedWeight | None:
    """The weight behind an input, if kernels know its kind of format: there are none for groups of two widths."""
    weight = read_weight(value)
    return None if weight is None or isinstance(weight.spec.format, Promoted) else weight


def _product_weight(value: ir.Value | None) -> PackedWeight | None:
    """The weight [K, N] of a MatMul: stored so, or the transposition of a table [N, K]."""
    weight = _packed(value)
    if weight is not None:
        return weight if weight.layout == "columns-first" and len(weight.shape) == 2 else None
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Transpose" or node.domain:
        return None
    permutation = node.attributes.get("perm")
    if permutation is not None and list(permutation.as_ints()) != [1, 0]:
        return None
    weight = _packed(node.inputs[0])
    return weight if weight is not None and weight.layout == "rows-first" and len(weight.shape) == 2 else None
