"""SliM-LLM's constraint against brute force, and in a whole allocation."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from qcompiler.errors import BadOption, BudgetInfeasible, PassRefused
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.candidates import Menu
from qcompiler.passes.plan.pairs import Pairs
from qcompiler.passes.transform.split_panels import SplitPanels
from qcompiler.pipeline import Pipeline
from qcompiler.solvers.ilp import MANY_BUDGETS, solve_ilp
from qcompiler.solvers.problem import Problem
from tests.passes.transform.test_split_panels import plans, two_layers


def cut_model() -> Model:
    model = two_layers()
    Pipeline([SplitPanels(cut="equal", least=96)], verify=False).run(model)
    return model


def menus_of(model: Model) -> list[Menu]:
    found: list[Menu] = []
    for site in find_sites(model.ir):
        options = []
        for bits in (2, 3, 4, 5):
            plans(model, {site.name: bits})
            options.append(model.plan.sites[site.name])
        found.append(Menu(site, tuple(options)))
    return found


def test_the_program_finds_what_brute_force_finds() -> None:
    model = cut_model()
    pairs = Pairs.of(model, find_sites(model.ir), 4)
    menus = [pairs.narrowed(m) for m in menus_of(model)]
    bits = np.array([[plan.weight.bits for plan in m.plans] for m in menus], float)  # type: ignore[union-attr]
    assert bits.tolist() == [[3, 4, 5]] * 6
    columns = np.array([m.site.columns for m in menus])
    rng = np.random.default_rng(0)
    for _ in range(20):
        loss = np.exp(2 * rng.standard_normal((6, 1))) * np.exp2(-2 * bits) * np.exp(0.2 * rng.standard_normal((6, 3)))
        limit = float((4.05 * columns).sum())
        problem = pairs.held(Problem(loss, {"bits": columns[:, None] * bits}, {"bits": limit}), menus)
        assert len(problem.budgets) == 5
        least = np.inf
        for choice in product(range(3), repeat=6):
            up, down = (np.where(np.array(choice) == c, columns, 0).reshape(2, 3).sum(1) for c in (2, 0))
            if (up == down).all() and problem.used(np.array(choice), "bits") <= limit:
                least = min(least, problem.objective(np.array(choice)))
        found = solve_ilp(problem, 30)
        assert found.status == "optimal"
        assert found.objective == pytest.approx(least, rel=1e-9)


def test_hundreds_of_matrices_are_solved_to_optimality_without_prices() -> None:
    rng = np.random.default_rng(1)
    matrices, panels = MANY_BUDGETS, 3
    units = matrices * panels
    loss = np.exp(2 * rng.standard_normal((units, 1))) * np.exp2(-2.0 * np.array([2, 3, 4]))
    costs = {"bits": np.tile([2.0, 3.0, 4.0], (units, 1))}
    budgets = {"bits": 3.0 * units}
    least = 0.0
    for matrix in range(matrices):
        rows = slice(panels * matrix, panels * (matrix + 1))
        cost = np.zeros((units, 3))
        cost[rows] = [-1.0, 0.0, 1.0]
        costs |= {f"{matrix} up": cost, f"{matrix} down": -cost}
        budgets |= {f"{matrix} up": 0.0, f"{matrix} down": 0.0}
        even = [c for c in product(range(3), repeat=panels) if sum(c) == panels]
        least += min(sum(loss[rows][i, o] for i, o in enumerate(c)) for c in even)
    found = solve_ilp(Problem(loss, costs, budgets), 60)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(least, rel=1e-6)


def test_every_matrix_has_the_common_width_on_average() -> None:
    model = cut_model()
    Pipeline([Allocate(budget="5bits", bits=(2, 3, 4, 5, 6), pairs=4, samples=8)], verify=False).run(model)
    chosen = {site.name: model.plan.sites[site.name].weight for site in find_sites(model.ir)}
    for layer in ("fc1", "fc2"):
        widths = {s.name: (s.columns, chosen[s.name].bits) for s in find_sites(model.ir) if s.name.startswith(layer)}  # type: ignore[union-attr]
        assert len(widths) == 3
        assert sum(columns * (bits - 4) for columns, bits in widths.values()) == 0
        assert all(abs(bits - 4) <= 1 for _, bits in widths.values())
    assert len({spec.bits for spec in chosen.values() if spec}) > 1


def test_the_smallest_budget_is_the_smallest_with_pairs() -> None:
    def compiled(budget: str) -> None:
        passes = [Allocate(budget=budget, bits=(2, 3, 4, 5), pairs=4, samples=4)]
        Pipeline(passes, verify=False).run(cut_model())

    with pytest.raises(BudgetInfeasible, match=r"budget 3\.5bits cannot be met") as caught:
        compiled("3.5bits")
    least = re.search(r"enough would be (\S+bits)", str(caught.value))
    assert least
    assert float(least[1].removesuffix("bits")) > 4
    compiled(least[1])


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(PassRefused, match="split-panels"):
        Pipeline([Allocate(budget="4bits", pairs=4, samples=4)]).run(two_layers())
    with pytest.raises(BadOption, match="no option of 4 bits"):
        Pipeline([Allocate(budget="4bits", bits=(2, 3), pairs=4, samples=4)]).run(cut_model())
    for options in ({"pairs": 2}, {"pairs": 4, "method": "metropolis"}, {"pairs": 4, "pareto": 5}):
        with pytest.raises(BadOption, match="pairs"):
            Allocate(budget="4bits", **options)  # type: ignore[arg-type]
