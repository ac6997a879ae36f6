"""Weights in the block form of ONNX Runtime's kernels: MatMulNBits for products, GatherBlockQuantized for tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.backends.onnx.emit import Emitter
from qcompiler.backends.onnx.probe import BLOCKS
from qcompiler.formats import Promoted
from qcompiler.formats.packing import pack_plane
from qcompiler.formats.promoted import split_zero
from qcompiler.graph.functions import PackedWeight

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_PREFERRED_BLOCK = 128  # for scales that reach over a whole row; fewer, larger blocks are faster
_STORAGE = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def block_size(weight: PackedWeight, runs: Callable[[int], bool]) -> int | None:
    """The block that a weight's groups are made of, among those that the kernel runs; None if there is none."""
    groups, size = weight.scale.shape[1], weight.spec.granularity.group_size(weight.columns)
    for block in BLOCKS:
        fits = block <= _PREFERRED_BLOCK and block <= weight.columns if groups == 1 else size % block == 0
        if fits and runs(block):
            return block
    return None


@dataclass(frozen=True, eq=False)
class Blocks:
    """Values in the graph for the operands of a block kernel.

    Attributes:
        codes: uint8 [rows, blocks, block * container / 8].
        scale: float32 [rows, blocks].
        zero: uint8 [rows, ceil(blocks * container / 8)] or None, which means the middle code.
        container: bits in which a code lies in memory.
        block: columns that share a scale.
    """

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    container: int
    block: int


def write_blocks(emit: Emitter, weight: PackedWeight, container: int, block: int) -> Blocks:
    """Put a weight into the graph, in its own width on disk and in `container` bits once a session is made."""
    bits, shape = weight.bits, (weight.rows, -(-weight.columns // block), block)
    # Codes of a symmetric weight move to the middle of the container, which is what "no zero points" means.
    if isinstance(weight.spec.format, Promoted):
        codes = _repacked(emit, _merged(emit, weight, 1 << (container - 1)), container, shape, weight.columns)
        return Blocks(
            codes, _scales(emit, weight, block), _merged_zeros(emit, weight, container, block), container, block
        )
    offset = 1 << (bits - 1) if weight.spec.format.signed else 0  # type: ignore[attr-defined]
    raw = (weight.codes().astype(np.int16) + offset).astype(np.uint8)
    lift = (1 << (container - 1)) - (1 << (bits - 1)) if weight.zero is None else 0
    if bits == container:
        codes = emit.constant(pack_plane(_padded(raw, shape[1] * block).reshape(shape), bits), "codes")
    else:
        codes = _repacked(emit, _plus(emit, emit.unpacked(raw, bits), lift), container, shape, weight.columns)
    zero = None
    if weight.zero is not None:
        each = _per_block(weight, weight.zero, block).astype(np.int16) + offset
        zero = emit.constant(pack_plane(each.astype(np.uint8), container), "zero")
    return Blocks(codes, _scales(emit, weight, block), zero, container, block)


def _padded(codes: Codes, columns: int) -> Codes:
    return np.pad(codes, [(0, 0), (0, columns - codes.shape[1])])


def _merged(emit: Emitter, weight: PackedWeight, middle: int) -> ir.Value:
    """Codes of two widths as the graph merges them, uint8 [rows, columns]; `middle` is added to them."""
    codes = weight.dequantize.inputs[0]
    assert codes is not None
    if weight.layout == "columns-first":
        codes = emit.node("Transpose", codes, perm=[1, 0])
    return _plus(emit, emit.cast(codes, ir.DataType.UINT8), middle)  # two's complement: the sum comes out right


def _merged_zeros(emit: Emitter, weight: PackedWeight, container: int, block: int) -> ir.Value | None:
    assert weight.zero is not None
    if weight.spec.symmetric:
        return None
    each = _per_block(weight, split_zero(weight.zero)[1], block) + (1 << (container - 1))
    return emit.constant(pack_plane(each.astype(np.uint8), container), "zero")


def _plus(emit: Emitter, codes: ir.Value, number: int) -> ir.Value:
    return emit.node("Add", codes, emit.constant(np.array([number], np.uint8), "lift")) if number else codes


def _repacked(emit: Emitter, codes: ir.Value, container: int, shape: tuple[int, int, int], columns: int) -> ir.Value:
    """uint8 [rows, columns] -> the container's bytes, by operations that are folded when a session is made."""
    rows, blocks, block = shape
    if blocks * block != columns:
        codes = emit.node("Pad", codes, emit.integers(0, 0, 0, blocks * block - columns))
    if container == 8:
        return emit.node("Reshape", codes, emit.integers(rows, blocks, block))
    pairs = emit.node("Reshape", codes, emit.integers(rows, blocks, block // 2, 2))
    low = emit.node("Gather", pairs, emit.constant(np.asarray(0, np.int64), "low"), axis=3)
    high = emit.node("Gather", pairs, emit.constant(np.asarray(1, np.int64), "high"), axis=3)
    shifted = emit.node("BitShift", high, emit.constant(np.array([4], np.uint8), "four"), direction="LEFT")
    return emit.node("BitwiseOr", low, shifted)


def _per_block(weight: PackedWeight, values: Floats, block: int) -> Floats:
    """[scale rows, groups] -> [rows, blocks]."""
    blocks = -(-weight.columns // block)
    size = weight.spec.granularity.group_size(weight.columns)
    group = np.minimum(np.arange(blocks) * block // size, values.shape[1] - 1)
    return np.broadcast_to(values, (weight.rows, values.shape[1]))[:, group]


def _scales(emit: Emitter, weight: PackedWeight, block: int) -> ir.Value:
    """Scales in the width in which they are stored, widened and repeated when a session is made."""
    dtype = _STORAGE[weight.spec.scale_dtype]
    one_a_row = weight.scale.shape[1] == 1
    stored = weight.scale if one_a_row else _per_block(weight, weight.scale, block)
    value = emit.constant(stored.astype(dtype), "scale")
    if dtype is not np.float32:
        value = emit.cast(value, ir.DataType.FLOAT)
    if not one_a_row:
        return value
    return emit.node("Expand", value, emit.integers(weight.rows, -(-weight.columns // block)))
