"""GPTQ's core and the descent after it, against plain loops and their own promises."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.formats import QTensor, parse_spec, spread
from qcompiler.formats.fit import encode, fit
from qcompiler.passes.round.gptq_core import factorize, gptq_round, hessian_loss
from qcompiler.passes.round.refine import refine, refine_codes, refine_scales


def problem(rows: int = 12, columns: int = 100, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 20)) @ rng.standard_normal((20, columns)) + 0.3 * rng.standard_normal((400, columns))
    return rng.standard_normal((rows, columns)).astype(np.float32), (x.T @ x / 400).astype(np.float32)


def loss(q: QTensor, w: np.ndarray, hessian: np.ndarray) -> float:
    return float(hessian_loss(q.decode() - w, hessian).sum())


def naive(w: np.ndarray, hessian: np.ndarray, q: QTensor, order: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper in float64, one column after the other."""
    h = hessian[np.ix_(order, order)].astype(np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    work, codes = w[:, order].astype(np.float64), np.empty(w.shape)
    scale = np.broadcast_to(spread(q.scale, q.spec, w.shape[1]), w.shape)[:, order]
    assert q.zero is not None
    zero = np.broadcast_to(spread(q.zero, q.spec, w.shape[1]), w.shape)[:, order]
    for i in range(w.shape[1]):
        codes[:, i] = np.clip(np.rint(work[:, i] / scale[:, i]) + zero[:, i], 0, 15)
        error = (work[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / upper[i, i]
        work[:, i:] -= error[:, None] * upper[i, i:]
    back = np.empty_like(codes)
    back[:, order] = codes
    return back


@pytest.mark.parametrize("order", ["diagonal", "natural"])
def test_agrees_with_the_naive_loop(order: str) -> None:
    w, gram = problem()
    spec = parse_spec("uint4-asym-g32-fp16")
    scale, zero = fit(w, spec)
    factor = factorize(gram, 0.01, order)  # type: ignore[arg-type]
    codes = gptq_round(w, factor, spec, scale, zero)
    expected = naive(w, factor.hessian[0], encode(w, spec, scale, zero), factor.order[0])
    assert (codes != expected).mean() < 0.01  # float32 may fall on the other side of a tie, and what follows


@pytest.mark.parametrize(
    "name", ["uint4-asym-g32-fp16", "int3-sym-channel-fp32", "int2-sym-g32-fp16", "int4-sym-tensor-fp32"]
)
def test_every_step_lowers_the_loss(name: str) -> None:
    w, gram = problem()
    spec, factor = parse_spec(name), factorize(gram)
    scale, zero = fit(w, spec)
    nearest = encode(w, spec, scale, zero)
    rounded = QTensor(spec, gptq_round(w, factor, spec, scale, zero), scale, zero)
    losses = [loss(nearest, w, factor.hessian), loss(rounded, w, factor.hessian)]
    assert losses[1] < 0.8 * losses[0]
    current = rounded
    for step in (refine_codes, refine_scales, refine_codes, refine_scales):
        current = step(w, factor.hessian, current)
        losses.append(loss(current, w, factor.hessian))
        assert losses[-1] <= losses[-2] * (1 + 1e-5)
    assert losses[-1] < 0.95 * losses[1]
    assert loss(refine(w, factor.hessian, rounded, 2), w, factor.hessian) == pytest.approx(losses[-1])


def test_white_inputs_give_nearest() -> None:
    w, _ = problem()
    spec = parse_spec("uint4-asym-g32-fp16")
    scale, zero = fit(w, spec)
    codes = gptq_round(w, factorize(3 * np.eye(100)), spec, scale, zero)
    np.testing.assert_array_equal(codes, encode(w, spec, scale, zero).codes)


def test_rows_do_not_depend_on_each_other() -> None:
    w, gram = problem()
    spec, factor = parse_spec("uint4-asym-g32-fp16"), factorize(gram)
    scale, zero = fit(w, spec)
    assert zero is not None
    turn = np.random.default_rng(1).permutation(len(w))
    codes = gptq_round(w, factor, spec, scale, zero)
    turned = gptq_round(w[turn], factor, spec, scale[turn], zero[turn])
    assert (turned != codes[turn]).mean() < 0.01


def test_blocks_are_separate_problems() -> None:
    parts = [problem(3, 9, seed) for seed in range(5)]
    w = np.concatenate([p[0] for p in parts])
    grams = np.stack([p[1] for p in parts])
    spec = parse_spec("int4-sym-channel-fp32")
    scale, _ = fit(w, spec)
    together = gptq_round(w, factorize(grams), spec, scale, None)
    for i, gram in enumerate(grams):
        rows = slice(3 * i, 3 * i + 3)
        np.testing.assert_array_equal(together[rows], gptq_round(w[rows], factorize(gram), spec, scale[rows], None))


def test_dead_columns_and_singular_grams_are_safe() -> None:
    w, gram = problem()
    gram[7] = gram[:, 7] = 0
    spec = parse_spec("uint4-asym-g32-fp16")
    scale, zero = fit(w, spec)
    codes = gptq_round(w, factorize(gram), spec, scale, zero)
    np.testing.assert_array_equal(codes[:, 7], encode(w, spec, scale, zero).codes[:, 7])
    for singular in (np.zeros((100, 100)), np.ones((100, 100))):
        assert np.isfinite(factorize(singular).upper).all()


def test_indefinite_gram_is_damped_more() -> None:
    _, gram = problem()
    broken = gram - 0.2 * np.mean(np.diag(gram)) * np.eye(100, dtype=np.float32)
    factor = factorize(broken, 0.01)
    assert factor.damping > 0.01
    with pytest.raises(ValueError, match="NaN"):
        factorize(np.full((3, 3), np.nan))
