"""Model-local functions of domain "qcompiler", and the recognisers of what InsertQDQ wrote.

ONNX has no tensor types of 3, 5, 6 and 7 bits (and of 2 bits only from opset 25 on), none of two widths, and no
operation that quantizes every row with a scale of its own. These are functions whose body is standard operations: any
runtime runs them by inlining, our backends recognise them and put a kernel there.

`read_weight` and `read_activation` are the only places where the pattern of the QDQ contract
(docs/architecture.md) is taken apart again; the writer is `qcompiler.passes.lower`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompiler.formats import Promoted, QTensor, QuantSpec, parse_spec
from qcompiler.formats.packing import plane_widths
from qcompiler.formats.promoted import FLAG
from qcompiler.graph.codes import DOMAIN, matrix_shape, read_flags, read_integers, read_per_group, stored_shape
from qcompiler.graph.merged import MERGE_BODY, MERGE_SIGNATURE
from qcompiler.graph.rows import ROWS_BODY, ROWS_TO_BODY, row_limit

QUANTIZE_ROWS = "QuantizeRows"
QUANTIZE_ROWS_TO = "QuantizeRowsTo"
# Keys of `metadata_props` on the DequantizeLinear of a weight.
SITE, LAYOUT, SPEC, GROUPS = "qcompiler.site", "qcompiler.layout", "qcompiler.spec", "qcompiler.groups"
TAIL = "qcompiler.tail"  # how many nodes bring the decoded numbers into the weight's shape and type

Floats = npt.NDArray[np.float32]


def has_tensor_type(bits: int, opset: int) -> bool:
    """Whether ONNX itself holds integers of this width at this opset."""
    return bits in (4, 8, 16) or (bits == 2 and opset >= 25)


def unpack_function(bits: int, signed: bool, opset: int) -> ir.Function:
    """`Unpack<b>` or `UnpackSigned<b>`: planes of packed uint8 (formats/packing.py) -> codes.

    One input a plane, widest first; the attribute `shape` is the shape of the result, uint8 codes or, for
    the signed form, int8 codes (stored with an offset of 2^(b-1)).
    """
    planes = plane_widths(bits)
    lines = [
        "  dims = Constant <value_ints: ints = @shape> ()",
        "  count = ReduceProd <keepdims = 1> (dims)",
        "  start = Constant <value_ints: ints = [0]> ()",
        "  flat = Constant <value_ints: ints = [-1]> ()",
    ]
    shift = 0
    for i, width in enumerate(planes):
        steps = ", ".join(str(s) for s in range(0, 8, width))
        lines += [
            f"  steps{i} = Constant <value = uint8[{8 // width}] {{{steps}}}> ()",
            f"  mask{i} = Constant <value = uint8[1] {{{(1 << width) - 1}}}> ()",
            f"  bytes{i} = Unsqueeze (plane{i}, flat)",
            f'  moved{i} = BitShift <direction = "RIGHT"> (bytes{i}, steps{i})',
            f"  field{i} = BitwiseAnd (moved{i}, mask{i})",
            f"  line{i} = Reshape (field{i}, flat)",
            f"  part{i} = Slice (line{i}, start, count)",
        ]
        if i:
            lines += [
                f"  up{i} = Constant <value = uint8[1] {{{shift}}}> ()",
                f'  high{i} = BitShift <direction = "LEFT"> (part{i}, up{i})',
                f"  all{i} = BitwiseOr ({f'all{i - 1}' if i > 1 else 'part0'}, high{i})",
            ]
        shift += width
    whole = f"all{len(planes) - 1}" if len(planes) > 1 else "part0"
    lines.append(f"  {'raw' if signed else 'codes'} = Reshape ({whole}, dims)")
    if signed:
        lines += [
            f"  wide = Cast <to = {ir.DataType.INT8.value}> (raw)",
            f"  middle = Constant <value = int8[1] {{{1 << (bits - 1)}}}> ()",
            "  codes = Sub (wide, middle)",
        ]
    inputs = ", ".join(f"plane{i}" for i in range(len(planes)))
    return parse_function(f"{unpack_name(bits, signed)} <shape> ({inputs}) => (codes)", "\n".join(lines), opset)


def unpack_name(bits: int, signed: bool) -> str:
    """The name of the function that unpacks codes of this kind."""
    return f"Unpack{'Signed' if signed else ''}{bits}"


def quantize_rows_function(opset: int) -> ir.Function:
    """`QuantizeRows(x) -> y`: float32 [..., K], rounded to int8 with one scale a row.

    scale = max|x| over the last axis / 127 (1 where that is zero); y = clip(rint(x / scale), -127, 127) * scale.
    """
    return parse_function(f"{QUANTIZE_ROWS} (x) => (y)", ROWS_BODY, opset)


def quantize_rows_to_function(opset: int) -> ir.Function:
    """`QuantizeRowsTo<limit, clip>(x) -> y`: the same for codes from -limit to limit, which is 2^(b-1) - 1 for b bits.

    scale = clip * max|x| over the last axis / limit (1 where that is zero).
    """
    return parse_function(f"{QUANTIZE_ROWS_TO} <limit, clip> (x) => (y)", ROWS_TO_BODY, opset)


def rounded_rows(model: ir.Model, x: ir.Value, bits: int, clip: float, name: str) -> ir.Node:
    """A node, not in the graph yet, that rounds the rows of `x`; its function is added to the model.

    Args:
        model: whose graph will hold it.
        x: float32 [..., K].
        bits: of the codes, 3 to 8.
        clip: share of a row's largest magnitude that the largest code stands for.
        name: of its output.
    """
    opset = model.graph.opset_imports[""]
    usual = (bits, clip) == (8, 1)
    function = quantize_rows_function(opset) if usual else quantize_rows_to_function(opset)
    add_function(model, function)
    attributes = {} if usual else {"limit": float(row_limit(bits)), "clip": float(clip)}
    output = ir.val(name, dtype=x.dtype, shape=x.shape)
    return ir.node(function.name, [x], attributes, domain=DOMAIN, name=f"{name}_node", outputs=[output])


def rounds_rows(node: ir.Node) -> bool:
    """Whether a node is one that `rounded_rows` makes."""
    return node.domain == DOMAIN and node.op_type in (QUANTIZE_ROWS, QUANTIZE_ROWS_TO)


def merge_function(opset: int) -> ir.Function:
    """`MergeGroups(low, high, flags) -> codes`: groups of two widths (see `qcompiler.graph.merged`) as int8 codes.

    Its attributes are `wide`, the shape of the matrix with all groups whole; `columns`, how many of its columns are
    kept; `shape`, what the matrix is then seen as; and `perm`, the transposition that follows.
    """
    return parse_function(MERGE_SIGNATURE, MERGE_BODY, opset)


def add_function(model: ir.Model, function: ir.Function) -> None:
    """Put a function into the model once, and import its domain."""
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports.setdefault(DOMAIN, 1)


def parse_function(signature: str, body: str, opset: int) -> ir.Function:
    """A function of this domain out of its text, in ONNX's own language."""
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{signature} {{\n{body}\n}}'
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight as the lowered graph holds it.

    Attributes:
        site: name of the site that it was.
        spec: how it is stored (a symmetric UInt of the plan has become an Int).
        layout, groups: as in `Site`.
        shape: shape of the float tensor that its users see.
        rows, columns: of the matrix form.
        scale: float32 [scale rows, groups of columns].
        zero: integer-valued float32 of the same shape, or None; flags are in it if it is of two widths.
        dequantize: the DequantizeLinear node.
        output: the value that stands for the weight: of `dequantize`, or of the last node that shapes it.
        is_matrix: whether the codes are stored as [rows, columns] and brought into shape after `dequantize`.
    """

    site: str
    spec: QuantSpec
    layout: str
    groups: int
    shape: tuple[int, ...]
    rows: int
    columns: int
    scale: Floats
    zero: Floats | None
    dequantize: ir.Node
    output: ir.Value
    is_matrix: bool

    @property
    def bits(self) -> int:
        """Stored bits of one code, of the widest if there are two widths."""
        return self.spec.format.high if isinstance(self.spec.format, Promoted) else self.spec.bits

    def codes(self) -> npt.NDArray[Any]:
        """The codes as a matrix, int8 or uint8 [rows, columns]; read and unpacked at every call."""
        tensor = read_integers(self.dequantize.inputs[0])
        if not self.is_matrix and self.layout == "columns-first":
            tensor = np.swapaxes(tensor, -1, -2)
        elif not self.is_matrix and self.layout == "conv-transpose":
            tensor = np.swapaxes(tensor, 0, 1)
        return np.ascontiguousarray(tensor).reshape(self.rows, self.columns)

    def qtensor(self) -> QTensor:
        """Codes, scales and zero points together."""
        return QTensor(self.spec, self.codes(), self.scale, self.zero)


def read_weight(value: ir.Value | None) -> PackedWeight | None:
    """What stands behind an operation's weight input, if InsertQDQ wrote it; None for anything else."""
    tail: list[ir.Node] = []
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Reshape", "Transpose", "Cast") and not node.domain:
        tail.append(node)
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if value is None or node is None or node.op_type != "DequantizeLinear" or LAYOUT not in node.metadata_props:
        return None
    facts = node.metadata_props
    if len(tail) != int(facts[TAIL]):
        return None  # within the tail, or past it: a Transpose of the weight is an operation of the model
    spec, layout = parse_spec(facts[SPEC]), facts[LAYOUT]
    stored = stored_shape(node.inputs[0])
    is_matrix = any(n.op_type == "Reshape" for n in tail)
    shape = stored_shape(value) if is_matrix else stored
    rows, columns = stored if is_matrix else matrix_shape(stored, layout)
    form = (spec, layout if not is_matrix else "rows-first", rows)
    scale = read_per_group(node.inputs[1], *form)
    zero = read_per_group(node.inputs[2], *form) if not spec.symmetric else None
    flags = read_flags(node.inputs[0])
    if flags is not None:
        zero = FLAG * flags + (0 if zero is None else zero)
    return PackedWeight(
        facts[SITE], spec, layout, int(facts[GROUPS]), shape, rows, columns, scale, zero, node, value, is_matrix
    )


