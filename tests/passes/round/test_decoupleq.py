"""decoupleQ: every half-step lowers the loss of every row, and the second one is a least-squares solution."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from qcompiler.errors import BadOption, PassRefused
from qcompiler.formats import QTensor, parse_spec
from qcompiler.formats.fit import quantize
from qcompiler.passes.round.decoupleq import DecoupleQ, alternate, best_scales, better_codes
from qcompiler.passes.round.gptq import GPTQ
from qcompiler.passes.round.gptq_core import Factor, factorize, gptq_round, hessian_loss
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.round.refine import refine
from qcompiler.passes.round.scale_solve import solve_scales
from qcompiler.progress import Silent
from tests.passes.round.small_models import cnn, mlp, planned
from tests.passes.round.test_gptq_core import problem
from tests.passes.round.test_weight_passes import error

SPECS = ["uint2-asym-g32-fp16", "int2-sym-channel-fp32", "uint3-asym-g24-bf16", "int4-asym-g16-fp16"]


def started(name: str, seed: int = 0) -> tuple[np.ndarray, Factor, list[QTensor]]:
    w, gram = problem(rows=16, seed=seed)
    factor = factorize(gram)
    return w, factor, gptq_round(w, factor, [quantize(w, parse_spec(name))])


def rows_loss(panels: list[QTensor], w: np.ndarray, factor: Factor) -> np.ndarray:
    return hessian_loss(np.concatenate([p.decode() for p in panels], 1) - w, factor.hessian)


@pytest.mark.parametrize("name", [*SPECS, "int2to4p25-sym-g20", "int3-sym-tensor-fp16"])
def test_no_half_step_raises_the_loss_of_a_row(name: str) -> None:
    w, factor, found = started(name)
    losses = [rows_loss(found, w, factor)]
    for _ in range(3):
        found = better_codes(w, factor, found)
        losses.append(rows_loss(found, w, factor))
        found = refine(w, factor.hessian, found, 1, [best_scales])
        losses.append(rows_loss(found, w, factor))
    lowest, highest = found[0].spec.format.code_range
    assert (lowest <= found[0].codes).all()
    assert (found[0].codes <= highest).all()
    shared = found[0].scale.shape[0] == 1  # then only the sum of all rows is promised
    for before, after in pairwise(losses):
        assert after.sum() <= before.sum() * (1 + 1e-5)
        assert shared or (after <= before * (1 + 1e-4)).all()
    assert losses[-1].sum() < 0.98 * losses[0].sum()


def test_scales_are_those_of_least_squares() -> None:
    w, factor, (q,) = started("int3-sym-g24-fp32")
    pull = (w - q.decode()) @ factor.hessian[0]
    found = solve_scales(q, factor.hessian, pull)
    root = np.linalg.cholesky(factor.hessian[0].astype(np.float64)).T
    for row in range(len(w)):
        design = np.zeros((w.shape[1], q.scale.shape[1]))
        for column in range(w.shape[1]):
            design[column, column // 24] = q.codes[row, column]
        best = np.linalg.lstsq(root @ design, root @ w[row], rcond=None)[0]
        np.testing.assert_allclose(found.scale[row], best, rtol=2e-3)


def test_zero_points_move_where_that_helps() -> None:
    w, factor, (q,) = started("uint3-asym-g32-fp32")
    assert q.zero is not None
    off = quantize(w, q.spec)
    off.zero = np.clip(q.zero + 1, 0, 7)  # codes for other zero points
    found = solve_scales(off, factor.hessian, (w - off.decode()) @ factor.hessian[0])
    assert found.zero is not None
    assert (found.zero != off.zero).any()
    np.testing.assert_array_equal(found.zero, np.clip(np.rint(found.zero), 0, 7))
    assert (rows_loss([found], w, factor) < 0.9 * rows_loss([off], w, factor)).mean() > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_is_below_that_of_gptq_with_descent(seed: int) -> None:
    w, factor, start = started("uint2-asym-g32-fp16", seed)
    found = alternate(w, factor, start, 4)
    assert rows_loss(found, w, factor).sum() < rows_loss(refine(w, factor.hessian, start, 3), w, factor).sum()


def test_panels_and_blocks() -> None:
    w, factor, _ = started("int4")
    panels = [quantize(w[:, :64], parse_spec("int2-sym-g32")), quantize(w[:, 64:], parse_spec("uint4-asym-channel"))]
    start = gptq_round(w, factor, panels)
    found = alternate(w, factor, start, 2)
    assert [p.spec for p in found] == [p.spec for p in panels]
    assert rows_loss(found, w, factor).sum() < rows_loss(start, w, factor).sum()
    parts = [problem(3, 9, seed) for seed in range(4)]
    w = np.concatenate([p[0] for p in parts])
    together = factorize(np.stack([p[1] for p in parts]))
    (all_four,) = alternate(w, together, gptq_round(w, together, [quantize(w, parse_spec("int3"))]), 2)
    for i, (part, gram) in enumerate(parts):
        own = factorize(gram)
        (alone,) = alternate(part, own, gptq_round(part, own, [quantize(part, parse_spec("int3"))]), 2)
        np.testing.assert_allclose(all_four.decode()[3 * i : 3 * i + 3], alone.decode(), rtol=2e-3)


@pytest.mark.parametrize("name", ["uint2-asym-g8-fp16", "int3-sym-channel-fp32"])
def test_rows_of_zeros_constant_rows_and_singular_hessians(name: str) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 20)).astype(np.float32)
    w[0], w[1], w[2] = 0, 0.5, 1e-30
    for gram in (np.zeros((20, 20)), np.ones((20, 20)), np.diag(np.arange(20.0) % 2)):
        factor = factorize(gram)
        (found,) = alternate(w, factor, gptq_round(w, factor, [quantize(w, parse_spec(name))]), 3)
        assert np.isfinite(found.decode()).all()
        assert (found.scale > 0).all()
        assert not found.decode()[0].any()


@pytest.mark.parametrize(("make", "spec"), [(mlp, "uint2-asym-g8-fp16"), (cnn, "int3-sym-channel-fp32")])
def test_pass_on_whole_models(make: Any, spec: str) -> None:
    near, done, plain = (planned(make(), spec) for _ in range(3))
    Nearest().run(near, Silent())
    report, other = DecoupleQ().run(done, Silent()), GPTQ().run(plain, Silent())
    assert report.name == "decoupleq"
    assert error(done) < 0.8 * error(near)
    first = next(iter(report.metrics["relative_error"]))  # later ones see other inputs
    assert report.metrics["relative_error"][first]["error"] <= other.metrics["relative_error"][first]["error"] * 1.001


def test_what_cannot_be_done_says_so() -> None:
    with pytest.raises(BadOption, match="rounds"):
        DecoupleQ(rounds=0)
    with pytest.raises(BadOption, match="damping"):
        DecoupleQ(damping=-1.0)
    model = planned(mlp(), "int4")
    model.calibration = None
    with pytest.raises(PassRefused, match="decoupleq needs calibration data"):
        DecoupleQ().requires(model)
