"""How far solvers get in how long, on instances like measured ones; and against enumeration by the thousand.

    python benchmarks/allocation/solvers.py [--random 2000] [--only NAME]

Prints a Markdown table: gap and seconds of each family of instances (the worst of three seeds), then how many of the
random instances of up to 4096 choices were solved to proven optimality, and how many bounds were above the optimum.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from instances import coupled, low_rank

from qcompiler.solvers.certificate import check
from qcompiler.solvers.problem import InfeasibleProblem, NoChoiceFound, Problem
from qcompiler.solvers.solve import solve

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.solvers.test_quadratic import optimum, random_problem


def separable(units: int, options: int, seed: int) -> Problem:
    """Losses over ten decades, no terms between units."""
    rng = np.random.default_rng(seed)
    loss = np.sort(10.0 ** rng.uniform(-10, 0, (units, options)), axis=1)[:, ::-1]
    size = np.sort(rng.integers(1, 10_000, (units, options)), axis=1).astype(float)
    low, high = size.min(axis=1).sum(), size.max(axis=1).sum()
    return Problem(loss, {"size": size}, {"size": float(np.floor(low + 0.3 * (high - low)))})


FAMILIES: dict[str, tuple[Callable[[int], Problem], str, float]] = {
    "100 x 4, weak coupling": (lambda seed: coupled(100, 4, 0.1, seed), "auto", 60),
    "200 x 5, weak coupling": (lambda seed: coupled(200, 5, 0.1, seed), "auto", 120),
    "50 x 4, medium coupling, indefinite": (lambda seed: coupled(50, 4, 0.3, seed), "auto", 60),
    "100 x 4, medium coupling, indefinite": (lambda seed: coupled(100, 4, 0.3, seed), "auto", 60),
    "20 x 4, rank 48, strong": (lambda seed: low_rank(20, 4, 48, seed), "auto", 60),
    "50 x 4, rank 48, strong": (lambda seed: low_rank(50, 4, 48, seed), "auto", 60),
    "500 x 6, separable": (lambda seed: separable(500, 6, seed), "auto", 5),
    "1000000 x 6, separable": (lambda seed: separable(1_000_000, 6, seed), "lagrangian", 10),
}


def families(only: str) -> None:
    """The table of families."""
    print("| instances | deadline | worst gap | most seconds | status | method |\n|---|---|---|---|---|---|")
    for name, (build, method, deadline) in FAMILIES.items():
        if only not in name:
            continue
        found = []
        for seed in range(3):
            problem = build(seed)
            start = time.monotonic()
            solution = solve(problem, method, deadline)
            faults = check(problem, solution).faults if problem.units < 1000 else ()
            assert not faults, faults
            found.append((solution.gap, time.monotonic() - start, solution.status, solution.method))
        status = ", ".join(sorted({f[2] for f in found}))
        gap, seconds = max(f[0] for f in found), max(f[1] for f in found)
        print(f"| {name} | {deadline:.0f} s | {gap:.3%} | {seconds:.1f} | {status} | {found[0][3]} |", flush=True)


def enumerated(count: int) -> None:
    """Random instances against enumeration."""
    proven = right = above = infeasible = 0
    for seed in range(count):
        problem = random_problem(np.random.default_rng(10_000 + seed), 4096)
        if seed % 4 == 0:
            problem = replace(problem, cross=None, pair_costs={})
        best = optimum(problem)
        try:
            solution = solve(problem, deadline=10)
        except (InfeasibleProblem, NoChoiceFound):
            infeasible += 1
            assert not np.isfinite(best), f"seed {seed}: {best} is feasible"
            continue
        room = 1e-6 * max(abs(best), 1e-9) + 1e-9 * float(np.abs(problem.loss[problem.allowed]).max())
        proven += solution.status == "optimal"
        right += solution.objective <= best + room
        above += solution.bound > best + room
    solvable = count - infeasible
    print(f"\n{count} random instances, {infeasible} infeasible: {right} of {solvable} optimal, {proven} proven, "
          f"{above} bounds above the optimum")  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="solvers on made instances")
    parser.add_argument("--random", type=int, default=2000)
    parser.add_argument("--only", default="", help="part of a family's name")
    args = parser.parse_args()
    families(args.only)
    enumerated(args.random)


if __name__ == "__main__":
    main()
