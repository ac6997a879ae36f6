"""Kernels against backends/reference.py: bit for bit, for odd shapes, all widths, arrays at odd addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import tvm

from qcompiler.backends import reference
from qcompiler.backends.tvm import conv, float_matmul, layout, matmul
from qcompiler.backends.tvm.build import has_vnni, host_target
from qcompiler.backends.tvm.geometry import FlatFormat, Geometry
from qcompiler.formats import QTensor, parse_spec

DOTS = ["portable", *(["vnni"] if has_vnni(host_target()) else [])]


def compiled(*functions: Any) -> list[Any]:
    names = [str(f.attrs["global_symbol"]) for f in functions]
    module = tvm.compile(tvm.IRModule(dict(zip(names, functions, strict=True))), target=host_target())
    return [module[name] for name in names]


def shifted(array: np.ndarray) -> np.ndarray:
    """A copy that starts one element after a 64-byte boundary."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + array.itemsize
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def random_weight(rows: int, columns: int, text: str) -> QTensor:
    rng = np.random.default_rng(rows)
    spec = parse_spec(text)
    fmt: Any = spec.format
    grid = spec.granularity.grid(rows, columns)
    codes = rng.integers(fmt.lo, fmt.hi + 1, (rows, columns)).astype(fmt.dtype)
    scale = (rng.integers(1, 128, grid).astype(np.float32) / np.float32(1024)).astype(
        np.float32
    )  # exact in every scale dtype
    zero = None if spec.symmetric else rng.integers(fmt.lo, fmt.hi + 1, grid).astype(np.float32)
    return QTensor(spec, codes, scale, zero)


PRODUCTS = [
    (1, 16, 64, "uint4-asym-g32-fp16"),
    (9, 37, 75, "uint3-asym-g32-bf16"),
    (17, 20, 40, "int5-sym-g20-fp32"),
    (3, 5, 7, "uint7-asym-g64-fp16"),
    (11, 33, 100, "uint2-asym-g16-fp16"),
    (10, 50, 100, "int6-asym-g48-fp16"),
    (12, 48, 130, "int8-sym-channel-fp32"),
    (2, 17, 33, "uint8-asym-tensor-fp16"),
]


@pytest.mark.parametrize(("m", "rows", "columns", "spec"), PRODUCTS)
def test_products_and_gathers_equal_the_reference(m: int, rows: int, columns: int, spec: str) -> None:
    weight = random_weight(rows, columns, spec)
    t = layout.tiling_of(weight)
    arrays = [shifted(a) for a in layout.tile(weight, t).values()]
    functions = [matmul.quantize_rows("rows", t), matmul.gather("gather", t)]
    run_rows, run_gather, *run = compiled(*functions, *(matmul.matmul(dot, t, dot) for dot in DOTS))  # type: ignore[arg-type]
    x = (np.random.default_rng(m).standard_normal((m, columns)) * 3).astype(np.float32)
    x[m // 2] = 0
    codes, scales = np.zeros((m, t.words * 4), np.int8), np.zeros(m, np.float32)
    sums = np.zeros((m, t.groups), np.int32)
    run_rows(shifted(x), codes, scales, sums)
    expected_codes, expected_scales = reference.quantize_rows(x)
    assert np.array_equal(scales, expected_scales[:, 0])
    parts = [expected_codes[:, g : g + t.group] for g in range(0, columns, t.group)]
    for g, part in enumerate(parts):
        assert np.array_equal(codes[:, g * t.padded : g * t.padded + part.shape[1]], part)
    expected = reference.group_matmul(expected_codes, expected_scales, weight)
    for dot, product in zip(DOTS, run, strict=True):
        y = shifted(np.zeros((m, rows), np.float32))
        product(codes, scales, sums, *arrays, y)
        assert np.array_equal(y, expected), dot
    indices, table = np.array([0, rows - 1, -1, rows // 2]), np.zeros((4, columns), np.float32)
    run_gather(indices, *arrays, table)
    assert np.array_equal(table, weight.decode()[indices])
    with pytest.raises(RuntimeError, match="outside the embedding table"):
        run_gather(indices + rows, *arrays, table)


@pytest.mark.parametrize(("limit", "clip"), [(7, 0.9), (3, 1.0), (127, 0.5)])
def test_rows_of_other_widths_equal_the_reference(limit: int, clip: float) -> None:
    m, rows, columns, spec = PRODUCTS[4]
    weight = random_weight(rows, columns, spec)
    t = layout.tiling_of(weight)
    quantize, product = compiled(matmul.quantize_rows("rows", t, limit, clip), matmul.matmul("product", t, "portable"))
    x = (np.random.default_rng(m).standard_normal((m, columns)) * 3).astype(np.float32)
    x[m // 2] = 0
    codes, scales = np.zeros((m, t.words * 4), np.int8), np.zeros(m, np.float32)
    sums, y = np.zeros((m, t.groups), np.int32), np.zeros((m, rows), np.float32)
    quantize(x, codes, scales, sums)
    expected_codes, expected_scales = reference.quantize_rows(x, limit, clip)
    assert np.array_equal(scales, expected_scales[:, 0])
    assert np.abs(codes).max() == limit
    product(codes, scales, sums, *layout.tile(weight, t).values(), y)
    assert np.array_equal(y, reference.group_matmul(expected_codes, expected_scales, weight))


@pytest.mark.parametrize("case", [PRODUCTS[1], PRODUCTS[4]])
def test_float_activations_keep_float_precision(case: tuple[int, int, int, str]) -> None:
    m, rows, columns, spec = case
    weight = random_weight(rows, columns, spec)
    t = layout.tiling_of(weight)
    pad, product = compiled(matmul.pad_rows("pad", t), matmul.matmul("product", t, "float"))
    x = np.random.default_rng(0).standard_normal((m, columns)).astype(np.float32)
    padded, y = np.zeros((m, t.words * 4), np.float32), np.zeros((m, rows), np.float32)
    pad(x, padded)
    product(padded, *layout.tile(weight, t).values(), y)
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.decode().T.astype(np.float64), rtol=2e-5, atol=2e-5)


CONVOLUTIONS = [
    # channels, rows, groups, kernel, strides, dilations, pads, spec
    (3, 24, 1, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), "int4-sym-channel-fp16"),
    (20, 37, 1, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), "uint3-asym-channel-bf16"),
    (4, 5, 1, (3, 5), (1, 2), (2, 1), (1, 0, 2, 1), "int8-sym-channel-fp32"),
    (7, 7, 7, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), "int5-sym-channel-fp16"),
    (6, 9, 3, (3, 2), (1, 1), (1, 2), (1, 1, 1, 1), "uint7-asym-channel-fp16"),
]


