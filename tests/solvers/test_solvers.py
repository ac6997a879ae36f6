"""Every solver against enumeration: on small random problems the optimum is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.solvers.certificate import check, dual_bound
from qcompiler.solvers.hull import curve
from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, Solution
from qcompiler.solvers.solve import solve

Solver = Callable[[Problem], Solution]
SOLVERS: dict[str, Solver] = {"lagrangian": solve_lagrangian, "ilp": solve_ilp, "auto": solve}


def random_problem(rng: np.random.Generator, resources: int | None = None) -> Problem:
    """At most 4^6 choices; signed losses, ragged options, one or two budgets from infeasible to loose, ties."""
    units, width = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    sizes = rng.integers(1, width + 1, units)
    loss = [np.sort(10 ** rng.uniform(-3, 2, n))[::-1] for n in sizes]
    if rng.random() < 0.3:
        loss = [row - rng.uniform(0, 5) for row in loss]
    if rng.random() < 0.2:  # equal losses and equal costs
        loss = [np.round(row) for row in loss]
    high = int(rng.choice([6, 2000]))
    names = ["bytes", "seconds"][: resources or int(rng.integers(1, 3))]
    costs = {name: [rng.integers(1, high, n).astype(float) for n in sizes] for name in names}
    if rng.random() < 0.7:
        costs["bytes"] = [np.sort(row) for row in costs["bytes"]]
    share = rng.uniform(-0.05, 1.1)
    budgets = {}
    for name, rows in costs.items():
        low, top = sum(r.min() for r in rows), sum(r.max() for r in rows)
        budgets[name] = float(int(low + share * (top - low)))
    tied = units > 2 and sizes[0] == sizes[2] and rng.random() < 0.5
    lists = {name: [r.tolist() for r in rows] for name, rows in costs.items()}
    return Problem.ragged([r.tolist() for r in loss], lists, budgets, ((2, 0),) if tied else ())


def optimum(problem: Problem) -> float:
    """By enumeration; inf if nothing is feasible."""
    best = np.inf
    for options in itertools.product(*[np.flatnonzero(row) for row in problem.allowed]):
        choice = np.array(options, np.intp)
        same = all(len({options[u] for u in group}) == 1 for group in problem.ties)
        if same and problem.feasible(choice):
            best = min(best, problem.objective(choice))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SOLVERS)
def test_against_enumeration(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    optimal = feasible = 0
    for _ in range(300):
        problem = random_problem(rng)
        best = optimum(problem)
        try:
            solution = SOLVERS[name](problem)
        except InfeasibleProblem:
            assert best == np.inf
            continue
        except NoChoiceFound:
            assert name == "lagrangian"
            continue
        slack = 1e-9 * max(1.0, abs(best))
        assert check(problem, solution).valid
        assert solution.bound <= best + slack
        assert solution.objective >= best - slack
        feasible += 1
        optimal += solution.objective <= best + slack
        if solution.status == "optimal":
            assert solution.objective <= best + slack
    assert feasible > 200
    if name != "lagrangian":
        assert optimal == feasible
    assert optimal >= 0.97 * feasible


def test_highs_and_cbc_agree() -> None:
    rng = np.random.default_rng(11)
    for _ in range(12):
        problem = larger_problem(rng, 12)
        highs, cbc = solve_ilp(problem), solve_ilp(problem, engine="cbc")
        assert highs.status == cbc.status == "optimal"
        assert cbc.objective == pytest.approx(highs.objective, rel=1e-6)
        assert cbc.bound <= highs.objective * (1 + 1e-9)


def larger_problem(rng: np.random.Generator, units: int = 60, resources: int = 1) -> Problem:
    """Like layers of a network: losses fall fourfold a bit and span decades."""
    bits = np.array([2.0, 3, 4, 5, 6, 8])
    weights = rng.choice([2**12, 3 * 2**12, 2**15, 2**18], units).astype(float)
    loss = np.exp(rng.normal(0, 1.5, (units, 1))) * 4.0**-bits * np.exp(rng.normal(0, 0.2, (units, 6)))
    costs = {"bits": weights[:, None] * bits}
    budgets = {"bits": float(int(weights.sum() * 3.87))}
    if resources > 1:
        costs["seconds"] = rng.uniform(1, 2, (units, 6))
        budgets["seconds"] = 1.45 * units
    return Problem(loss, costs, budgets)


@pytest.mark.parametrize("resources", [1, 2])
def test_larger_problems_are_proven(resources: int) -> None:
    rng = np.random.default_rng(3)
    problem = larger_problem(rng, 60, resources)
    fast, exact = solve_lagrangian(problem), solve(problem)
    assert exact.status == "optimal"
    assert exact.gap < 1e-6
    assert exact.objective <= fast.objective
    assert fast.gap < 0.02
    assert fast.bound <= exact.objective
    assert check(problem, fast).proof == "dual"


def test_running_out_of_time_claims_no_optimum() -> None:
    """PuLP calls a HiGHS run that hit its limit optimal; we must not. Six random budgets take far longer to prove."""
    rng = np.random.default_rng(5)
    costs = {f"r{r}": rng.integers(1, 1000, (80, 5)).astype(float) for r in range(6)}
    budgets = {name: float(int(cost.mean(axis=1).sum() * 0.8)) for name, cost in costs.items()}
    problem = Problem(rng.uniform(1, 2, (80, 5)), costs, budgets)
    for engine in ("highs", "cbc"):
        solution = solve_ilp(problem, deadline=2.0, engine=engine)
        assert solution.status == "feasible"
        assert solution.bound < solution.objective
        assert solution.seconds < 20
        assert check(problem, solution).valid


def test_more_budget_is_never_worse() -> None:
    rng = np.random.default_rng(4)
    base = larger_problem(rng, 20)
    least, most = base.costs["bits"].min(axis=1).sum(), base.costs["bits"].max(axis=1).sum()
    losses = [solve(replace(base, budgets={"bits": float(b)})).objective for b in np.linspace(least, most * 1.1, 25)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(base.loss.min(axis=1).sum())


@pytest.mark.parametrize("name", ["lagrangian", "ilp"])
@pytest.mark.parametrize("factor", [1e-9, 3.7, 1e12])
def test_scaling_losses_or_costs_changes_nothing(name: str, factor: float) -> None:
    problem = larger_problem(np.random.default_rng(6), 25)
    reference = SOLVERS[name](problem)
    louder = SOLVERS[name](replace(problem, loss=problem.loss * factor))
    assert louder.objective == pytest.approx(reference.objective * factor, rel=1e-9)
    assert louder.gap == pytest.approx(reference.gap, abs=1e-6)
    bigger = replace(
        problem,
        costs={"bits": problem.costs["bits"] * factor},
        budgets={"bits": problem.budgets["bits"] * factor * (1 + 1e-12)},
    )
    assert SOLVERS[name](bigger).objective == pytest.approx(reference.objective, rel=1e-9)


@pytest.mark.parametrize("name", ["lagrangian", "ilp"])
def test_deterministic(name: str) -> None:
    problem = larger_problem(np.random.default_rng(7), 40, 2)
    first, second = SOLVERS[name](problem), SOLVERS[name](problem)
    assert first.choice.tolist() == second.choice.tolist()
    assert first.bound == second.bound


def test_tied_units_choose_alike_transitively() -> None:
    problem = Problem.ragged(
        [[9.0, 1.0], [0.0, 1.0], [5.0, 0.0], [4.0, 0.0]],
        {"bits": [[1.0, 2.0]] * 4},
        {"bits": 7.0},
        ties=((0, 1), (1, 2)),
    )
    assert solve(problem).choice.tolist() == [1, 1, 1, 0]


def test_infeasible_says_the_least_possible_cost() -> None:
    problem = Problem.ragged([[1.0, 0.0], [2.0, 0.0]], {"bits": [[3.0, 5.0], [4.0, 7.0]]}, {"bits": 6.0})
    for solver in SOLVERS.values():
        with pytest.raises(InfeasibleProblem, match="at least 7, budget 6") as caught:
            solver(problem)
        assert caught.value.least == {"bits": 7.0}


def test_two_budgets_that_exclude_each_other() -> None:
    """Each alone can be met, both cannot: only the integer program can prove it (the relaxation is feasible)."""
    costs = {"a": [[0.0, 2.0], [0.0, 2.0]], "b": [[2.0, 0.0], [2.0, 0.0]]}
    problem = Problem.ragged([[1.0, 0.0], [1.0, 0.0]], costs, {"a": 1.0, "b": 3.0})
    with pytest.raises(NoChoiceFound):
        solve_lagrangian(problem)
    with pytest.raises(InfeasibleProblem):
        solve(problem)
    with pytest.raises(InfeasibleProblem):
        solve_lagrangian(replace(problem, budgets={"a": 1.0, "b": 1.0}))


def test_a_budget_that_is_met_exactly_is_met() -> None:
    bits = [[float(2**31 + 1), float(2**32 + 3)], [float(2**31), float(2**33)]]
    problem = Problem.ragged([[1.0, 0.0], [1.0, 0.0]], {"bits": bits}, {"bits": float(2**32 + 3 + 2**31)})
    assert solve(problem).choice.tolist() == [1, 0]
    one_less = replace(problem, budgets={"bits": float(2**32 + 2 + 2**31)})
    assert solve(one_less).choice.tolist() == [0, 0]


def test_curve_is_the_lower_hull_and_bounds_every_choice() -> None:
    rng = np.random.default_rng(8)
    for _ in range(60):
        problem = random_problem(rng, resources=1)
        points = curve(problem, "bytes")
        for options in itertools.product(*[np.flatnonzero(row) for row in problem.allowed]):
            choice = np.array(options, np.intp)
            if any(len({options[u] for u in group}) > 1 for group in problem.ties):
                continue
            cost, loss = problem.used(choice, "bytes"), problem.objective(choice)
            reached = [p for p in points if p.cost <= cost]
            assert reached
            assert loss >= np.interp(cost, [p.cost for p in points], [p.bound for p in points]) - 1e-9
        for point in points:
            at = replace(problem, budgets={"bytes": point.cost})
            assert solve(at).objective == pytest.approx(point.loss, abs=1e-9)
        assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(points))


def test_curve_at_layer_scale_ends_at_cheapest_and_best() -> None:
    problem = larger_problem(np.random.default_rng(9))
    points = curve(problem, "bits")
    assert points[0].cost == problem.costs["bits"].min(axis=1).sum()
    assert points[-1].loss == pytest.approx(problem.loss.min(axis=1).sum())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: replace(s, objective=s.objective * 0.9), "the loss is"),
        (lambda s: replace(s, bound=s.objective * 1.1), "above the loss"),
        (lambda s: replace(s, choice=np.full_like(s.choice, 5)), "is over"),
        (lambda s: replace(s, choice=s.choice[1:]), "one option index"),
        (lambda s: replace(s, status="optimal", bound=s.objective * 0.5), "called optimal"),
    ],
)
def test_certificate_finds_false_claims(change: Callable[[Solution], Solution], fault: str) -> None:
    problem = larger_problem(np.random.default_rng(10))
    solution = solve(problem)
    assert check(problem, solution).valid
    assert any(fault in f for f in check(problem, change(solution)).faults)


def test_certificate_finds_broken_ties() -> None:
    problem = Problem.ragged([[1.0, 0.0]] * 2, {"bits": [[1.0, 2.0]] * 2}, {"bits": 3.0})
    solution = solve(problem)
    assert check(replace(problem, ties=((0, 1),)), solution).faults


@pytest.mark.parametrize("prices", [{"bits": -1.0}, {"bits": np.inf}, {"other": 1.0}])
def test_dual_bound_takes_only_prices_that_prove_something(prices: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="prices"):
        dual_bound(larger_problem(np.random.default_rng(0)), prices)


def test_any_price_bounds_the_optimum() -> None:
    rng = np.random.default_rng(12)
    for _ in range(100):
        problem = random_problem(rng)
        prices = {name: float(10 ** rng.uniform(-6, 2)) for name in problem.budgets}
        assert dual_bound(problem, prices) <= optimum(problem) + 1e-9


def test_quadratic_terms_are_refused_not_ignored() -> None:
    problem = replace(larger_problem(np.random.default_rng(0), 2), cross=np.zeros((12, 12)))
    for solver in (solve_lagrangian, solve_ilp):
        with pytest.raises(ValueError, match="quadratic"):
            solver(problem)


def test_objective_counts_quadratic_terms() -> None:
    cross = np.zeros((4, 4))
    cross[1, 2] = cross[2, 1] = 3.0
    problem = Problem(np.array([[0.0, 1.0], [5.0, 0.0]]), {}, {}, cross=cross)
    assert problem.objective(np.array([1, 0])) == 9.0
    assert problem.objective(np.array([1, 1])) == 1.0


@pytest.mark.parametrize(
    ("loss", "costs", "budgets", "ties"),
    [
        ([[np.nan]], {"b": [[1.0]]}, {"b": 1.0}, ()),
        ([[-np.inf]], {"b": [[1.0]]}, {"b": 1.0}, ()),
        ([[np.inf]], {"b": [[1.0]]}, {"b": 1.0}, ()),
        ([[1e200]], {"b": [[1.0]]}, {"b": 1.0}, ()),
        ([[1.0]], {"b": [[np.inf]]}, {"b": 1.0}, ()),
        ([[1.0]], {"b": [[1e308]]}, {"b": 1e308}, ()),
        ([[1.0]], {3: [[1.0]]}, {3: 1.0}, ()),
        ([[1.0]], {"b": [[1.0]]}, {"c": 1.0}, ()),
        ([[1.0]], {"b": [[1.0]]}, {"b": np.nan}, ()),
        ([[1.0]], {"b": [[1.0]]}, {"b": 1.0}, ((0, 1),)),
    ],
)
def test_meaningless_problems_are_refused(loss, costs, budgets, ties) -> None:
    with pytest.raises(ValueError):
        Problem.ragged(loss, costs, budgets, ties)


def test_losses_are_real_numbers() -> None:
    with pytest.raises(ValueError, match="real"):
        Problem(np.array([[1 + 1j]]), {}, {})


def test_no_units_and_no_budgets() -> None:
    assert solve(Problem.ragged([], {"bits": []}, {"bits": 1.0})).objective == 0.0
    free = Problem.ragged([[3.0, 1.0], [2.0]], {"bits": [[1.0, 2.0], [1.0]]}, {})
    assert solve(free).choice.tolist() == [1, 0]
    assert solve(free).status == "optimal"


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="unknown method"):
        solve(larger_problem(np.random.default_rng(0)), method="guess")