@dataclass(frozen=True, eq=False)
class StaticActivation:
    """A value behind a QuantizeLinear/DequantizeLinear pair: codes of `dtype`, x = (code - zero) * scale."""

    source: ir.Value
    scale: float
    zero: int
    dtype: ir.DataType


@dataclass(frozen=True, eq=False)
class DynamicActivation:
    """A value behind `QuantizeRows` or `QuantizeRowsTo`: codes from -limit to limit, scale clip * max|row| / limit."""

    source: ir.Value
    limit: int = 127
    clip: float = 1.0

    @property
    def is_int8(self) -> bool:
        """Whether it is what kernels for int8 rows do."""
        return (self.limit, self.clip) == (127, 1)


def read_activation(value: ir.Value | None) -> StaticActivation | DynamicActivation | None:
    """How an activation is quantized, and the float value before that; None if it isn't."""
    node = value.producer() if value is not None else None
    if node is None or node.inputs[0] is None:
        return None
    if rounds_rows(node):
        limit, clip = (node.attributes.get_float(name, usual) for name, usual in (("limit", 127.0), ("clip", 1.0)))
        return DynamicActivation(node.inputs[0], round(limit), clip)
    before = node.inputs[0].producer()
    if node.op_type != "DequantizeLinear" or before is None or before.op_type != "QuantizeLinear":
        return None
    source, scale = before.inputs[0], ir.convenience.get_const_tensor(before.inputs[1])  # type: ignore[arg-type]
    if source is None or scale is None or scale.size != 1:
        return None
    zero = before.inputs[2] if len(before.inputs) > 2 else None
    tensor = ir.convenience.get_const_tensor(zero) if zero is not None else None
    if tensor is None:
        return StaticActivation(source, float(scale.numpy().item()), 0, ir.DataType.UINT8)
    return StaticActivation(source, float(scale.numpy().item()), int(tensor.numpy().item()), tensor.dtype)
