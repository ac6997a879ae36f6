"""The inner part of every matrix kernel: a few rows of activations times a few tiles of packed weights.

Everything here is straight-line code for one `Tiling`: unpack a 64-byte word of each plane, combine the planes
to codes, take dot products of quads, scale once a group. Three kinds of dot products share it:

    vnni      int8 activations, one `vpdpbusd` a quad (AVX-512 VNNI); the weights are the unsigned side
    portable  int8 activations, shifts and multiplies that LLVM maps to any vector unit
    float     float32 activations, codes become float in registers

The integer sums are exact, hence the same for vnni and portable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qcompiler.backends.tvm.lanes import (
    Expr,
    argument,
    as_float,
    buffer_dtype,
    get,
    ints,
    lanes,
    put,
    register,
    spread,
)  # fmt: skip
from qcompiler.backends.tvm.layout import LANES, QUAD, Tiling
from qcompiler.backends.tvm.tvm_api import B, T
from qcompiler.formats.packing import plane_widths

Dot = Literal["vnni", "portable", "float"]
WORD = LANES * QUAD


@dataclass(frozen=True)
class Weights:
    """The buffers of one tiled weight, as kernel arguments."""

    tiling: Tiling
    planes: list[Expr]
    scale: Expr
    zero: Expr | None
    sums: Expr | None


@dataclass(frozen=True)
class Panel:
    """Register blocking: `rows` rows of activations times `tiles` tiles of weights."""

    dot: Dot
    rows: int
    tiles: int


def weight_arguments(t: Tiling, sums: bool) -> Weights:
    """Declare the arguments of a tiled weight, in the order of `layout.tile`."""
    planes = [
        argument(f"plane{i}", (t.tiles, t.words * width // 8, WORD), "uint8")
        for i, width in enumerate(plane_widths(t.bits))
    ]
    grid = (t.tiles, t.groups, LANES)
    scale = argument("scale", grid, buffer_dtype(t.scale_dtype))
    zero = argument("zero", (t.tiles, -(-t.groups * t.zero_bits // 8), LANES), "uint8") if t.zeros else None
    return Weights(t, planes, scale, zero, argument("sums", grid, "int32") if sums else None)


def tiles_at_once(t: Tiling, most: int = 2) -> int:
    """Tiles that one panel takes: divides the tiles of the weight."""
    return next(n for n in range(most, 0, -1) if t.tiles % n == 0)


def zero_of(w: Weights, tile: Expr, group: Expr) -> Expr:
    """Zero points of 16 rows as int32 lanes."""
    if w.zero is None:
        return ints(w.tiling.middle)
    each = 8 // w.tiling.zero_bits
    byte = B.cast(w.zero[tile, group // each, lanes()], "int32x16")
    if each == 1:
        return byte
    moved = T.shift_right(byte, spread(B.cast(group % each * w.tiling.zero_bits, "int32")))
    return T.bitwise_and(moved, ints((1 << w.tiling.zero_bits) - 1))


def multiply(
    panel: Panel,
    w: Weights,
    first_tile: Expr,
    activations: Callable[[int, Expr], Expr],
    start: Callable[[int, Expr, Expr], Expr],
    finish: Callable[[int, int, Expr], None],
) -> None:
    """Emit a panel.

    Args:
        panel: the blocking.
        w: the weight.
        first_tile: index of the first tile.
        activations: (row of the panel, column in the padded layout) -> int8 or float32 scalar.
        start: (row of the panel, tile, group) -> int32 lanes with which the group's sum starts (the zero point
            corrections); not called for float.
        finish: (row of the panel, tile of the panel, register float32) stores a result.
    """
    t, pairs = w.tiling, [(m, b) for m in range(panel.rows) for b in range(panel.tiles)]
    total = {key: register("float32") for key in pairs}
    part = {key: register("float32" if panel.dot == "float" else "int32") for key in pairs}
    words = [[register("int32") for _ in w.planes] for _ in range(panel.tiles)]
    codes = [register("int32") for _ in range(panel.tiles)]
    zeros = [register("int32") for _ in range(panel.tiles)]
    for key in pairs:
        put(total[key], spread(B.float32(0)))
    with B.serial(t.groups) as group:
        for b in range(panel.tiles):
            if panel.dot == "float":
                put(zeros[b], zero_of(w, first_tile + b, group))
        for m, b in pairs:
            zero = spread(B.float32(0)) if panel.dot == "float" else start(m, first_tile + b, group)
            put(part[m, b], zero)
        with B.serial(t.padded // QUAD // t.step) as at:
            word = group * (t.padded // QUAD // t.step) + at
            for quad in range(t.step):
                for b in range(panel.tiles):
                    put(codes[b], _codes(w, words[b], first_tile + b, word, quad))
                for m in range(panel.rows):
                    column = (word * t.step + quad) * QUAD
                    _dot(panel, part, codes, zeros, m, column, activations)
        for m, b in pairs:
            scale = as_float(w.scale[first_tile + b, group, lanes()], t.scale_dtype)
            put(total[m, b], get(total[m, b]) + B.cast(get(part[m, b]), "float32x16") * scale)
    for m, b in pairs:
        finish(m, b, total[m, b])


def _codes(w: Weights, words: list[Expr], tile: Expr, word: Expr, quad: int) -> Expr:
    """Codes of one quad of 16 rows: int32 lanes, a code a byte. Loads a plane's word when its first quad comes."""
    value, shift = None, 0
    for plane, width, raw in zip(w.planes, plane_widths(w.tiling.bits), words, strict=True):
        quads = 8 // width
        if quad % quads == 0:
            index = word * (w.tiling.step // quads) + quad // quads
            put(raw, T.reinterpret(plane[tile, index, B.ramp(0, 1, WORD)], dtype="int32x16"))
        field, move = get(raw), quad % quads * width - shift
        if move:
            field = T.shift_right(field, ints(move)) if move > 0 else T.shift_left(field, ints(-move))
        if width < 8:
            field = T.bitwise_and(field, ints((((1 << width) - 1) << shift) * 0x01010101))
        value = field if value is None else T.bitwise_or(value, field)
        shift += width
    return value


def _dot(
    panel: Panel,
    part: dict[tuple[int, int], Expr],
    codes: list[Expr],
    zeros: list[Expr],
    m: int,
    column: Expr,
    activations: Callable[[int, Expr], Expr],
) -> None:
    """part[m, b] += codes of a quad times four activations, for every tile of the panel."""
    if panel.dot == "vnni":
        four = B.alloc_buffer((1,), "int32")
        B.buffer_store(four, T.reinterpret(activations(m, B.ramp(column, 1, QUAD)), dtype="int32"), [0])
        for b, code in enumerate(codes):
            put(part[m, b], _vpdpbusd(get(part[m, b]), get(code), spread(four[0])))
        return
    for k in range(QUAD):
        one = activations(m, column + k)
        for b, code in enumerate(codes):
            byte = T.bitwise_and(T.shift_right(get(code), ints(8 * k)), ints(255))
            if panel.dot == "float":
                value = B.cast(byte - get(zeros[b]), "float32x16") * spread(one)
            else:
                value = byte * spread(B.cast(one, "int32"))
            put(part[m, b], get(part[m, b]) + value)


def _vpdpbusd(total: Expr, unsigned: Expr, signed: Expr) -> Expr:
    name = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512")
    sides = (T.reinterpret(unsigned, dtype="int8x64"), T.reinterpret(signed, dtype="int8x64"))
    return T.call_llvm_pure_intrin(name, total, *sides, dtype="int32x16")
