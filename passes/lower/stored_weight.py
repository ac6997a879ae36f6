"""One quantized matrix as ONNX initializers and the nodes that decode it (docs/architecture.md, the QDQ contract).

`qcompiler.graph.functions.read_weight` is the inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassRefused
from qcompiler.formats import Format, Int, PerChannel, PerTensor, Progressive, Promoted, QTensor, UInt
from qcompiler.formats.packing import pack, pack_plane
from qcompiler.formats.progressive import split_scales
from qcompiler.formats.promoted import split_zero
from qcompiler.graph import functions
from qcompiler.graph.codes import row_groups_refusal
from qcompiler.graph.merged import MERGE, split_groups
from qcompiler.graph.sites import Site
from qcompiler.passes.lower.arrangement import Arrangement, needs_matrix

_STORAGE = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass
class StoredWeight:
    """Initializers and nodes (in order) that make up a weight; `value` replaces the float initializer."""

    site: Site
    opset: int
    initializers: list[ir.Value] = field(default_factory=list[ir.Value])
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    functions: list[ir.Function] = field(default_factory=list[ir.Function])

    @property
    def value(self) -> ir.Value:
        """The decoded weight."""
        return self.nodes[-1].outputs[0]

    @property
    def needs_int2(self) -> bool:
        """Whether a tensor of 2-bit integers is among the initializers: they came with IR version 13."""
        types = {value.const_value.dtype for value in self.initializers if value.const_value is not None}
        return bool(types & {ir.DataType.INT2, ir.DataType.UINT2})

    def constant(self, array: npt.NDArray[Any], suffix: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer."""
        name = f"{self.site.weight.name}_{suffix}"
        value = ir.val(name, const_value=ir.tensor(array, dtype=dtype, name=name))
        self.initializers.append(value)
        return value

    def apply(
        self,
        op: str,
        inputs: list[ir.Value],
        suffix: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        attributes: dict[str, Any] | None = None,
    ) -> ir.Value:
        """A new node with one output of known type and shape."""
        name = f"{self.site.weight.name}_{suffix}"
        output = ir.val(name, dtype=dtype, shape=shape)
        domain = functions.DOMAIN if op.startswith(("Unpack", MERGE)) else ""
        self.nodes.append(ir.node(op, inputs, attributes, domain=domain, name=f"{name}_node", outputs=[output]))
        return output

    def integers(self, array: npt.NDArray[Any], fmt: Int | UInt, suffix: str) -> ir.Value:
        """Codes or zero points: an initializer of ONNX's own type, or packed planes and their Unpack."""
        if functions.has_tensor_type(fmt.bits, self.opset):
            return self.constant(array.astype(fmt.dtype), suffix, ir.DataType[str(fmt).upper()])
        planes = pack((array.astype(np.int16) - fmt.lo).reshape(-1), fmt.bits)
        inputs = [self.constant(plane, f"{suffix}_{i}") for i, plane in enumerate(planes)]
        self.functions.append(functions.unpack_function(fmt.bits, fmt.signed, self.opset))
        kind = ir.DataType.INT8 if fmt.signed else ir.DataType.UINT8
        shape = array.shape or (1,)
        codes = self.apply(
            functions.unpack_name(fmt.bits, fmt.signed), inputs, suffix, kind, shape, {"shape": list(shape)}
        )
        return codes if array.shape else self.apply("Squeeze", [codes], f"{suffix}_scalar", kind, ())


