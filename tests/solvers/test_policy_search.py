"""The learned policy against optima known by enumeration or proven by the integer program, and its transfer."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.solvers.certificate import check
from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.measured import Measured
from qcompiler.solvers.policy_search import PolicySearch, default_features, reward, solve_policy_search
from qcompiler.solvers.problem import InfeasibleProblem, Problem
from tests.solvers.toys import ONE_OPTION, QUADRATIC, assert_good_on, layers


@pytest.mark.parametrize("seed", range(5))
def test_additive_toys_within_two_percent(seed: int) -> None:
    problem = layers(seed)
    best, found = solve_ilp(problem), solve_policy_search(problem, episodes=6400, seed=seed)
    assert found.objective <= 1.02 * best.objective
    assert found.bound <= best.objective * (1 + 1e-9)
    assert check(problem, found).valid


@pytest.mark.parametrize("index", range(len(QUADRATIC)))
def test_quadratic_toys(index: int) -> None:
    assert_good_on(QUADRATIC[index], solve_policy_search(QUADRATIC[index], episodes=320))


def likeliest(policy: PolicySearch, problem: Problem) -> tuple[float, float]:
    """Loss of the policy's own pass, no draws and no local search, and that of the uniform choice."""
    course = policy._course(Measured(problem, 60.0), None)
    choice = course.run(policy._weights(), 1, None, within=True)[0][0]
    assert problem.feasible(choice)
    return problem.objective(choice), course.uniform


def test_policy_transfers_without_training() -> None:
    """Trained on four problems, one pass over others beats the uniform choice and an untrained policy by far."""
    policy = PolicySearch(seed=0)
    policy.train([layers(seed, 20) for seed in range(20, 24)], episodes=6400)
    again = PolicySearch(policy.weights)
    ratios, untrained, solved = [], [], []
    for seed in range(8):
        problem = layers(seed, 16)
        best = solve_ilp(problem).objective
        own, uniform = likeliest(again, problem)
        blank, _ = likeliest(PolicySearch(np.zeros_like(policy.weights)), problem)
        ratios.append(np.log(own / uniform))
        untrained.append(np.log(own / blank))
        solved.append(again.solve(problem).objective / best)
    assert np.mean(ratios) < np.log(0.5)
    assert np.mean(untrained) < np.log(0.2)
    assert np.median(solved) < 1.1


def test_training_learns() -> None:
    """Episodes as the policy draws them, over-budget ones included, are rewarded far more after training."""
    problem = layers(2)
    policy = PolicySearch(seed=3)
    policy.train(problem, episodes=6400)
    course = policy._course(Measured(problem, 60.0), None)
    rng = np.random.default_rng(0)
    trained, blank = (
        np.mean([course.rewarded(choice) for choice in course.run(weights, 64, rng)[0]])
        for weights in (policy._weights(), np.zeros_like(policy.weights))
    )
    assert trained > 0.6 * blank


def test_callers_features_are_what_the_policy_sees() -> None:
    """With features that tell the units apart training is better than with a constant that does not."""
    problem = layers(1, 8)
    losses = []
    for features in (np.eye(8), np.ones((8, 8))):
        policy = PolicySearch(seed=0)
        policy.train(problem, features=[features], episodes=6400)
        course = policy._course(Measured(problem, 60.0), features)
        losses.append(problem.objective(course.run(policy._weights(), 1, None, within=True)[0][0]))
    assert losses[0] < losses[1]


def test_reward_is_quality_first_with_a_cliff() -> None:
    assert reward(2.0, 0.0, 0.0, 1.0, 3.0) == pytest.approx(-0.5)
    assert reward(2.0, 0.0, 1.0, 1.0, 3.0) > reward(2.0, 0.0, 0.0, 1.0, 3.0)
    assert reward(4.0, 0.0, 1.0, 1.0, 3.0) == pytest.approx(-4.5)  # three times the penalty, no bonus
    assert reward(1.0, 0.1, 0.0, 1.0, 3.0) == pytest.approx(-11.0)
    worst_within = reward(1e9, 0.0, 0.0, 1.0, 3.0)
    assert worst_within > reward(1.0, 0.1, 0.0, 1.0, 3.0)
    assert reward(1.9, 0.0, 0.0, 1.0, 3.0) > reward(2.0, 0.0, 1.0, 1.0, 3.0)  # quality before spare bits


