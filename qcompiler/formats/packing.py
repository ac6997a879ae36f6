"""Packing of codes into bytes: planes of 8, 4, 2 and 1 bits.

A width b is a sum of powers of two (3 = 2 + 1, 5 = 4 + 1, 7 = 4 + 2 + 1); each power is one *plane*, packed
along the last axis with the first element in the lowest bits of a byte. Where b is itself a power of two
this is the layout of ONNX's own INT4/INT2 and of MatMulNBits. A stored tensor is flattened before it is
packed, so that short rows (depthwise convolutions) waste nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def plane_widths(bits: int) -> tuple[int, ...]:
    """The planes of a width, widest first: 3 -> (2, 1), 5 -> (4, 1), 8 -> (8,)."""
    return tuple(p for p in (8, 4, 2, 1) if bits & p)


def packed_bits(count: int, bits: int) -> int:
    """Stored bits of `count` codes: each plane ends on a whole byte."""
    return sum(-(-count * width // 8) * 8 for width in _all_planes(bits))


def _all_planes(bits: int) -> tuple[int, ...]:
    return (8,) * (bits // 8) + plane_widths(bits % 8)


def pack_plane(values: npt.NDArray[Any], width: int) -> Bytes:
    """Pack unsigned values < 2^width along the last axis: [..., n] -> uint8 [..., ceil(n * width / 8)]."""
    if width == 8:
        return values.astype(np.uint8)
    per_byte = 8 // width
    fill = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per_byte)]
    padded = np.pad(values.astype(np.uint8), fill)
    split = padded.reshape(*padded.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(width)
    return np.bitwise_or.reduce(split << shifts, axis=-1)


def unpack_plane(data: Bytes, width: int, count: int) -> Bytes:
    """The inverse of `pack_plane`: uint8 [..., bytes] -> uint8 [..., count]."""
    if width == 8:
        return data
    shifts = np.arange(8 // width, dtype=np.uint8) * np.uint8(width)
    values = (data[..., None] >> shifts) & np.uint8((1 << width) - 1)
    return values.reshape(*data.shape[:-1], -1)[..., :count]


def pack(codes: npt.NDArray[Any], bits: int) -> list[Bytes]:
    """Planes of non-negative codes < 2^bits, lowest bits of the code in the first (widest) plane."""
    planes: list[Bytes] = []
    rest = codes.astype(np.uint8 if bits <= 8 else np.uint16)
    for width in plane_widths(bits):
        planes.append(pack_plane(rest & ((1 << width) - 1), width))
        rest = rest >> width if width < 8 else rest
    return planes


def unpack(planes: list[Bytes], bits: int, count: int) -> Bytes:
    """The inverse of `pack`: uint8 codes [..., count]."""
    codes, shift = None, 0
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        part = unpack_plane(plane, width, count) << np.uint8(shift)
        codes, shift = part if codes is None else codes | part, shift + width
    assert codes is not None
    return codes