def store(site: Site, tensor: QTensor, opset: int) -> StoredWeight:
    """Initializers and nodes for a rounded site.

    Raises:
        PassRefused: for a width that no ONNX type and no Unpack function holds.
    """
    tensor = _as_lowered(site, tensor)
    refusal = row_groups_refusal(site, tensor.spec.granularity)
    if refusal is not None:
        raise PassRefused(refusal, site.name, "use groups of columns: g32 in place of r32")
    out, spec = StoredWeight(site, opset), tensor.spec
    as_matrix = needs_matrix(site, tensor)
    arrange = Arrangement(site, as_matrix)
    codes = _merged(out, arrange, tensor) if isinstance(spec.format, Promoted) else _plain(out, arrange, tensor)
    inputs = [codes, _scales(out, arrange, tensor)]
    if isinstance(spec.format, Promoted) and not spec.symmetric:
        inputs.append(_merged_zeros(out, arrange, tensor))
    elif tensor.zero is not None and not isinstance(spec.format, Promoted):
        inputs.append(out.integers(arrange.per_group(tensor, tensor.zero), _grid(spec.format), "zero"))
    shape = tensor.shape if as_matrix else site.shape
    value = out.apply("DequantizeLinear", inputs, "dequantized", ir.DataType.FLOAT, shape, arrange.attributes(tensor))
    dequantize = out.nodes[-1]
    if as_matrix:
        value = _reshaped(out, value)
    dtype = site.weight.dtype or ir.DataType.FLOAT
    if dtype != ir.DataType.FLOAT:
        value = out.apply("Cast", [value], "cast", dtype, site.shape, {"to": dtype.value})
    after = out.nodes[out.nodes.index(dequantize) + 1 :]
    facts = {
        functions.SITE: site.name,
        functions.LAYOUT: site.layout,
        functions.SPEC: str(spec),
        functions.GROUPS: str(site.groups),
        functions.TAIL: str(sum(node.op_type != "Constant" for node in after)),
    }
    dequantize.metadata_props.update(facts)
    return out


def _as_lowered(site: Site, tensor: QTensor) -> QTensor:
    """The same numbers in the form that the graph holds: a symmetric UInt as Int, one group a row as per channel.

    Where none or all of the groups are promoted, there is one width only.
    """
    spec, fmt = tensor.spec, tensor.spec.format
    if isinstance(fmt, Promoted):
        assert tensor.zero is not None
        fmt = _settled(site, tensor, fmt)
        spec = replace(spec, format=fmt)
        if isinstance(fmt, Int):
            tensor = replace(tensor, zero=None if spec.symmetric else split_zero(tensor.zero)[1])
    width = fmt.high if isinstance(fmt, Promoted) else fmt.bits
    if not isinstance(fmt, Int | UInt | Promoted | Progressive) or width not in (2, 3, 4, 5, 6, 7, 8, 16):
        raise PassRefused(f"no ONNX form for weights of format {fmt}", site.name, "use int2 to int8 or uint2 to uint8")
    if isinstance(fmt, UInt) and tensor.zero is None:
        signed = Int(fmt.bits)
        codes = (tensor.codes.astype(np.int32) - fmt.middle).astype(signed.dtype)
        spec, tensor = replace(spec, format=signed), replace(tensor, codes=codes)
    if not isinstance(spec.granularity, PerTensor | PerChannel) and tensor.scale.shape == (tensor.shape[0], 1):
        spec = replace(spec, granularity=PerChannel())
    return replace(tensor, spec=spec)


def _settled(site: Site, tensor: QTensor, fmt: Promoted) -> Promoted | Int:
    """The format that holds just what is there."""
    assert tensor.zero is not None
    count, groups = int(split_zero(tensor.zero)[0].sum()), tensor.zero.size
    if count != fmt.promoted(groups):
        what = f"{count} of {groups} groups are promoted, which is not what {tensor.spec} stores"
        raise PassRefused(what, site.name, "round the weight with formats.fit")
    if count in (0, groups):
        return fmt.wide if count else fmt.narrow
    return fmt


def _plain(out: StoredWeight, arrange: Arrangement, tensor: QTensor) -> ir.Value:
    """Codes of one width in their place."""
    return out.integers(arrange.codes(tensor.codes), _grid(tensor.spec.format), "codes")


def _grid(fmt: Format) -> Int | UInt:
    """The integers that codes and zero points of one width are."""
    if isinstance(fmt, Progressive):
        return fmt.grid
    assert isinstance(fmt, Int | UInt)
    return fmt


def _scales(out: StoredWeight, arrange: Arrangement, tensor: QTensor) -> ir.Value:
    """Scales as float32; of two levels they are multiplied, which float32 does without rounding."""
    spec, dtype = tensor.spec, _STORAGE.get(tensor.spec.scale_dtype, np.float32)
    if not isinstance(spec.format, Progressive):
        return _widened(out, out.constant(arrange.per_group(tensor, tensor.scale).astype(dtype), "scale"))
    outer, inner = (arrange.per_group(tensor, part) for part in split_scales(tensor.scale, spec.scale_dtype))
    row = _widened(out, out.constant(outer.astype(dtype), "scale"))
    group = _widened(out, out.constant(inner.astype(np.uint8), "group_scale"))
    return out.apply("Mul", [row, group], "scales", ir.DataType.FLOAT, inner.shape)