def test_policy_gradient_is_that_of_the_expected_reward() -> None:
    """Against the difference quotient of the expectation over all choices of two units."""
    problem = layers(0, 2)
    rng = np.random.default_rng(0)
    policy = PolicySearch(rng.normal(0, 0.1, (6, 12)))
    course = policy._course(Measured(problem, 60.0), None)
    weights = policy._weights()
    choices, trace = course.run(weights, 60_000, rng)
    value = (choices == 4).mean(axis=1)
    slope = trace.slope(value - value.mean(), 0.0)
    step = np.zeros_like(weights)
    step[4, -1] = 0.5
    higher, lower = (
        (course.run(weights + sign * step, 60_000, np.random.default_rng(1))[0] == 4).mean() for sign in (1, -1)
    )
    assert abs(slope[4, -1]) > 0.02
    assert slope[4, -1] == pytest.approx(higher - lower, abs=0.01)


def test_default_features_do_not_depend_on_scale() -> None:
    problem = layers(5)
    scaled = Problem(problem.loss * 7, {"bits": problem.costs["bits"] * 3}, {"bits": problem.budgets["bits"] * 3})
    np.testing.assert_allclose(default_features(problem), default_features(scaled), atol=1e-9)
    assert np.isfinite(default_features(QUADRATIC[1])).all()


def test_one_option_is_left_alone() -> None:
    found = solve_policy_search(ONE_OPTION, episodes=64)
    assert found.choice.tolist() == [0, 0]
    assert found.status == "optimal"


def test_deterministic_for_a_seed() -> None:
    problem = layers(4, units=12)
    first, again, other = PolicySearch(seed=1), PolicySearch(seed=1), PolicySearch(seed=2)
    for policy in (first, again, other):
        policy.train(problem, episodes=128)
    assert (first._weights() == again._weights()).all()
    assert (first._weights() != other._weights()).any()
    assert first.solve(problem).choice.tolist() == again.solve(problem).choice.tolist()


def test_two_budgets() -> None:
    base = layers(9)
    seconds = np.random.default_rng(9).uniform(1, 2, base.loss.shape)
    problem = Problem(base.loss, {**base.costs, "seconds": seconds}, {**base.budgets, "seconds": 14.0})
    found = solve_policy_search(problem, episodes=3200)
    assert check(problem, found).valid
    assert found.objective <= 1.1 * solve_ilp(problem).objective


def test_deadline_is_kept() -> None:
    start = time.monotonic()
    found = solve_policy_search(layers(6, units=100), 0.5, episodes=10**9)
    assert time.monotonic() - start < 3
    assert np.isfinite(found.objective)


def test_infeasible_problems() -> None:
    with pytest.raises(InfeasibleProblem, match="bits: at least"):
        solve_policy_search(replace(layers(7), budgets={"bits": 1.0}))


def test_meaningless_arguments_are_refused() -> None:
    problem = layers(0)
    with pytest.raises(ValueError, match="episode"):
        solve_policy_search(problem, episodes=0)
    with pytest.raises(ValueError, match="features must be"):
        solve_policy_search(problem, features=np.ones((3, 2)))
    with pytest.raises(ValueError, match="features must be"):
        solve_policy_search(problem, features=np.full((10, 2), np.nan))
    with pytest.raises(ValueError, match="train the policy"):
        PolicySearch().solve(problem)
    with pytest.raises(ValueError, match="the policy is for"):
        PolicySearch(np.zeros((6, 4))).solve(problem)
    with pytest.raises(ValueError, match="tables of features"):
        PolicySearch().train([problem, problem], features=[np.ones((10, 2))])


def test_nothing_to_choose() -> None:
    assert solve_policy_search(Problem(np.zeros((0, 1)), {}, {}), episodes=1).choice.size == 0
