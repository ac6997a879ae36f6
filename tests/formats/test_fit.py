"""Scales and zero points: optimality, importance, and the inputs that break naive code."""

from __future__ import annotations

import time

import numpy as np
import pytest

from qcompiler.formats import QTensor, parse_spec
from qcompiler.formats.fit import fit, quantize

RNG = np.random.default_rng(5)


def squared_error(q: QTensor, w: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    return float((((q.decode() - w).astype(np.float64) ** 2) * weight).sum())


@pytest.mark.parametrize("name", ["int3-sym-channel-fp32", "uint3-asym-channel-fp32"])
def test_close_to_the_optimum_of_a_fine_grid(name: str) -> None:
    spec = parse_spec(name)
    w = RNG.standard_t(4, (6, 32)).astype(np.float32)
    found = squared_error(quantize(w, spec), w)
    best = 0.0
    lowest, highest = spec.format.code_range
    for row in w:
        errors = []
        for step in np.linspace(0.05, 1, 400) * np.abs(row).max() / 2:
            for zero in range(lowest, highest + 1) if not spec.symmetric else [0]:
                codes = np.clip(np.rint(row / step) + zero, lowest, highest)
                errors.append((((codes - zero) * step - row) ** 2).sum())
        best += min(errors)
    assert found <= 1.06 * best
    assert found < squared_error(quantize(w, spec, "minmax"), w)


def test_low_bits_use_the_most_negative_code() -> None:
    w = np.array([[-1.0, 0.5, 0.0, -0.5]], np.float32)
    q = quantize(w, parse_spec("int2-sym-channel-fp32"))
    np.testing.assert_allclose(q.decode(), w)  # scale 0.5: codes -2, 1, 0, -1


def test_importance_decides_who_is_clipped() -> None:
    w = RNG.standard_normal((8, 64)).astype(np.float32)
    importance = np.full(64, 1e-3, np.float32)
    importance[:8] = 10
    spec = parse_spec("int3-sym-channel-fp32")
    weighted, plain = quantize(w, spec, importance=importance), quantize(w, spec)
    assert squared_error(weighted, w, importance) < 0.8 * squared_error(plain, w, importance)
    full = quantize(w, spec, importance=np.broadcast_to(importance, w.shape))
    np.testing.assert_array_equal(full.codes, weighted.codes)


def test_zero_importance_changes_nothing_and_is_safe() -> None:
    w = RNG.standard_normal((4, 32)).astype(np.float32)
    spec = parse_spec("uint4-asym-g8-fp16")
    scale, zero = fit(w, spec, importance=np.zeros(32, np.float32))
    expected, expected_zero = fit(w, spec, "minmax")
    np.testing.assert_array_equal(scale, expected)
    np.testing.assert_array_equal(zero, expected_zero)  # type: ignore[arg-type]


def test_ragged_group_is_fitted_alone() -> None:
    spec = parse_spec("uint4-asym-g32-fp16")
    w = RNG.standard_normal((5, 70)).astype(np.float32)
    w[:, 64:] *= 100
    q = quantize(w, spec)
    tail = quantize(np.ascontiguousarray(w[:, 64:]), spec)
    np.testing.assert_array_equal(q.scale[:, 2:], tail.scale)
    np.testing.assert_array_equal(q.codes[:, 64:], tail.codes)
    assert q.scale.shape == (5, 3)


@pytest.mark.parametrize("name", ["int4-sym-g8-fp16", "uint4-asym-g8-fp16", "int2-sym-tensor-bf16"])
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0, 1e30, -1e-30])
def test_constant_and_extreme_rows(name: str, value: float) -> None:
    w = np.full((3, 20), value, np.float32)
    q = quantize(w, parse_spec(name))
    assert np.isfinite(q.decode()).all()
    assert (q.scale > 0).all()
    if value == 0.0:
        assert not q.decode().any()
    if value in (0.25, -3.0):
        np.testing.assert_allclose(q.decode(), w, rtol=4e-3)


def test_scales_beyond_float16_saturate() -> None:
    w = np.array([[1e9, 1.0, -1e9, 2.0]], np.float32)
    q = quantize(w, parse_spec("int4-sym-channel-fp16"))
    assert np.isfinite(q.scale.astype(np.float16)).all()
    assert q.decode()[0, 0] == 7 * 65504