def _merged(out: StoredWeight, arrange: Arrangement, tensor: QTensor) -> ir.Value:
    """Codes of two widths, apart, and the function that puts them in their place."""
    fmt = tensor.spec.format
    assert isinstance(fmt, Promoted)
    assert tensor.zero is not None
    flags, _ = split_zero(tensor.zero)
    packed = out.constant(pack_plane(flags.reshape(-1), 1), "flags")
    size = tensor.spec.granularity.group_size(tensor.shape[1])
    return _merge(
        out,
        tensor.codes,
        flags,
        packed,
        (fmt, size, "codes"),
        arrange.turn(tensor.shape if arrange.as_matrix else arrange.site.shape),
    )


def _merged_zeros(out: StoredWeight, arrange: Arrangement, tensor: QTensor) -> ir.Value:
    """Zero points of two widths in their place: one a group, told apart by the flags that `_merged` has stored."""
    fmt = tensor.spec.format
    assert isinstance(fmt, Promoted)
    assert tensor.zero is not None
    flags, points = split_zero(tensor.zero)
    packed = next(node for node in out.nodes if node.op_type == MERGE).inputs[2]
    assert packed is not None
    shape = arrange.per_group(tensor, points).shape
    return _merge(out, points, flags, packed, (fmt, 1, "zero"), arrange.turn(shape))


def _merge(
    out: StoredWeight,
    values: npt.NDArray[Any],
    flags: npt.NDArray[np.bool_],
    packed: ir.Value,
    form: tuple[Promoted, int, str],
    turn: tuple[tuple[int, ...], tuple[int, ...]],
) -> ir.Value:
    """[rows, columns] of integers of two widths: `form` is these, the columns in a group, and what it is."""
    fmt, size, what = form
    low, high = split_groups(values, flags, size)
    inputs = [out.integers(low, fmt.narrow, f"{what}_low"), out.integers(high, fmt.wide, f"{what}_high"), packed]
    out.functions.append(functions.merge_function(out.opset))
    (rows, columns), (shape, perm) = values.shape, turn
    wide = [rows, flags.shape[1] * size]
    attributes = {"wide": wide, "columns": [columns], "shape": list(shape), "perm": list(perm)}
    return out.apply(MERGE, inputs, what, ir.DataType.INT8, tuple(shape[axis] for axis in perm), attributes)


def _widened(out: StoredWeight, scale: ir.Value) -> ir.Value:
    """Scales as float32, which is what DequantizeLinear then yields."""
    assert scale.const_value is not None
    if scale.const_value.dtype == ir.DataType.FLOAT:
        return scale
    shape = tuple(scale.const_value.shape.numpy())
    return out.apply(
        "Cast",
        [scale],
        f"{str(scale.name).removeprefix(f'{out.site.weight.name}_')}_fp32",
        ir.DataType.FLOAT,
        shape,
        {"to": ir.DataType.FLOAT.value},
    )


def _reshaped(out: StoredWeight, value: ir.Value) -> ir.Value:
    """[rows, columns] -> the weight's own shape; a grouped ConvTranspose keeps its channels group by group."""
    site = out.site
    if site.layout != "conv-transpose":
        return _reshape(out, value, site.shape, "shaped")
    g, (i, o), kernel = site.groups, site.shape[:2], site.shape[2:]
    split = _reshape(out, value, (g, o, i // g, *kernel), "split")
    order = [0, 2, 1, *range(3, 3 + len(kernel))]
    turned = out.apply("Transpose", [split], "turned", ir.DataType.FLOAT, (g, i // g, o, *kernel), {"perm": order})
    return _reshape(out, turned, site.shape, "shaped")


def _reshape(out: StoredWeight, value: ir.Value, shape: tuple[int, ...], suffix: str) -> ir.Value:
    # A Constant node rather than an initializer: initializers are the stored bytes of the weight, and nothing else.
    dims = out.apply("Constant", [], f"{suffix}_dims", ir.DataType.INT64, (len(shape),), {"value_ints": list(shape)})
    return out.apply("Reshape", [value, dims], suffix, ir.DataType.FLOAT, shape)
