"""`MergeGroups`: codes of two widths, stored apart, become one tensor of int8 codes (formats/promoted.py).

Ordinary groups and promoted ones lie in two tensors [groups, size], each in the order of the matrix; a bit a group, the
first in the lowest bit of a byte, tells which is next. The function is standard operations, as all of this domain.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.formats.packing import unpack_plane

MERGE = "MergeGroups"
Codes = npt.NDArray[np.int8]

MERGE_SIGNATURE = f"{MERGE} <wide, columns, shape, perm> (low, high, flags) => (codes)"
MERGE_BODY = f"""
  last = Constant <value_ints: ints = [-1]> ()
  first = Constant <value_ints: ints = [0]> ()
  steps = Constant <value = uint8[8] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
  mask = Constant <value = uint8[1] {{1}}> ()
  bytes = Unsqueeze (flags, last)
  moved = BitShift <direction = "RIGHT"> (bytes, steps)
  field = BitwiseAnd (moved, mask)
  line = Reshape (field, last)
  low_codes = Cast <to = {ir.DataType.INT8.value}> (low)
  high_codes = Cast <to = {ir.DataType.INT8.value}> (high)
  ordinary = Shape <start = 0, end = 1> (low_codes)
  promoted = Shape <start = 0, end = 1> (high_codes)
  groups = Add (ordinary, promoted)
  bits = Slice (line, first, groups)
  flag = Cast <to = {ir.DataType.INT64.value}> (bits)
  one = Constant <value_int: int = 1> ()
  other = Sub (one, flag)
  zero = Constant <value_int: int = 0> ()
  flags_so_far = CumSum (flag, zero)
  others_so_far = CumSum (other, zero)
  behind = Add (flags_so_far, ordinary)
  is_promoted = Cast <to = {ir.DataType.BOOL.value}> (bits)
  position = Where (is_promoted, behind, others_so_far)
  index = Sub (position, one)
  sorted = Concat <axis = 0> (low_codes, high_codes)
  merged = Gather <axis = 0> (sorted, index)
  wide_dims = Constant <value_ints: ints = @wide> ()
  padded = Reshape (merged, wide_dims)
  end = Constant <value_ints: ints = @columns> ()
  axis = Constant <value_ints: ints = [1]> ()
  matrix = Slice (padded, first, end, axis)
  dims = Constant <value_ints: ints = @shape> ()
  shaped = Reshape (matrix, dims)
  codes = Transpose <perm: ints = @perm> (shaped)
"""


def split_groups(codes: npt.NDArray[np.integer], flags: npt.NDArray[np.bool_], size: int) -> tuple[Codes, Codes]:
    """Codes of the ordinary and of the promoted groups, int8 [groups, size] each.

    Args:
        codes: [rows, columns].
        flags: which groups are promoted, [rows, groups of a row].
        size: columns in a group; the last group of a row is filled up with zeros.
    """
    padded = np.pad(codes, [(0, 0), (0, flags.shape[1] * size - codes.shape[1])])
    blocks = padded.reshape(-1, size).astype(np.int8)
    return blocks[~flags.reshape(-1)], blocks[flags.reshape(-1)]


def unpack_flags(node: ir.Node, packed: npt.NDArray[np.uint8], groups: int) -> npt.NDArray[np.float32]:
    """The flags of a `MergeGroups` node as [rows, groups of a row], 0 or 1."""
    rows = node.attributes["wide"].as_ints()[0]
    return unpack_plane(packed, 1, groups).reshape(rows, -1).astype(np.float32)


def merge_groups(node: ir.Node, low: Codes, high: Codes, flags: npt.NDArray[np.float32]) -> Codes:
    """What a `MergeGroups` node yields."""
    blocks = np.empty((flags.size, low.shape[1]), np.int8)
    promoted = flags.reshape(-1) > 0
    blocks[~promoted], blocks[promoted] = low, high
    columns = node.attributes["columns"].as_ints()[0]
    matrix = blocks.reshape(node.attributes["wide"].as_ints())[:, :columns]
    return matrix.reshape(node.attributes["shape"].as_ints()).transpose(node.attributes["perm"].as_ints())


def merged_shape(node: ir.Node) -> tuple[int, ...]:
    """Shape of what a `MergeGroups` node yields."""
    shape = node.attributes["shape"].as_ints()
    return tuple(shape[axis] for axis in node.attributes["perm"].as_ints())
