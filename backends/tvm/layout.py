"""How quantized weights lie in memory for the kernels: tiles of 16 rows, planes of packed bytes.

*Tiled* (matrix products, embeddings, dense convolutions). 16 rows make a tile, four consecutive columns a
quad: 64 bytes, one code each, row by row, which is one AVX-512 register and the operand of `vpdpbusd`. A
plane of 1, 2 or 4 bits holds 8, 4 or 2 consecutive quads in the same 64 bytes. Every group of columns is
padded to whole 64-byte words of its narrowest plane, so ragged groups and odd sizes need no special case.

*Flat* (grouped and depthwise convolutions, whose rows are too short for tiles): planes exactly as
`qcompiler.formats.packing` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompiler.formats import QTensor, QuantSpec
from qcompiler.formats.packing import pack, pack_plane, plane_widths

Arrays = dict[str, npt.NDArray[np.generic]]
LANES = 16  # rows of a tile: int32 lanes of the widest vector register
QUAD = 4  # bytes that one dot-product instruction sums
LONGEST_GROUP = 16384  # columns whose products surely fit an int32 accumulator: 16384 * 255 * 384 < 2^31


@dataclass(frozen=True)
class Tiling:
    """Shape and format of a tiled weight: everything that a kernel is specialised for.

    Attributes:
        rows, columns: of the matrix.
        bits: of a code.
        group: columns that share a scale.
        zeros: whether there are zero points; codes of a symmetric weight have their zero at 2^(bits-1).
        scale_dtype: float32, float16 or bfloat16.
    """

    rows: int
    columns: int
    bits: int
    group: int
    zeros: bool
    scale_dtype: str

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.rows // LANES)

    @property
    def groups(self) -> int:
        """Groups of columns."""
        return -(-self.columns // self.group)

    @property
    def step(self) -> int:
        """Quads that the narrowest plane packs into one 64-byte word."""
        return 8 // plane_widths(self.bits)[-1]

    @property
    def padded(self) -> int:
        """Columns of a group, padded to whole words."""
        unit = QUAD * self.step
        return -(-self.group // unit) * unit

    @property
    def words(self) -> int:
        """Quads of a row, padding counted."""
        return self.groups * self.padded // QUAD

    @property
    def zero_bits(self) -> int:
        """Bits in which a zero point lies: 2, 4 or 8, consecutive groups share a byte."""
        return next(width for width in (2, 4, 8) if width >= self.bits)

    @property
    def middle(self) -> int:
        """The code of zero when there are no zero points."""
        return 1 << (self.bits - 1)


def tiling_of(weight: QTensor) -> Tiling:
    """The tiling of a quantized matrix; groups longer than an int32 sum allows are split."""
    t = tiling_for(weight.spec, *weight.shape)
    assert weight.scale.shape[1] == 1 or _own_group(weight.spec, t.columns) % t.group == 0
    return replace(t, zeros=weight.zero is not None)


def tiling_for(spec: QuantSpec, rows: int, columns: int) -> Tiling:
    """The tiling that any matrix [rows, columns] of this format gets."""
    group = min(_own_group(spec, columns), LONGEST_GROUP)
    return Tiling(rows, columns, spec.bits, group, not spec.symmetric, spec.scale_dtype)


def _own_group(spec: QuantSpec, columns: int) -> int:
    return min(spec.granularity.group_size(columns), columns)


def tile(weight: QTensor, t: Tiling, row_sums: bool = False) -> Arrays:
    """The arrays of a tiled weight: plane0 (, plane1, plane2), scale (, zero) (, sums).

    plane<i> is uint8 [tiles, words of that plane, 64]; scale [tiles, groups, 16] in its stored dtype (bfloat16
    as uint16); zero uint8 [tiles, bytes, 16], groups packed by `zero_bits`; sums int32 in the shape of scale, the
    sum of a group's codes, which asymmetric activations need.
    """
    codes = unsigned_codes(weight)
    padded = np.zeros((t.tiles * LANES, t.groups, t.padded), np.uint8)
    for g in range(t.groups):
        part = codes[:, g * t.group : (g + 1) * t.group]
        padded[: t.rows, g, : part.shape[1]] = part
    arrays: Arrays = {}
    shift = 0
    quads = padded.reshape(t.tiles, LANES, t.words, QUAD).transpose(0, 2, 1, 3)
    for i, width in enumerate(plane_widths(t.bits)):
        field = (quads >> np.uint8(shift)) & np.uint8((1 << width) - 1)
        packs = field.reshape(t.tiles, t.words * width // 8, 8 // width, LANES * QUAD)
        arrays[f"plane{i}"] = np.ascontiguousarray(pack_plane(np.moveaxis(packs, 2, 3), width)[..., 0])
        shift += width
    arrays["scale"] = _stored(_per_group(weight.scale, t), t.scale_dtype)
    if weight.zero is not None:
        zeros = _per_group(weight.zero + _offset(weight), t).astype(np.uint8)
        packed = pack_plane(zeros.transpose(0, 2, 1), t.zero_bits)
        arrays["zero"] = np.ascontiguousarray(packed.transpose(0, 2, 1))
    if row_sums:
        sums = padded.sum(axis=2, dtype=np.int32).reshape(t.tiles, LANES, t.groups)
        arrays["sums"] = np.ascontiguousarray(sums.transpose(0, 2, 1))
    return arrays


def flat(weight: QTensor) -> Arrays:
    """The arrays of a flat weight: planes uint8, scale [rows, groups] (, zero uint8 [rows, groups])."""
    rows = weight.shape[0]
    arrays: Arrays = {f"plane{i}": p for i, p in enumerate(pack(unsigned_codes(weight).reshape(-1), weight.spec.bits))}
    grid = (rows, weight.scale.shape[1])
    arrays["scale"] = _stored(np.broadcast_to(weight.scale, grid), weight.spec.scale_dtype)
    if weight.zero is not None:
        offset = _offset(weight)
        arrays["zero"] = np.ascontiguousarray(np.broadcast_to(weight.zero + offset, grid)).astype(np.uint8)
    return arrays


def unsigned_codes(weight: QTensor) -> npt.NDArray[np.uint8]:
    """The codes counted from zero: signed ones are shifted by 2^(bits-1)."""
    return (weight.codes.astype(np.int16) + _offset(weight)).astype(np.uint8)


def _offset(weight: QTensor) -> int:
    return 1 << (weight.spec.bits - 1) if weight.codes.dtype.kind == "i" else 0


def _per_group(values: npt.NDArray[np.float32], t: Tiling) -> npt.NDArray[np.float32]:
    """[scale rows, groups of the format] -> [tiles, groups of the tiling, 16]; padding rows get zeros."""
    full = np.zeros((t.tiles * LANES, t.groups), np.float32)
    full[: t.rows] = values if values.shape[1] == t.groups else np.repeat(values, t.groups, axis=1)[:, : t.groups]
    return np.ascontiguousarray(full.reshape(t.tiles, LANES, t.groups).transpose(0, 2, 1))


def _stored(scale: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    if dtype == "bfloat16":  # neither .npz nor LLVM of old CPUs knows it: the kernels shift it into a float
        return np.ascontiguousarray(scale).astype(ml_dtypes.bfloat16).view(np.uint16)
    return np.ascontiguousarray(scale).astype(dtype)