def test_small_scales_use_subnormal_float16() -> None:
    w = RNG.uniform(-1e-3, 1e-3, (4, 64)).astype(np.float32)
    q = quantize(w, parse_spec("int8-sym-channel-fp16"))
    assert squared_error(q, w) < 1e-4 * float((w.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_refused(bad: float) -> None:
    w = np.ones((2, 4), np.float32)
    w[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit(w, parse_spec("int4"))


def test_wrong_arguments_are_refused() -> None:
    w = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="does not fit"):
        fit(w, parse_spec("int4"), importance=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="not negative"):
        fit(w, parse_spec("int4"), importance=-np.ones(4, np.float32))
    with pytest.raises(ValueError, match="unknown method"):
        fit(w, parse_spec("int4"), "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrix"):
        fit(np.ones(4, np.float32), parse_spec("int4"))


def test_a_large_matrix_takes_seconds() -> None:
    w = RNG.standard_normal((4096, 576)).astype(np.float32)
    start = time.process_time()
    fit(w, parse_spec("uint4-asym-g32-fp16"))
    assert time.process_time() - start < 5  # measured 0.4


def moments_of(columns: int, products: int = 1, seed: int = 5) -> np.ndarray:
    """Of inputs with means and correlations, [products, columns, columns]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(products, 256, columns)) @ rng.normal(size=(products, columns, columns)) + 3
    return (x.swapaxes(1, 2) @ x / 256).astype(np.float32)


def output_error(matrix: np.ndarray, moments: np.ndarray, decoded: np.ndarray, size: int) -> float:
    """Sum of e^T H e over the groups."""
    total = 0.0
    rows = len(matrix) // len(moments)
    for r in range(len(matrix)):
        for start in range(0, matrix.shape[1], size):
            part = slice(start, start + size)
            e = (decoded - matrix)[r, part].astype(np.float64)
            total += e @ moments[r // rows][part, part] @ e
    return total


@pytest.mark.parametrize("text", ["int3-sym-g8-fp32", "uint3-asym-g8", "int4-sym-channel", "int2-sym-g5"])
@pytest.mark.parametrize("products", [1, 3])
def test_moments_lower_the_error_of_the_output_within_groups(text: str, products: int) -> None:
    rng = np.random.default_rng(0)
    matrix, spec = rng.normal(size=(12, 24)).astype(np.float32), parse_spec(text)
    moments = moments_of(24, products)
    size = spec.granularity.group_size(24)
    power = np.repeat(np.einsum("pkk->pk", moments), 12 // products, 0)
    found = [quantize(matrix, spec, "mse", weights).decode() for weights in (moments, power)]
    errors = [output_error(matrix, moments, decoded, size) for decoded in found]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("text", ["int3-sym-g8", "uint4-asym-channel"])
def test_moments_without_products_are_their_diagonal(text: str) -> None:
    rng = np.random.default_rng(1)
    matrix, spec = rng.normal(size=(8, 16)).astype(np.float32), parse_spec(text)
    power = rng.uniform(0.1, 2, 16).astype(np.float32)
    one, other = quantize(matrix, spec, "mse", np.diag(power)[None]), quantize(matrix, spec, "mse", power)
    assert np.array_equal(one.codes, other.codes)


@pytest.mark.parametrize("text", ["int4-sym-tensor", "int2to4p25-sym-g8", "int4-sym-r4", "int3-sym-g8"])
def test_where_groups_are_no_parts_of_rows_the_diagonal_counts(text: str) -> None:
    rng = np.random.default_rng(2)
    matrix, spec = rng.normal(size=(8, 16)).astype(np.float32), parse_spec(text)
    moments = moments_of(16)
    method = "hqq" if text == "int3-sym-g8" else "mse"
    found = [quantize(matrix, spec, method, w) for w in (moments, np.diagonal(moments[0]))]
    assert np.array_equal(found[0].codes, found[1].codes)


def test_moments_that_do_not_fit_are_refused() -> None:
    matrix, spec = np.ones((4, 6), np.float32), parse_spec("int4-g3")
    for wrong in (np.ones((1, 6, 5)), np.ones((3, 6, 6)), -np.eye(6)[None], np.full((1, 6, 6), np.nan)):
        with pytest.raises(ValueError, match="importance"):
            quantize(matrix, spec, "mse", wrong)
