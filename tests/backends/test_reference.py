"""The integer semantics against exact arithmetic and against ONNX Runtime's own operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.backends import reference
from qcompiler.formats import QTensor, parse_spec
from qcompiler.formats.fit import quantize

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(1)


def onnx_op(op: str, inputs: list[Array], **attributes: Any) -> Array:
    """One ONNX operator, run by ONNX Runtime without optimisation."""
    values = [ir.val(f"i{n}", const_value=ir.tensor(a, name=f"i{n}")) for n, a in enumerate(inputs)]
    node = ir.node(op, values, attributes)
    node.outputs[0].name = "y"
    node.outputs[0].dtype = ir.DataType.INT32 if op.endswith("Integer") else ir.DataType.UINT8
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="g")
    return np.asarray(
        ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()).run(None, {})[0]
    )


def test_static_codes_are_those_of_quantize_linear_with_ties_to_even() -> None:
    x = np.concatenate([RNG.standard_normal(1000) * 40, np.arange(-300, 300) / 2]).astype(np.float32)
    for scale, zero in ((1.0, 128), (0.37, 3), (1.0, 0)):
        codes = reference.quantize(x, scale, zero)
        want = onnx_op("QuantizeLinear", [x, np.asarray(scale, np.float32), np.asarray(zero, np.uint8)])
        np.testing.assert_array_equal(codes, want)
        inside = (codes > 0) & (codes < 255)
        assert np.abs(reference.dequantize(codes, scale, zero) - x)[inside].max() <= scale * 0.501


def test_row_codes_keep_the_largest_magnitude_and_rows_of_zeros() -> None:
    x = RNG.standard_normal((3, 5, 16)).astype(np.float32)
    x[1, 2] = 0
    codes, scale = reference.quantize_rows(x)
    assert codes.dtype == np.int8
    assert scale.shape == (3, 5, 1)
    assert scale[1, 2, 0] == 1
    assert not codes[1, 2].any()
    reach = np.abs(codes.astype(int)).max(-1)
    assert set(np.unique(reach)) == {0, 127}
    assert np.abs(codes * scale - x).max() <= scale.max() * 0.5001


@pytest.mark.parametrize("zero", [0, 7, 128, 255])
def test_matmul_is_matmul_integer(zero: int) -> None:
    a, w = RNG.integers(0, 256, (4, 37), np.uint8), RNG.integers(-128, 128, (6, 37), np.int8)
    want = onnx_op("MatMulInteger", [a, np.ascontiguousarray(w.T), np.asarray(zero, np.uint8)])
    np.testing.assert_array_equal(reference.matmul(a, w, zero), want)


@pytest.mark.parametrize(
    ("groups", "strides", "pads", "dilations"),
    [(1, (1, 1), (0, 0, 0, 0), (1, 1)), (6, (2, 1), (1, 0, 2, 1), (1, 1)), (2, (1, 2), (2, 2, 2, 2), (2, 1))],
)
def test_conv_is_conv_integer(
    groups: int, strides: tuple[int, int], pads: tuple[int, int, int, int], dilations: tuple[int, int]
) -> None:
    x = RNG.integers(0, 256, (2, 6, 9, 8), np.uint8)
    w = RNG.integers(0, 256, (12, 6 // groups, 3, 2), np.uint8)
    attributes = {"group": groups, "strides": strides, "pads": pads, "dilations": dilations}
    zeros = [np.asarray(9, np.uint8), np.asarray(100, np.uint8)]
    want = onnx_op("ConvInteger", [x, w, *zeros], **attributes)
    got = reference.conv(x, w.astype(np.int16) - 100, 9, strides, pads, dilations, groups)
    np.testing.assert_array_equal(got, want)


def test_sums_that_do_not_fit_are_an_error() -> None:
    a, w = np.full((1, 200_000), 127, np.int8), np.full((1, 200_000), 127, np.int8)
    with pytest.raises(OverflowError, match="int32"):
        reference.matmul(a, w)


@pytest.mark.parametrize(
    "text",
    [
        "uint4-asym-g16-fp16",
        "int8-sym-channel-fp16",
        "uint3-asym-g32-fp32",
        "uint4-sym-g16-fp32",
        "int4-sym-tensor-fp32",
    ],
)
def test_group_matmul_is_the_product_of_the_decoded_numbers(text: str) -> None:
    weight: QTensor = quantize(RNG.standard_normal((7, 40)).astype(np.float32), parse_spec(text), "minmax")
    x = RNG.standard_normal((3, 2, 40)).astype(np.float32)
    bias = RNG.standard_normal(7).astype(np.float32)
    codes, scale = reference.quantize_rows(x)
    got = reference.group_matmul(codes, scale, weight, bias)
    want = (codes * scale.astype(np.float64)) @ weight.decode().T.astype(np.float64) + bias
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_group_sums_are_integers_of_their_own_group() -> None:
    weight = quantize(RNG.standard_normal((4, 20)).astype(np.float32), parse_spec("uint5-asym-g8-fp16"), "minmax")
    a = RNG.integers(-127, 128, (3, 20), np.int8)
    sums = reference.group_sums(a, weight)
    assert sums.shape == (3, 4, 3)
    assert weight.zero is not None
    for g, part in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        centred = weight.codes[:, part].astype(int) - weight.zero[:, g : g + 1].astype(int)
        np.testing.assert_array_equal(sums[..., g], a[:, part].astype(int) @ centred.T)


@given(st.floats(1e-9, 0.999999), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_rescale_is_exact_rounding_half_up(multiplier: float, sums: list[int]) -> None:
    m0, n = reference.fixed_point(multiplier)
    assert 1 << 30 <= int(m0) <= (1 << 31) - 1
    exact = int(m0) / 2 ** (31 + int(n))
    assert abs(exact - multiplier) <= multiplier * 2**-30
    got = reference.rescale(np.array(sums, np.int64), m0, n)
    shift = 31 + int(n)
    want = [(s * int(m0) + (1 << (shift - 1))) >> shift for s in sums]  # Python's integers do not overflow
    np.testing.assert_array_equal(got, want)


def test_requantize_is_within_one_code_of_float_rounding_and_saturates() -> None:
    sums = RNG.integers(-(2**20), 2**20, 5000)
    m0, n = reference.fixed_point(np.float64(3.1e-4))
    codes = reference.requantize(sums, m0, n, 17)
    real = np.clip(np.rint(sums * 3.1e-4) + 17, 0, 255)
    assert np.abs(codes.astype(int) - real).max() <= 1
    assert (codes == real).mean() > 0.99
    assert codes.min() == 0
    assert codes.max() == 255


def test_multipliers_outside_the_unit_interval_are_refused() -> None:
    for bad in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            reference.fixed_point(bad)


def test_accumulator_bits_is_reached_and_never_exceeded() -> None:
    w = RNG.integers(-8, 8, (5, 33), np.int8)
    bits = reference.accumulator_bits(w, -127, 127)
    worst = max(abs(int(s)) for row in w for s in [np.abs(row.astype(int)).sum() * 127])
    assert worst <= (1 << (bits - 1)) - 1
    assert worst > (1 << (bits - 2)) - 1
    assert reference.accumulator_bits(np.array([[1, -1]], np.int8), 0, 255) == 9  # -255 ... 255


def test_bias_lies_on_the_accumulator_scale() -> None:
    bias, scale = np.array([1.0, -2.5, 1e9], np.float32), np.array([0.5, 1.0, 1e-3], np.float32)
    np.testing.assert_array_equal(reference.quantize_bias(bias, scale), [2, -2, 2**31 - 1])
