"""How often each solver is optimal on small random problems, and how large the gaps are at layer scale.

python benchmarks/allocation_brute_force.py [problems]
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qcompiler.solvers.certificate import check
from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.knapsack import solve_lagrangian
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem, Solution

SOLVERS: dict[str, Callable[[Problem], Solution]] = {"lagrangian": solve_lagrangian, "ilp": solve_ilp}


@dataclass
class Score:
    solved: int = 0
    optimal: int = 0
    not_found: int = 0
    broken: int = 0
    seconds: float = 0.0
    excess: list[float] = field(default_factory=list)


def random_problem(rng: np.random.Generator) -> Problem:
    """1 to 6 units of 1 to 4 options, losses over five decades, sometimes negative, one or two budgets."""
    units = int(rng.integers(1, 7))
    sizes = rng.integers(1, 5, units)
    loss = [np.sort(10 ** rng.uniform(-3, 2, n))[::-1] - rng.choice([0.0, 3.0], p=[0.7, 0.3]) for n in sizes]
    names = ["bytes", "seconds"][: int(rng.integers(1, 3))]
    costs = {name: [np.sort(rng.integers(1, 2000, n)).astype(float) for n in sizes] for name in names}
    share = rng.uniform(0, 1.1)
    budgets = {
        name: float(int(sum(r[0] for r in rows) + share * sum(r[-1] - r[0] for r in rows)))
        for name, rows in costs.items()
    }
    return Problem.ragged([r.tolist() for r in loss], {k: [r.tolist() for r in v] for k, v in costs.items()}, budgets)


def optimum(problem: Problem) -> float:
    choices = (np.array(c, np.intp) for c in itertools.product(*[np.flatnonzero(row) for row in problem.allowed]))
    return min((problem.objective(c) for c in choices if problem.feasible(c)), default=np.inf)


def layers(units: int, options: int, seed: int) -> Problem:
    """Losses that fall fourfold a bit, sizes of a transformer's matrices, 3.87 bits on average."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 8, options)
    weights = rng.choice([576 * 576, 576 * 192, 576 * 1536], (units, 1)).astype(float)
    loss = weights * np.exp(rng.normal(0, 1.5, (units, 1))) * 4.0**-bits * np.exp(rng.normal(0, 0.2, (units, options)))
    return Problem(loss, {"bits": weights * bits}, {"bits": float(weights.sum() * 3.87)})


def against_enumeration(count: int) -> None:
    rng = np.random.default_rng(0)
    scores = {name: Score() for name in SOLVERS}
    for _ in range(count):
        problem = random_problem(rng)
        best = optimum(problem)
        for name, solver in SOLVERS.items():
            judge(scores[name], solver, problem, best)
    for name, s in scores.items():
        worst, each = max(s.excess, default=0.0), 1e3 * s.seconds / s.solved
        print(
            f"{name:10s} solved {s.solved}, optimal {s.optimal} ({s.optimal / s.solved:.2%}), none found {s.not_found},"
        )
        print(f"{'':10s} false claims {s.broken}, worst excess {worst:.1%} of the loss span, {each:.2f} ms each")


def judge(score: Score, solver: Callable[[Problem], Solution], problem: Problem, best: float) -> None:
    start = time.perf_counter()
    try:
        solution = solver(problem)
    except InfeasibleProblem:
        score.broken += best < np.inf
        return
    except NoChoiceFound:
        score.not_found += best < np.inf
        return
    score.seconds += time.perf_counter() - start
    span = float(np.ptp(np.where(problem.allowed, problem.loss, problem.loss.min(axis=1, keepdims=True)), axis=1).sum())
    slack = 1e-9 * max(1.0, abs(best))
    score.solved += 1
    score.optimal += solution.objective <= best + slack
    score.excess.append((solution.objective - best) / (span or 1.0))
    score.broken += not check(problem, solution).valid or solution.bound > best + slack


def at_scale() -> None:
    for units, options in ((50, 6), (210, 6), (210, 10), (500, 6), (10_000, 6)):
        for name, solver in SOLVERS.items():
            start = time.perf_counter()
            solution = solver(layers(units, options, 0))
            seconds = time.perf_counter() - start
            print(f"{units:6d} x {options:2d} {name:10s} {solution.status:8s} gap {solution.gap:.1e} {seconds:6.2f} s")


if __name__ == "__main__":
    against_enumeration(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
    at_scale()
