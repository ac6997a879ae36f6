"""Codes, scales and zero points that InsertQDQ stored, read out of a lowered graph as arrays."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import BadModel
from qcompiler.formats import Granularity, PerRowGroup, PerTensor, QuantSpec
from qcompiler.formats.packing import unpack
from qcompiler.graph.merged import MERGE, merge_groups, merged_shape, unpack_flags
from qcompiler.graph.sites import Site

DOMAIN = "qcompiler"  # of the functions that models carry with them
Floats = npt.NDArray[np.float32]


def matrix_shape(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    """(rows, columns) of a tensor that is stored in its own layout."""
    if layout == "columns-first":
        return prod(shape[:-2]) * shape[-1], shape[-2]
    if layout == "conv-transpose":
        return shape[1], shape[0] * prod(shape[2:])
    return shape[0], prod(shape[1:])


def row_groups_refusal(site: Site, granularity: Granularity) -> str | None:
    """Why no file can hold groups of rows for a site, or None: in a batch they must end where a matrix does."""
    if not isinstance(granularity, PerRowGroup) or site.layout != "columns-first":
        return None
    each = site.shape[-1]
    if len(site.shape) == 2 or each % granularity.size == 0:
        return None
    return f"groups of {granularity.size} rows do not divide matrices of {each} rows"


def read_per_group(value: ir.Value | None, spec: QuantSpec, layout: str, rows: int) -> Floats:
    """Scales or zero points as float32 [scale rows, groups]."""
    array = np.asarray(_numbers(value), np.float32)
    if isinstance(spec.granularity, PerTensor):
        return array.reshape(1, 1)
    if layout == "columns-first" and array.ndim > 1:
        array = np.ascontiguousarray(np.swapaxes(array, -1, -2))
    if isinstance(spec.granularity, PerRowGroup):
        return array.reshape(-1, array.shape[-1])
    return array.reshape(rows, -1)


def _numbers(value: ir.Value | None) -> npt.NDArray[Any]:
    """Scales (perhaps behind a Cast) or zero points as they are stored."""
    assert value is not None
    node = value.producer()
    if node is not None and node.op_type == "Mul":  # two levels of scales
        return np.asarray(_numbers(node.inputs[0]), np.float32) * np.asarray(_numbers(node.inputs[1]), np.float32)
    if node is not None and node.op_type in ("Cast", "Squeeze"):
        return _numbers(node.inputs[0])
    return read_integers(value) if node is not None else _tensor(value).numpy()


def read_integers(value: ir.Value | None) -> npt.NDArray[Any]:
    """The integers of an initializer, or of a function that yields codes, as an array of a plain numpy type."""
    assert value is not None
    node = value.producer()
    if node is None:
        tensor = _tensor(value)
        wide = tensor.dtype.bitwidth > 8
        return tensor.numpy().astype(f"{'int' if tensor.dtype.is_signed() else 'uint'}{16 if wide else 8}")
    if node.op_type == MERGE:
        promoted = read_flags(value)
        assert promoted is not None
        low, high = (read_integers(part) for part in node.inputs[:2])
        return merge_groups(node, low, high, promoted)
    signed, bits, shape = "Signed" in node.op_type, int(node.op_type[-1]), stored_shape(value)
    planes = [_tensor(plane).numpy() for plane in node.inputs if plane is not None]
    codes = unpack(planes, bits, prod(shape)).reshape(shape)
    return codes.astype(np.int8) - np.int8(1 << (bits - 1)) if signed else codes


def read_flags(value: ir.Value | None) -> Floats | None:
    """Which groups of these codes are promoted, [rows, groups of a row], 0 or 1; None for codes of one width."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != MERGE:
        return None
    packed = node.inputs[2]
    assert packed is not None
    return unpack_flags(node, _tensor(packed).numpy(), sum(stored_shape(part)[0] for part in node.inputs[:2]))


def stored_shape(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape of an initializer, of the codes that a function yields or of a Reshape."""
    assert value is not None
    node = value.producer()
    if node is not None and node.domain == DOMAIN:
        return merged_shape(node) if node.op_type == MERGE else tuple(node.attributes["shape"].as_ints())
    if value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    if value.shape is None or value.shape.is_dynamic():
        raise BadModel("a quantized weight has lost its shape", where=str(value.name))
    return tuple(value.shape.numpy())


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise BadModel("a quantized weight has no constant codes or scales", where=str(value.name))
    return value.const_value
