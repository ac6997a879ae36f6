"""Lower hulls of many units at once, and the path along them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.solvers import hull as module
from qcompiler.solvers.hull import affordable_steps, curve, lower_hulls, path
from qcompiler.solvers.problem import Problem


def hull_of_one(cost: np.ndarray, loss: np.ndarray) -> list[tuple[float, float]]:
    """By definition: points that no convex combination of two others beats or equals, from the cheapest on."""
    points = sorted({(float(c), float(v)) for c, v in zip(cost, loss, strict=True) if np.isfinite(v)})
    kept = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    return [
        p
        for p in kept
        if not any(
            a[0] < p[0] < b[0] and (b[0] - p[0]) * a[1] + (p[0] - a[0]) * b[1] <= (b[0] - a[0]) * p[1]
            for a, b in itertools.product(kept, kept)
        )
    ]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), units=st.integers(1, 5), options=st.integers(1, 7))
def test_hulls_by_definition(data: st.DataObject, units: int, options: int) -> None:
    """Whole numbers, so that points on one line are that exactly."""
    whole = st.lists(st.integers(-6, 6), min_size=units * options, max_size=units * options)
    cost = np.array(data.draw(whole), np.float64).reshape(units, options)
    loss = np.array(data.draw(whole), np.float64).reshape(units, options)
    loss[:, 1:][loss[:, 1:] == 6] = np.inf
    option, slope = lower_hulls(cost, loss)
    for unit in range(units):
        on = option[unit][option[unit] >= 0]
        assert [(cost[unit, o], loss[unit, o]) for o in on] == hull_of_one(cost[unit], loss[unit])
        assert (option[unit, len(on) :] == -1).all()
        steps = slope[unit, 1 : len(on)]
        assert (np.diff(steps) >= 0).all()
        assert steps == pytest.approx(np.diff(loss[unit, on]) / np.diff(cost[unit, on]))
        assert np.isnan(np.delete(slope[unit], np.arange(1, len(on)))).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cost, loss = rng.uniform(size=(2, 100, 6))
    whole = lower_hulls(cost, loss)
    monkeypatch.setattr(module, "_CHUNK", 7)
    for a, b in zip(whole, lower_hulls(cost, loss), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decades", [1, 12, 300])
def test_steps_of_a_unit_keep_their_order_whatever_the_scale(decades: int) -> None:
    rng = np.random.default_rng(decades)
    loss = 10 ** rng.uniform(-decades / 2, decades / 2, (300, 8))
    cost = 10 ** rng.uniform(-decades / 2, decades / 2, (300, 8))
    steps = path(Problem(loss, {"b": cost}, {}), "b")
    assert (np.diff(steps.slope) >= 0).all()
    assert np.isfinite(steps.slope).all()
    now = steps.start.copy()
    for unit, before, option in zip(steps.unit, steps.before, steps.option, strict=True):
        assert now[unit] == before
        assert loss[unit, option] < loss[unit, before]
        assert cost[unit, option] > cost[unit, before]
        now[unit] = option
    np.testing.assert_array_equal(now, steps.choices(len(steps.slope)))
    np.testing.assert_array_equal(loss[np.arange(300), now], loss.min(axis=1))


def test_affordable_steps_fit_and_one_more_does_not() -> None:
    rng = np.random.default_rng(1)
    cost = rng.integers(1, 100, (40, 5)).astype(float)
    problem = Problem(rng.uniform(size=(40, 5)), {"b": cost}, {"b": 0.0})
    steps = path(problem, "b")
    for budget in np.linspace(cost.min(axis=1).sum(), cost.max(axis=1).sum(), 30):
        at = replace(problem, budgets={"b": float(budget)})
        stop = affordable_steps(at, steps, "b")
        assert at.feasible(steps.choices(stop))
        assert stop == len(steps.slope) or not at.feasible(steps.choices(stop + 1))


def test_nothing_to_choose() -> None:
    for problem in (
        Problem(np.zeros((0, 3)), {"b": np.zeros((0, 3))}, {}),
        Problem(np.ones((2, 1)), {"b": np.ones((2, 1))}, {}),
    ):
        assert len(path(problem, "b").slope) == 0
        assert [(p.cost, p.loss) for p in curve(problem, "b")] == [(problem.units, problem.units)]
