"""Which matrices get float32 scales, and that fits do not depend on the size of the numbers."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.formats import parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.formats.scales import magnitude, with_scales_that_fit

HALF = [
    parse_spec(t) for t in ("int8-sym-channel-fp16", "uint4-asym-g32-fp16", "uint2-asym-g32-fp16", "int8-sym-tensor")
]


def matrix() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((12, 80)).astype(np.float32)


def dtypes(w: np.ndarray) -> set[str]:
    return {spec.scale_dtype for spec in with_scales_that_fit(w.astype(np.float32), HALF)}


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e-7, 1e12, 1e30])
def test_what_float16_cannot_hold_gets_float32(factor: float) -> None:
    assert dtypes(matrix() * factor) == {"float32"}


@pytest.mark.parametrize("factor", [1e-2, 1, 1e4])
def test_what_float16_can_hold_keeps_it(factor: float) -> None:
    assert dtypes(matrix() * factor) == {"float16"}


def test_only_the_widths_that_need_it_change() -> None:
    w = matrix() * np.float32(2e-4)  # 8 bits want steps of 4e-6, 2 bits steps of 2e-4
    assert [s.scale_dtype for s in with_scales_that_fit(w, HALF)][::2] == ["float32", "float16"]


def test_zeros_and_negligible_rows_ask_for_nothing() -> None:
    w = matrix()
    w[3], w[5, :32], w[7] = 0, 0, w[7] * 1e-9
    assert dtypes(w) == {"float16"}
    assert dtypes(np.zeros((4, 64))) == {"float16"}
    w[:6] *= 1e-9  # still nothing beside the rest of the matrix
    assert dtypes(w) == {"float16"}


def test_other_scale_dtypes_stay() -> None:
    specs = [parse_spec("int8-sym-channel-fp32"), parse_spec("int4-sym-g32-bf16")]
    assert with_scales_that_fit(matrix() * np.float32(1e-30), specs) == specs


@pytest.mark.parametrize("text", ["int4-sym-channel-fp32", "uint3-asym-g32-fp32", "int4-sym-g32-bf16"])
@pytest.mark.parametrize("power", [-90, 90])
def test_a_power_of_two_changes_no_code(text: str, power: int) -> None:
    w, factor = matrix(), np.float32(2.0**power)
    with np.errstate(all="raise"):
        plain, other = (quantize(m, parse_spec(text)) for m in (w, w * factor))
    assert np.array_equal(plain.codes, other.codes)
    assert np.array_equal(plain.scale * factor, other.scale)


def test_magnitude_is_a_power_of_two_that_can_be_divided_by() -> None:
    assert magnitude(np.array([0.7, -3.0], np.float32)) == 4
    assert magnitude(np.zeros(3, np.float32)) == 1
    assert magnitude(np.zeros(0, np.float32)) == 1
    for number in (np.finfo(np.float32).max, np.finfo(np.float32).tiny, np.float32(1e-45)):
        with np.errstate(over="raise", invalid="raise"):
            assert 0 < number / magnitude(np.array([number])) < 8
