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


def nearest(w: np.ndarray, name: str) -> QTensor:
    spec = parse_spec(name)
    return encode(w, spec, *fit(w, spec))


def panel_loss(panels: list[QTensor], w: np.ndarray, hessian: np.ndarray) -> float:
    error = np.concatenate([p.decode() for p in panels], 1) - w
    return float(hessian_loss(error, hessian).sum())


@pytest.mark.parametrize("order", ["diagonal", "natural"])
def test_agrees_with_the_naive_loop(order: str) -> None:
    w, gram = problem()
    start = nearest(w, "uint4-asym-g32-fp16")
    factor = factorize(gram, 0.01, order)  # type: ignore[arg-type]
    (found,) = gptq_round(w, factor, [start])
    expected = naive(w, factor.hessian[0], start, factor.order[0])
    assert (found.codes != expected).mean() < 0.01  # float32 may fall on the other side of a tie, and what follows


@pytest.mark.parametrize(
    "name", ["uint4-asym-g32-fp16", "int3-sym-channel-fp32", "int2-sym-g32-fp16", "int4-sym-tensor-fp32"]
)
def test_every_step_lowers_the_loss(name: str) -> None:
    w, gram = problem()
    factor = factorize(gram)
    start = nearest(w, name)
    (rounded,) = gptq_round(w, factor, [start])
    losses = [loss(start, w, factor.hessian), loss(rounded, w, factor.hessian)]
    assert losses[1] < 0.8 * losses[0]
    current = rounded
    for step in (refine_codes, refine_scales, refine_codes, refine_scales):
        current = step(current, factor.hessian, (w - current.decode()) @ factor.hessian[0])
        losses.append(loss(current, w, factor.hessian))
        assert losses[-1] <= losses[-2] * (1 + 1e-5)
    assert losses[-1] < 0.95 * losses[1]
    (refined,) = refine(w, factor.hessian, [rounded], 2)
    assert loss(refined, w, factor.hessian) == pytest.approx(losses[-1])


def test_panels_of_one_format_are_rounded_as_the_whole_matrix() -> None:
    w, gram = problem()
    factor = factorize(gram)
    (whole,) = gptq_round(w, factor, [nearest(w, "uint4-asym-g32-fp16")])
    panels = gptq_round(w, factor, [nearest(part, "uint4-asym-g32-fp16") for part in (w[:, :64], w[:, 64:])])
    np.testing.assert_array_equal(np.concatenate([p.codes for p in panels], 1), whole.codes)
    losses = [panel_loss(refine(w, factor.hessian, parts, 2), w, factor.hessian) for parts in ([whole], panels)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_panels_of_two_formats_make_up_for_each_other() -> None:
    w, gram = problem()
    places, names = (slice(0, 32), slice(32, 100)), ("uint4-asym-g32-fp16", "int2-sym-g32-fp16")
    starts = [nearest(w[:, place], name) for place, name in zip(places, names, strict=True)]
    plain, factor = factorize(gram), factorize(gram, noise=np.repeat([4.0**-4, 4.0**-2], [32, 68]))
    together = gptq_round(w, factor, starts)
    assert [str(p.spec) for p in together] == list(names)
    alone: list[QTensor] = []
    for place, start in zip(places, starts, strict=True):
        own = factorize(gram[place, place])
        alone += refine(w[:, place], own.hessian, gptq_round(w[:, place], own, [start]), 2)
    refined = refine(w, factor.hessian, together, 2)
    losses = [panel_loss(parts, w, factor.hessian) for parts in (starts, alone, refined)]
    assert losses[2] < 0.5 * losses[1] < 0.25 * losses[0]
    assert panel_loss(together, w, factor.hessian) < 0.7 * panel_loss(gptq_round(w, plain, starts), w, factor.hessian)


def test_white_inputs_give_nearest() -> None:
    w, _ = problem()
    start = nearest(w, "uint4-asym-g32-fp16")
    (found,) = gptq_round(w, factorize(3 * np.eye(100)), [start])
    np.testing.assert_array_equal(found.codes, start.codes)


def test_rows_do_not_depend_on_each_other() -> None:
    w, gram = problem()
    factor = factorize(gram)
    turn = np.random.default_rng(1).permutation(len(w))
    (found,) = gptq_round(w, factor, [nearest(w, "uint4-asym-g32-fp16")])
    (turned,) = gptq_round(w[turn], factor, [nearest(w[turn], "uint4-asym-g32-fp16")])
    assert (turned.codes != found.codes[turn]).mean() < 0.01


def test_blocks_are_separate_problems() -> None:
    parts = [problem(3, 9, seed) for seed in range(5)]
    w = np.concatenate([p[0] for p in parts])
    grams = np.stack([p[1] for p in parts])
    (together,) = gptq_round(w, factorize(grams), [nearest(w, "int4-sym-channel-fp32")])
    for i, (part, gram) in enumerate(parts):
        (own,) = gptq_round(part, factorize(gram), [nearest(part, "int4-sym-channel-fp32")])
        np.testing.assert_array_equal(together.codes[3 * i : 3 * i + 3], own.codes)


def test_dead_columns_and_singular_grams_are_safe() -> None:
    w, gram = problem()
    gram[7] = gram[:, 7] = 0
    start = nearest(w, "uint4-asym-g32-fp16")
    (found,) = gptq_round(w, factorize(gram), [start])
    np.testing.assert_array_equal(found.codes[:, 7], start.codes[:, 7])
    for singular in (np.zeros((100, 100)), np.ones((100, 100))):
        assert np.isfinite(factorize(singular).upper).all()


def test_indefinite_gram_is_damped_more() -> None:
    _, gram = problem()
    broken = gram - 0.2 * np.mean(np.diag(gram)) * np.eye(100, dtype=np.float32)
    factor = factorize(broken, 0.01)
    assert factor.damping >= 0.1  # ten times as much
    assert factorize(broken, 0.0).damping > 0.01  # none was asked for, some is needed
    assert factorize(gram, 0.0).damping == 0
    with pytest.raises(ValueError, match="NaN"):
        factorize(np.full((3, 3), np.nan))
