"""Kernels of matrix products with packed weights: quantize rows, multiply, gather rows."""

from __future__ import annotations

from qcompiler.backends.tvm.lanes import Expr, argument, as_float, get, ints, lanes, put, register, spread
from qcompiler.backends.tvm.layout import LANES, QUAD, Tiling
from qcompiler.backends.tvm.panel import (
    Dot,
    Panel,
    Weights,
    multiply,
    tiles_at_once,
    weight_arguments,
    zero_of,
)  # fmt: skip
from qcompiler.backends.tvm.tvm_api import B, IRBuilder, PrimFunc, T, Var
from qcompiler.formats.packing import plane_widths

ROWS_AT_ONCE: dict[str, int] = {"vnni": 8, "portable": 4, "float": 4}


def begin(name: str) -> None:
    """Name the function being built; its buffers never overlap."""
    B.func_name(name)
    B.func_attr({"global_symbol": name, "tirx.noalias": True})


def quantize_rows(name: str, t: Tiling, limit: int = 127, clip: float = 1.0) -> PrimFunc:
    """Quantize x float32 [m, columns] to codes int8 [m, words * 4], scales float32 [m], sums int32 [m, groups].

    scale = clip * max|x| / limit (a row of zeros: 1); code = rint(x / scale) within +-limit, half to even. Padding
    columns get code 0; sums are the sums of a group's codes.
    """
    rows = Var("m", "int64")
    with IRBuilder() as ib, B.prim_func():
        begin(name)
        x = argument("x", (rows, t.columns), "float32")
        codes = argument("codes", (rows, t.words * QUAD), "int8")
        scales = argument("scales", (rows,), "float32")
        sums = argument("sums", (rows, t.groups), "int32")
        with B.parallel(rows) as m:
            _row_scale(x, scales, m, t.columns, limit, clip)
            full = t.columns // t.group
            if full:
                with B.serial(full) as group:
                    _quantize_group(x, codes, scales, sums, m, group, t, t.group, limit)
            if t.columns % t.group:
                _quantize_group(x, codes, scales, sums, m, full, t, t.columns % t.group, limit)
    return ib.get()


