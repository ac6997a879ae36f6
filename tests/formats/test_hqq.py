"""Half-quadratic fitting: its own error falls, and it starts where min-max is."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.formats import QuantSpec, parse_spec, round_scale
from qcompiler.formats.fit import fit, quantize
from qcompiler.formats.hqq import POWER, half_quadratic, power_error

RNG = np.random.default_rng(11)
SPECS = ["uint2-asym-channel-fp16", "uint3-asym-channel-fp32", "int4-asym-channel-fp16", "int3-sym-channel-bf16"]
Grid = tuple[np.ndarray, np.ndarray]


def minmax(w: np.ndarray, spec: QuantSpec) -> Grid:
    scale, zero = spec.format.fit(w.min(1, keepdims=True), w.max(1, keepdims=True), spec.symmetric)
    return round_scale(scale, spec.scale_dtype), np.zeros_like(scale) if zero is None else zero


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_never_rises_from_one_iteration_to_the_next(name: str, weighted: bool) -> None:
    spec = parse_spec(name)
    w = RNG.standard_t(3, (40, 64)).astype(np.float32)
    weight = RNG.uniform(0, 2, w.shape).astype(np.float32) if weighted else None
    start, last = minmax(w, spec), np.full((40, 1), np.inf)
    errors = []
    for iterations in (0, 1, 2, 5, 10, 20):
        scale, zero = half_quadratic(w, weight, spec, *start, iterations)
        error = power_error(w, weight, spec, scale, zero)
        assert (error <= last).all()
        last = error
        errors.append(float(error.sum()))
    assert errors[-1] < 0.98 * errors[0]  # and it does fall


@pytest.mark.parametrize("name", SPECS)
def test_no_iterations_is_minmax(name: str) -> None:
    spec = parse_spec(name)
    w = RNG.standard_normal((6, 32)).astype(np.float32)
    start = minmax(w, spec)
    scale, zero = half_quadratic(w, None, spec, *start, 0)
    np.testing.assert_array_equal(scale, start[0])
    np.testing.assert_array_equal(zero, start[1])


def test_few_weights_may_be_far_off_where_squares_forbid_it() -> None:
    w = RNG.standard_normal((200, 64)).astype(np.float32)
    w[:, 0] = 12
    spec = parse_spec("int4-sym-channel-fp16")
    hqq, mse = quantize(w, spec, "hqq").decode(), quantize(w, spec, "mse").decode()
    rest = np.s_[:, 1:]
    assert np.abs(hqq - w)[rest].mean() < np.abs(mse - w)[rest].mean()
    assert (np.abs(hqq - w) ** POWER).sum() < (np.abs(mse - w) ** POWER).sum()


def test_weights_twice_as_large_get_the_same_codes() -> None:
    w = RNG.standard_t(4, (16, 64)).astype(np.float32)
    one, two = (quantize(w * np.float32(f), parse_spec("uint3-asym-g32-fp32"), "hqq") for f in (1, 2.0**30))
    np.testing.assert_array_equal(one.codes, two.codes)


def test_importance_counts() -> None:
    w = RNG.standard_normal((8, 64)).astype(np.float32)
    importance = np.where(np.arange(64) < 8, 10, 1e-3).astype(np.float32)
    spec = parse_spec("int3-sym-channel-fp32")
    plain, weighted = (quantize(w, spec, "hqq", i).decode() - w for i in (None, importance))
    assert (np.abs(weighted) ** POWER * importance).sum() < (np.abs(plain) ** POWER * importance).sum()


@pytest.mark.parametrize("name", ["uint2-asym-g8-fp16", "int4-sym-g8-fp16", "int2to4p25-asym-g8"])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e30, -1e-30])
def test_constant_and_extreme_rows(name: str, value: float) -> None:
    w = np.full((3, 20), value, np.float32)
    for importance in (None, np.zeros(20, np.float32)):
        scale, _ = fit(w, parse_spec(name), "hqq", importance)
        assert np.isfinite(quantize(w, parse_spec(name), "hqq", importance).decode()).all()
        assert (scale > 0).all()
