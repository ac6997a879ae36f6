"""Laws that hold for every method on every problem: against enumeration, and against the problem itself, changed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import sparse

from qcompiler.solvers.certificate import check
from qcompiler.solvers.pareto import pareto
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, Solution
from qcompiler.solvers.solve import METHODS, solve
from tests.solvers.toys import feasible_choices

PAIRED = [name for name in METHODS if name not in ("lagrangian", "ilp")]  # those that take terms between units
EXACT = ["ilp", "quadratic"]
_SECONDS = {"ilp": 20.0, "quadratic": 20.0, "lagrangian": 20.0}  # searches that go on to the deadline get less
_SEARCH = 0.03
laws = partial(settings, deadline=None, print_blob=True)
losses = st.one_of(st.floats(-8, 8), st.floats(1e-9, 1e-3), st.integers(0, 3).map(float), st.just(1e4))


@st.composite
def problems(draw: Any, paired: bool, feasible: bool = True) -> Problem:
    """At most five units of three options: signed losses of all sizes, missing options, ties, one or two budgets."""
    units, options = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    loss = draw(arrays.arrays(np.float64, (units, options), elements=losses))
    missing = draw(arrays.arrays(np.bool_, (units, options), elements=st.integers(0, 5).map(lambda n: n == 0)))
    missing[np.arange(units), draw(st.integers(0, options - 1))] = False
    names = ["bytes", "seconds"][: draw(st.integers(1, 2))]
    whole = st.integers(0, 9).map(float)
    costs = {name: draw(arrays.arrays(np.float64, (units, options), elements=whole)) for name in names}
    most = {name: int(cost.max(axis=1).sum()) for name, cost in costs.items()}
    budgets = {name: float(draw(st.integers(0 if feasible else -1, most[name]))) for name in names}
    ties = ((0, units - 1),) if units > 1 and draw(st.booleans()) else ()
    if ties:
        missing[[0, units - 1]] = False
    cross = None
    if paired:
        terms = draw(
            arrays.arrays(np.float64, (units * options,) * 2, elements=st.one_of(st.just(0.0), st.floats(-3, 3)))
        )
        terms = np.triu(terms, 1) + np.triu(terms, 1).T
        cross = terms if draw(st.booleans()) else sparse.csr_array(terms)
    made = Problem(np.where(missing, np.inf, loss), costs, budgets, ties, cross)
    assume(not feasible or feasible_choices(made))
    return made


def size(problem: Problem) -> float:
    """Of the numbers that a loss is added up from: what their rounding is relative to."""
    terms = 0.0 if problem.cross is None else float(np.abs(problem.cross).sum())
    return float(np.abs(problem.loss[problem.allowed]).sum()) + terms + 1e-300


def solved(problem: Problem, method: str) -> Solution:
    return METHODS[method](problem, _SECONDS.get(method, _SEARCH))


def assert_sound(problem: Problem, found: Solution) -> None:
    """Feasible, worth what it says, bounded by no more than the optimum, optimal only where it is."""
    best = min(problem.objective(choice) for choice in feasible_choices(problem))
    assert problem.feasible(found.choice)
    assert found.objective == pytest.approx(problem.objective(found.choice), rel=1e-12, abs=1e-12 * size(problem))
    assert found.bound <= best + 1e-9 * size(problem)
    assert found.bound <= found.objective + 1e-9 * size(problem)
    assert check(problem, found).valid, check(problem, found).faults
    if found.status == "optimal":
        assert found.objective <= best + 1e-6 * size(problem)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@laws(max_examples=25)
def test_no_bound_is_above_the_optimum(method: str, data: st.DataObject) -> None:
    problem = data.draw(problems(paired=method in PAIRED and data.draw(st.booleans())))
    try:
        found = solved(problem, method)
    except NoChoiceFound:
        assert method not in EXACT
        return
    assert_sound(problem, found)
    if method in EXACT:
        assert found.status == "optimal"


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@laws(max_examples=15)
def test_out_of_time_the_best_is_told_with_its_bound(method: str, data: st.DataObject) -> None:
    problem = data.draw(problems(paired=method in PAIRED and data.draw(st.booleans()), feasible=False))
    try:
        found = METHODS[method](problem, 0.0)
    except NoChoiceFound:
        return
    except InfeasibleProblem:
        assert not feasible_choices(problem)
        return
    assert_sound(problem, found)


@pytest.mark.parametrize("method", EXACT)
@given(data=st.data())
@laws(max_examples=15)
def test_more_of_a_budget_never_loses_more(method: str, data: st.DataObject) -> None:
    problem = data.draw(problems(paired=method in PAIRED))
    name = data.draw(st.sampled_from(sorted(problem.budgets)))
    larger = {**problem.budgets, name: problem.budgets[name] + data.draw(st.integers(1, 9))}
    before, after = solved(problem, method), solved(replace(problem, budgets=larger), method)
    assert after.objective <= before.objective + 1e-6 * size(problem)
    assert after.bound <= before.objective + 1e-9 * size(problem)


@given(data=st.data())
@laws(max_examples=10)
def test_the_path_falls(data: st.DataObject) -> None:
    problem = data.draw(problems(paired=data.draw(st.booleans())))
    least, most = problem.least_costs()["bytes"], problem.costs["bytes"].max(axis=1).sum()
    others = {name: budget for name, budget in problem.budgets.items() if name != "bytes"}
    path = pareto(replace(problem, budgets=others), "bytes", np.linspace(least, most, 6).tolist(), solve)
    for smaller, larger in itertools.pairwise(path):
        assert larger.loss <= smaller.loss
        assert larger.bound <= smaller.loss + 1e-9 * size(problem)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@laws(max_examples=12)
def test_the_unit_of_the_losses_does_not_matter(method: str, data: st.DataObject) -> None:
    problem = data.draw(problems(paired=method in PAIRED and data.draw(st.booleans())))
    factor = data.draw(st.one_of(st.sampled_from([2.0**-40, 2.0**-3, 2.0**50]), st.floats(1e-9, 1e9)))
    cross = None if problem.cross is None else problem.cross * factor
    assert_alike(problem, replace(problem, loss=problem.loss * factor, cross=cross), method, factor)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@laws(max_examples=12)
def test_the_units_of_the_costs_do_not_matter(method: str, data: st.DataObject) -> None:
    problem = data.draw(problems(paired=method in PAIRED and data.draw(st.booleans())))
    exact = st.sampled_from([2.0**-40, 0.125, 3.0, 7.0, 2.0**30])
    factors = {name: data.draw(exact) for name in problem.costs}
    costs = {name: cost * factors[name] for name, cost in problem.costs.items()}
    budgets = {name: budget * factors[name] for name, budget in problem.budgets.items()}
    assert_alike(problem, replace(problem, costs=costs, budgets=budgets), method, 1.0)


def assert_alike(problem: Problem, other: Problem, method: str, factor: float) -> None:
    """The answer to `other`, whose losses are `factor` times those of the problem, is that to the problem."""
    try:
        one = solved(problem, method)
    except NoChoiceFound:
        with pytest.raises(NoChoiceFound):
            solved(other, method)
        return
    two = solved(other, method)
    assert_sound(other, two)
    if method in _SECONDS:  # searches that the clock stops may come farther the second time
        assert two.objective / factor == pytest.approx(one.objective, rel=1e-6, abs=1e-6 * size(problem))
        assert two.bound / factor == pytest.approx(one.bound, rel=1e-6, abs=1e-6 * size(problem))
        assert two.status == one.status