@pytest.mark.parametrize(("channels", "rows", "groups", "kernel", "strides", "dilations", "pads", "spec"), CONVOLUTIONS)
def test_integer_convolutions_equal_the_reference(
    channels: int, rows: int, groups: int, kernel: tuple[int, int], strides: tuple[int, int],
    dilations: tuple[int, int], pads: tuple[int, int, int, int], spec: str,
) -> None:  # fmt: skip
    geometry = Geometry(channels, rows, groups, kernel, strides, dilations, pads[:2])
    weight = random_weight(rows, geometry.columns, spec)
    if groups == 1:
        t = layout.tiling_of(weight)
        arrays = layout.tile(weight, t, row_sums=True)
        functions = [conv.dense(dot, geometry, t, dot) for dot in DOTS]  # type: ignore[arg-type]
    else:
        arrays = layout.flat(weight)
        fmt = FlatFormat(weight.spec.bits, 1, geometry.columns, weight.zero is not None, weight.spec.scale_dtype)
        functions = [conv.grouped("grouped", geometry, fmt, True)]
    x = np.random.default_rng(1).integers(0, 256, (2, channels, 17, 21)).astype(np.uint8)
    scale, zero = np.array([0.03], np.float32), np.array([77], np.int32)
    middle = 0 if spec.startswith("int") else 1 << (weight.spec.bits - 1)
    integers = weight.codes.astype(np.int64) - (middle if weight.zero is None else weight.zero.astype(np.int64))
    shape = (rows, channels // groups, *kernel)
    sums = reference.conv(x, integers.reshape(shape), 77, strides, pads, dilations, groups)
    expected = sums.astype(np.float32) * weight.scale.reshape(1, -1, 1, 1) * scale[0]
    for run in compiled(*functions):
        y = shifted(np.zeros(expected.shape, np.float32))
        run(shifted(x), scale, zero, *(shifted(a) for a in arrays.values()), y)
        assert np.array_equal(y, expected)


def test_weight_only_convolutions_take_scales_per_group() -> None:
    for groups, spec in ((1, "uint4-asym-g16-fp16"), (3, "uint3-asym-g5-fp16")):
        geometry = Geometry(6, 9, groups, (3, 3), (1, 1), (1, 1), (1, 1))
        weight = random_weight(9, geometry.columns, spec)
        size = weight.spec.granularity.group_size(geometry.columns)
        fmt = FlatFormat(weight.spec.bits, weight.scale.shape[1], size, True, "float16")
        t = layout.tiling_of(weight)
        dense = groups == 1
        function = conv.dense("c", geometry, t, "float") if dense else conv.grouped("c", geometry, fmt, False)
        arrays = layout.tile(weight, t) if dense else layout.flat(weight)
        integers = np.random.default_rng(2).integers(-3, 4, (1, 6, 5, 18))
        y = np.zeros((1, 9, 5, 18), np.float32)
        compiled(function)[0](integers.astype(np.float32), *arrays.values(), y)
        scaled = np.rint(weight.decode() * 1024).astype(np.int64).reshape(9, 6 // groups, 3, 3)
        expected = reference.conv(integers, scaled, pads=(1, 1, 1, 1), groups=groups) / 1024
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 7, 5), (6, 64, 64), (17, 33, 70)])
def test_products_of_two_activations(m: int, k: int, n: int) -> None:
    (run,) = compiled(float_matmul.float_matmul("product"))
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, m, k)).astype(np.float32), rng.standard_normal((2, k, n)).astype(np.float32)
    y = shifted(np.zeros((2, m, n), np.float32))
    run(shifted(a), shifted(b), y)
    np.testing.assert_allclose(y, a.astype(np.float64) @ b, rtol=1e-5, atol=1e-5)