def _row_scale(x: Expr, scales: Expr, m: Expr, columns: int, limit: int, clip: float) -> None:
    most, reach = register("float32"), B.alloc_buffer((1,), "float32")
    put(most, spread(B.float32(0)))
    if columns >= LANES:
        with B.serial(columns // LANES) as k:
            value = x[m, lanes(k * LANES)]
            put(most, T.max(get(most), T.max(value, spread(B.float32(0)) - value)))
    B.buffer_store(reach, B.float32(0), [0])
    with B.serial(LANES) as lane:
        B.buffer_store(reach, T.max(reach[0], most[lane]), [0])
    with B.serial(columns % LANES) as k:
        value = x[m, columns // LANES * LANES + k]
        B.buffer_store(reach, T.max(reach[0], T.max(value, B.float32(0) - value)), [0])
    kept = reach[0] if clip == 1 else reach[0] * B.float32(clip)
    step = kept / B.float32(limit)
    B.buffer_store(scales, T.Select(step > B.float32(0), step, B.float32(1)), [m])


def _quantize_group(
    x: Expr, codes: Expr, scales: Expr, sums: Expr, m: Expr, group: Expr, t: Tiling, valid: int, limit: int
) -> None:
    """One group of a row, of which `valid` columns exist."""
    source, target = group * t.group, group * t.padded
    total, lane_sums, code = B.alloc_buffer((1,), "int32"), register("int32"), register("int32")
    put(lane_sums, ints(0))
    B.buffer_store(total, B.int32(0), [0])
    with B.serial(valid // LANES) as k:
        ratio = T.nearbyint(x[m, lanes(source + k * LANES)] / spread(scales[m]))
        clipped = T.max(T.min(ratio, spread(B.float32(limit))), spread(B.float32(-limit)))
        put(code, B.cast(clipped, "int32x16"))
        put(lane_sums, get(lane_sums) + get(code))
        B.buffer_store(codes, B.cast(get(code), "int8x16"), [m, lanes(target + k * LANES)])
    with B.serial(valid % LANES) as k:
        column = valid // LANES * LANES + k
        ratio = T.nearbyint(x[m, source + column] / scales[m])
        one = B.cast(T.max(T.min(ratio, B.float32(limit)), B.float32(-limit)), "int32")
        B.buffer_store(total, total[0] + one, [0])
        B.buffer_store(codes, B.cast(one, "int8"), [m, target + column])
    with B.serial(t.padded - valid) as k:
        B.buffer_store(codes, B.int8(0), [m, target + valid + k])
    with B.serial(LANES) as lane:
        B.buffer_store(total, total[0] + lane_sums[lane], [0])
    B.buffer_store(sums, total[0], [m, group])


def matmul(name: str, t: Tiling, dot: Dot) -> PrimFunc:
    """Activations times a packed weight -> float32 [m, rows].

    Arguments: codes, scales and sums of `quantize_rows` (or x float32 [m, words * 4], laid out by `pad_rows`,
    for dot "float"), the weight's arrays, the output.
    """
    count = Var("m", "int64")
    with IRBuilder() as ib, B.prim_func():
        begin(name)
        x = argument("x", (count, t.words * QUAD), "float32" if dot == "float" else "int8")
        if dot != "float":
            scales = argument("scales", (count,), "float32")
            sums = argument("row_sums", (count, t.groups), "int32")
        else:
            scales = sums = None
        w = weight_arguments(t, sums=False)
        y = argument("y", (count, t.rows), "float32")
        tiles, many = tiles_at_once(t), ROWS_AT_ONCE[dot]
        with B.parallel(t.tiles // tiles) as job:
            with B.serial(count // many) as block:
                _rows(Panel(dot, many, tiles), w, job * tiles, x, scales, sums, block * many, y)
            with B.serial(count % many) as rest:
                _rows(Panel(dot, 1, tiles), w, job * tiles, x, scales, sums, count // many * many + rest, y)
    return ib.get()


def _rows(
    panel: Panel, w: Weights, tile: Expr, x: Expr, scales: Expr | None, sums: Expr | None, row: Expr, y: Expr
) -> None:
    def start(m: int, at: Expr, group: Expr) -> Expr:
        assert sums is not None
        return ints(0) - spread(sums[row + m, group]) * zero_of(w, at, group)

    def finish(m: int, b: int, total: Expr) -> None:
        if scales is not None:
            put(total, get(total) * spread(scales[row + m]))
        store_row(y, row + m, (tile + b) * LANES, w.tiling.rows, total)

    multiply(panel, w, tile, lambda m, k: x[row + m, k], start, finish)


def store_row(y: Expr, row: Expr, column: Expr, columns: int, value: Expr) -> None:
    """y[row, column : column + 16] = value, without the columns that do not exist."""
    if columns % LANES == 0:
        B.buffer_store(y, get(value), [row, lanes(column)])
        return
    with B.If(column + LANES <= columns):
        with B.Then():
            B.buffer_store(y, get(value), [row, lanes(column)])
        with B.Else(), B.serial(columns % LANES) as lane:
            B.buffer_store(y, value[lane], [row, column + lane])


def pad_rows(name: str, t: Tiling) -> PrimFunc:
    """Copy x float32 [m, columns] to [m, words * 4], every group padded with zeros."""
    rows = Var("m", "int64")
    with IRBuilder() as ib, B.prim_func():
        begin(name)
        x = argument("x", (rows, t.columns), "float32")
        y = argument("y", (rows, t.words * QUAD), "float32")
        with B.parallel(rows) as m, B.serial(t.groups) as group, B.serial(t.padded) as k:
            column = group * t.group + k
            inside = T.And(k < t.group, column < t.columns)
            B.buffer_store(y, T.if_then_else(inside, x[m, column], B.float32(0)), [m, group * t.padded + k])
    return ib.get()


def gather(name: str, t: Tiling) -> PrimFunc:
    """Rows of a packed table: indices int64 [m], the weight's arrays -> float32 [m, columns].

    Negative indices count from the end; an index outside the table is an error, not a wild read.
    """
    count = Var("m", "int64")
    with IRBuilder() as ib, B.prim_func():
        begin(name)
        indices = argument("indices", (count,), "int64")
        w = weight_arguments(t, sums=False)
        y = argument("y", (count, t.columns), "float32")
        row = B.alloc_buffer((1,), "int64")
        with B.serial(count) as m:
            B.buffer_store(row, indices[m] + T.Select(indices[m] < 0, B.int64(t.rows), B.int64(0)), [0])
            with B.Assert(T.And(row[0] >= 0, row[0] < t.rows), "an index is outside the embedding table"):
                pass
            with B.serial(t.groups) as group:
                _gather_group(w, row[0], group, y, m)
    return ib.get()


def _gather_group(w: Weights, row: Expr, group: Expr, y: Expr, m: Expr) -> None:
    t = w.tiling
    tile, lane = row // LANES, row % LANES
    scale = as_float(w.scale[tile, group, lane], t.scale_dtype, vector=False)
    zero = B.int32(t.middle)
    if w.zero is not None:
        each = 8 // t.zero_bits
        byte = B.cast(w.zero[tile, group // each, lane], "int32")
        moved = T.shift_right(byte, B.cast(group % each * t.zero_bits, "int32"))
        zero = T.bitwise_and(moved, B.int32((1 << t.zero_bits) - 1))
    with B.serial(T.min(B.int64(t.group), t.columns - group * t.group)) as k:
        quad = group * (t.padded // QUAD) + k // QUAD
        code, shift = B.int32(0), 0
        for plane, width in zip(w.planes, plane_widths(t.bits), strict=True):
            quads = 8 // width
            byte = B.cast(plane[tile, quad // quads, lane * QUAD + k % QUAD], "int32")
            field = T.bitwise_and(T.shift_right(byte, B.cast(quad % quads * width, "int32")), (1 << width) - 1)
            code = T.bitwise_or(code, T.shift_left(field, B.int32(shift)))
            shift += width
        B.buffer_store(y, B.cast(code - zero, "float32") * scale, [m, group * t.group + k])
