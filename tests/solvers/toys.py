"""Problems small enough for their optimum to be known, and what every search must hold on them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import sparse

from qcompiler.solvers.problem import Choice, Problem, Solution


def layers(seed: int, units: int = 10, target: float = 3.87) -> Problem:
    """Additive, like layers of a network: losses fall fourfold a bit and span decades; a budget of mean bits."""
    rng = np.random.default_rng(seed)
    bits = np.array([2.0, 3, 4, 5, 6, 8])
    weights = rng.choice([2**12, 3 * 2**12, 2**15, 2**18], units).astype(float)
    loss = np.exp(rng.normal(0, 1.5, (units, 1))) * 4.0**-bits * np.exp(rng.normal(0, 0.2, (units, 6)))
    return Problem(loss, {"bits": weights[:, None] * bits}, {"bits": float(int(weights.sum() * target))})


def quadratic(
    seed: int, units: int = 5, options: int = 3, pair_costs: bool = False, ties: bool = False, stored: str = "dense"
) -> Problem:
    """Signed terms between all units, a missing option, one budget; if wanted conversions, ties, sparse."""
    rng = np.random.default_rng(seed)
    size = units * options
    loss = np.sort(rng.uniform(0, 4, (units, options)))[:, ::-1].copy()
    loss[1, 0] = np.inf
    cross = rng.normal(0, 0.4, (size, size))
    cross += cross.T
    cost = np.cumsum(rng.integers(1, 9, (units, options)), axis=1).astype(float)
    conversions = {}
    if pair_costs:
        differ = 1.0 - np.eye(options)
        chain = np.eye(units, k=1) + np.eye(units, k=-1)
        conversions = {"bytes": sparse.csr_array(np.kron(chain, differ))}
    budget = float(int(0.55 * (cost[:, 0].sum() + cost[:, -1].sum()))) + (2.0 if pair_costs else 0.0)
    matrix = cross if stored == "dense" else sparse.csr_array(np.where(np.abs(cross) > 0.3, cross, 0))
    tied = ((0, units - 1),) if ties else ()
    return Problem(loss, {"bytes": cost}, {"bytes": budget}, tied, matrix, conversions)


def feasible_choices(problem: Problem) -> list[Choice]:
    """All choices within the budgets that respect the ties."""
    found: list[Choice] = []
    for options in itertools.product(*[np.flatnonzero(row) for row in problem.allowed]):
        choice = np.array(options, np.intp)
        if all(len({options[u] for u in group}) == 1 for group in problem.ties) and problem.feasible(choice):
            found.append(choice)
    return found


def assert_good_on(problem: Problem, found: Solution) -> None:
    """A search's answer to a toy with terms between units: sound, and among the best fiftieth of all choices."""
    losses = np.array([problem.objective(choice) for choice in feasible_choices(problem)])
    assert problem.feasible(found.choice)
    assert all(len({int(found.choice[u]) for u in group}) == 1 for group in problem.ties)
    assert found.objective == pytest.approx(problem.objective(found.choice))
    assert -np.inf < found.bound <= losses.min() + 1e-12
    assert found.objective <= np.quantile(losses, 0.02)


QUADRATIC = [
    quadratic(seed, pair_costs=bool(seed % 2), ties=seed % 3 == 0, stored="sparse" if seed % 4 > 1 else "dense")
    for seed in range(8)
]
ONE_OPTION = Problem(np.array([[3.0], [-1.0]]), {"bits": np.array([[1.0], [2.0]])}, {"bits": 3.0})
