"""Convolution kernels with packed weights, NCHW: dense ones as matrix products, grouped ones directly.

Both take activations as uint8 codes with a static scale and zero point (sums of products are then exact
integers) or as float32. The sizes of batch and picture are arguments of the kernel, so one kernel serves every
layer with the same weight format and geometry.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.backends.tvm.geometry import FlatFormat, Geometry
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
from qcompiler.backends.tvm.matmul import ROWS_AT_ONCE, begin
from qcompiler.backends.tvm.panel import Dot, Panel, Weights, multiply, tiles_at_once, weight_arguments, zero_of
from qcompiler.backends.tvm.tvm_api import B, IRBuilder, PrimFunc, T, Var
from qcompiler.formats.packing import plane_widths

STRIPE = 64  # output pixels that one job unfolds: its operand stays in the L2 cache
CENTER = 128  # uint8 codes minus this fit int8, the signed side of the dot product


@dataclass(frozen=True)
class _Call:
    """Arguments and sizes of a convolution being generated."""

    x: Expr
    y: Expr
    scale: Expr | None
    zero: Expr | None
    size: tuple[Expr, Expr]
    out: tuple[Expr, Expr]
    batch: Expr

    def outside(self) -> Expr:
        """What lies beyond the border: the code of zero, or zero."""
        return B.float32(0) if self.zero is None else B.cast(self.zero[0], "uint8")


def _data_arguments(geo: Geometry, quantized: bool) -> _Call:
    batch, height, width = Var("batch", "int64"), Var("height", "int64"), Var("width", "int64")
    x = argument("x", (batch, geo.channels, height, width), "uint8" if quantized else "float32")
    scale = argument("x_scale", (1,), "float32") if quantized else None
    zero = argument("x_zero", (1,), "int32") if quantized else None
    return _Call(x, None, scale, zero, (height, width), (Var("oh", "int64"), Var("ow", "int64")), batch)


def _with_output(call: _Call, geo: Geometry) -> _Call:
    y = argument("y", (call.batch, geo.rows, *call.out), "float32")
    return _Call(call.x, y, call.scale, call.zero, call.size, call.out, call.batch)


def dense(name: str, geo: Geometry, t: Tiling, dot: Dot) -> PrimFunc:
    """A convolution with one group: stripes of 64 output pixels are unfolded to rows and multiplied.

    Arguments: x, then (unless dot is "float") x_scale [1] and x_zero [1], the weight's arrays with sums, y.
    """
    with IRBuilder() as ib, B.prim_func():
        begin(name)
        call = _data_arguments(geo, dot != "float")
        w = weight_arguments(t, sums=dot != "float")
        call = _with_output(call, geo)
        pixels = call.out[0] * call.out[1]
        stripes = (pixels + (STRIPE - 1)) // STRIPE
        with B.parallel(call.batch * stripes) as job:
            image, first = job // stripes, job % stripes * STRIPE
            rows = B.alloc_buffer((STRIPE, t.words * QUAD), "float32" if dot == "float" else "int8")
            sums = B.alloc_buffer((STRIPE, t.groups), "int32")
            at = [B.alloc_buffer((STRIPE,), "int64") for _ in range(2)]
            _places(at, first, call)
            _unfold(call, geo, t, image, at, rows, sums)
            tiles, many = tiles_at_once(t), ROWS_AT_ONCE[dot]
            blocks = (T.min(pixels - first, B.int64(STRIPE)) + (many - 1)) // many
            with B.serial(t.tiles // tiles) as tile, B.serial(blocks) as block:
                panel = Panel(dot, many, tiles)
                _block(panel, w, call, geo, (image, tile * tiles, block * many), rows, sums, at)
    return ib.get()


def _places(at: list[Expr], first: Expr, call: _Call) -> None:
    """Row and column in the output of each pixel of a stripe; pixels past the end get row = height."""
    with B.serial(STRIPE) as p:
        B.buffer_store(at[0], T.min((first + p) // call.out[1], call.out[0]), [p])
        B.buffer_store(at[1], (first + p) % call.out[1], [p])


def _unfold(call: _Call, geo: Geometry, t: Tiling, image: Expr, at: list[Expr], rows: Expr, sums: Expr) -> None:
    """rows[p, k] = the inputs under the kernel at pixel p (codes minus 128); sums[p, g] = sum of (code - zero)."""
    quantized = call.zero is not None
    kh, kw = geo.kernel
    with B.serial(STRIPE) as p, B.serial(t.groups) as g:
        B.buffer_store(sums, B.int32(0), [p, g])
    if t.words * QUAD != t.columns:
        with B.serial(STRIPE) as p, B.serial(t.words * QUAD) as k:
            B.buffer_store(rows, B.int8(0) if quantized else B.float32(0), [p, k])
    with B.serial(geo.channels) as c, B.serial(kh) as i, B.serial(kw) as j, B.serial(STRIPE) as p:
        column = (c * kh + i) * kw + j
        h = at[0][p] * geo.strides[0] - geo.pads[0] + i * geo.dilations[0]
        v = at[1][p] * geo.strides[1] - geo.pads[1] + j * geo.dilations[1]
        exists = at[0][p] < call.out[0]
        inside = T.And(T.And(T.And(h >= 0, h < call.size[0]), T.And(v >= 0, v < call.size[1])), exists)
        value = T.if_then_else(inside, call.x[image, c, h, v], call.outside())
        group = column // t.group
        place = [p, group * t.padded + column % t.group]
        if call.zero is None:
            B.buffer_store(rows, value, place)
        else:
            B.buffer_store(rows, B.cast(B.cast(value, "int32") - CENTER, "int8"), place)
            stored = B.cast(rows[p, place[1]], "int32") + CENTER - call.zero[0]
            B.buffer_store(sums, sums[p, group] + stored, [p, group])


def _block(
    panel: Panel, w: Weights, call: _Call, geo: Geometry,
    where: tuple[Expr, Expr, Expr], rows: Expr, sums: Expr, at: list[Expr],
) -> None:  # fmt: skip
    image, tile, pixel = where

    def start(m: int, of: Expr, group: Expr) -> Expr:
        assert call.zero is not None
        assert w.sums is not None
        codes = spread(call.zero[0] - CENTER) * w.sums[of, group, lanes()]
        return ints(0) - spread(sums[pixel + m, group]) * zero_of(w, of, group) - codes

    def finish(m: int, b: int, total: Expr) -> None:
        if call.scale is not None:
            put(total, get(total) * spread(call.scale[0]))
        row = (tile + b) * LANES
        with B.If(at[0][pixel + m] < call.out[0]), B.Then(), B.serial(T.min(LANES, geo.rows - row)) as lane:
            B.buffer_store(call.y, total[lane], [image, row + lane, at[0][pixel + m], at[1][pixel + m]])

    multiply(panel, w, tile, lambda m, k: rows[pixel + m, k], start, finish)


def grouped(name: str, geo: Geometry, fmt: FlatFormat, quantized: bool) -> PrimFunc:
    """A grouped or depthwise convolution, one output channel a job, 16 pixels of a line at a time.

    Arguments: x, then (if quantized) x_scale [1] and x_zero [1], the weight's arrays (`layout.flat`), y.
    Quantized activations need one scale a row (fmt.groups == 1).
    """
    kind = "int32" if quantized else "float32"
    with IRBuilder() as ib, B.prim_func():
        begin(name)
        call = _data_arguments(geo, quantized)
        count = geo.rows * geo.columns
        planes = [argument(f"plane{i}", (-(-count * p // 8),), "uint8") for i, p in enumerate(plane_widths(fmt.bits))]
        scale = argument("scale", (geo.rows, fmt.groups), buffer_dtype(fmt.scale_dtype))
        zero = argument("zero", (geo.rows, fmt.groups), "uint8") if fmt.zeros else None
        call = _with_output(call, geo)
        (sh, sw), (kh, kw), (dh, dw) = geo.strides, geo.kernel, geo.dilations
        lines = (call.out[0] - 1) * sh + (kh - 1) * dh + 1
        length = ((call.out[1] + (LANES - 1)) // LANES * LANES - 1) * sw + (kw - 1) * dw + 1
        deep = geo.channels // geo.groups
        with B.parallel(call.batch * geo.rows) as job:
            image, row = job // geo.rows, job % geo.rows
            weights = B.alloc_buffer((geo.columns,), kind)
            total, factor = B.alloc_buffer((1,), kind), B.alloc_buffer((1,), "float32")
            _decode(planes, scale, zero, row, geo, fmt, quantized, weights, total, factor)
            padded = B.alloc_buffer((deep, lines, length), "uint8" if quantized else "float32")
            _pad(call, geo, image, row // (geo.rows // geo.groups) * deep, padded, (deep, lines, length))
            if call.zero is not None and call.scale is not None:
                B.buffer_store(total, B.int32(0) - total[0] * call.zero[0], [0])
            with B.serial(call.out[0]) as h, B.serial((call.out[1] + (LANES - 1)) // LANES) as block:
                part = register(kind)
                put(part, spread(total[0]))
                with B.serial(deep) as c, B.serial(kh) as i, B.serial(kw) as j:
                    value = padded[c, h * sh + i * dh, lanes(block * LANES * sw + j * dw, sw)]
                    weight = weights[(c * kh + i) * kw + j]
                    put(part, get(part) + B.cast(value, f"{kind}x16") * spread(weight))
                result = register("float32")
                put(result, B.cast(get(part), "float32x16") * spread(factor[0]))
                if call.scale is not None:
                    put(result, get(result) * spread(call.scale[0]))
                with B.serial(T.min(B.int64(LANES), call.out[1] - block * LANES)) as lane:
                    B.buffer_store(call.y, result[lane], [image, row, h, block * LANES + lane])
    return ib.get()


def _decode(
    planes: list[Expr], scale: Expr, zero: Expr | None, row: Expr, geo: Geometry, fmt: FlatFormat,
    quantized: bool, weights: Expr, total: Expr, factor: Expr,
) -> None:  # fmt: skip
    """The weights of one output channel: integers with their sum and scale, or floats (sum 0, scale 1)."""
    number = B.int32 if quantized else B.float32
    B.buffer_store(total, number(0), [0])
    one = as_float(scale[row, 0], fmt.scale_dtype, vector=False) if quantized else B.float32(1)
    B.buffer_store(factor, one, [0])
    with B.serial(geo.columns) as k:
        code, shift, element = B.int32(0), 0, B.cast(row, "int64") * geo.columns + k
        for plane, width in zip(planes, plane_widths(fmt.bits), strict=True):
            each = 8 // width
            byte = B.cast(plane[element // each], "int32")
            field = T.bitwise_and(T.shift_right(byte, B.cast(element % each * width, "int32")), (1 << width) - 1)
            code = T.bitwise_or(code, T.shift_left(field, B.int32(shift)))
            shift += width
        group = k // fmt.group
        middle = 1 << (fmt.bits - 1)
        value = code - (B.int32(middle) if zero is None else B.cast(zero[row, group], "int32"))
        if quantized:
            B.buffer_store(weights, value, [k])
            B.buffer_store(total, total[0] + weights[k], [0])
        else:
            each_scale = as_float(scale[row, group], fmt.scale_dtype, vector=False)
            B.buffer_store(weights, B.cast(value, "float32") * each_scale, [k])


def _pad(call: _Call, geo: Geometry, image: Expr, channel: Expr, padded: Expr, shape: tuple[int, Expr, Expr]) -> None:
    """Copy the channels of one group with a border, so that the inner loops need no tests."""
    with B.serial(shape[0]) as c, B.serial(shape[1]) as i, B.serial(shape[2]) as j:
        h, v = i - geo.pads[0], j - geo.pads[1]
        inside = T.And(T.And(h >= 0, h < call.size[0]), T.And(v >= 0, v < call.size[1]))
        B.buffer_store(padded, T.if_then_else(inside, call.x[image, channel + c, h, v], call.outside()), [c, i, j])
