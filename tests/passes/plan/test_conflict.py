"""Budgets that cannot be met: which of them, what would be enough, and found before anything is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.budget import parse_budget
from qcompiler.calibration import Calibration
from qcompiler.errors import BudgetInfeasible
from qcompiler.formats import parse_spec
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.plan import allocate
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.candidates import Menu
from qcompiler.passes.plan.conflict import conflict, require_feasible
from qcompiler.passes.plan.ledger import Ledger, Priced
from qcompiler.passes.plan.pairs import Pairs
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent

PLANS = tuple(SitePlan(parse_spec(f"int{bits}-sym-channel-fp32")) for bits in (2, 4, 8))


def model_of() -> Model:
    """Two products of 64 x 64 weights."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(64, 64)).astype(np.float32), n) for n in "ab"]
    nodes = [helper.make_node("MatMul", [x, w], [y], name=w) for x, w, y in (("x", "a", "h"), ("h", "b", "y"))]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 64]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = Model(ir.from_proto(made))
    model.calibration = Calibration.from_arrays({"x": rng.normal(size=(16, 64)).astype(np.float32)}, model.ir)
    return model


@pytest.fixture
def ledger() -> Ledger:
    """Where fewer bits take more time: 2.5, 4.5 and 8.5 bits a weight, 5, 3 and 1 ms a product and 1 ms beside."""
    model = model_of()
    sites = find_sites(model.ir)
    found = Ledger.of(model, sites, [Menu(site, PLANS) for site in sites], ())
    return found.with_prices({"seconds": Priced([[5e-3, 3e-3, 1e-3]] * 2, 1e-3)})


def message(ledger: Ledger, *budgets: str) -> str:
    asked = [parse_budget(text) for text in budgets]
    ledger.require_feasible(asked, ())
    with pytest.raises(BudgetInfeasible) as caught:
        require_feasible(ledger, asked, (), Pairs())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_budgets_that_exclude_each_other_say_what_would_be_enough(ledger: Ledger) -> None:
    found = message(ledger, "3bits", "5ms")
    assert "the budgets 3bits and 5ms cannot be met together" in found
    # 5 ms beside 1 ms: 1 + 3 ms, that is 4.5 and 8.5 bits; 3 bits: twice 2.5, that is 11 ms
    assert "enough would be 6.5000bits or 11.01ms if the others stay" in found


def test_a_budget_that_is_in_no_ones_way_is_not_named(ledger: Ledger) -> None:
    found = message(ledger, "3bits", "1GB", "5ms")
    assert "the budgets 3bits and 5ms cannot be met together" in found
    assert "1GB" not in found


def test_of_one_resource_the_tightest_counts(ledger: Ledger) -> None:
    assert "3bits and 5ms" in message(ledger, "9bits", "3bits", "5ms", "1s")


@pytest.mark.parametrize("budgets", [("6.5bits", "5ms"), ("3bits", "11.01ms"), ("3bits",), ("3bits", "4bits")])
def test_budgets_that_can_be_met_are(ledger: Ledger, budgets: tuple[str, ...]) -> None:
    require_feasible(ledger, [parse_budget(text) for text in budgets], (), Pairs())


def test_ties_hold_where_budgets_are_held_against_each_other(ledger: Ledger) -> None:
    asked = [parse_budget(text) for text in ("6.5bits", "5ms")]
    with pytest.raises(BudgetInfeasible, match=r"enough would be 8\.5000bits or 7\.001ms"):
        require_feasible(ledger, asked, ((0, 1),), Pairs())


def test_each_budget_that_cannot_be_met_alone_is_named(ledger: Ledger) -> None:
    asked = [parse_budget(text) for text in ("2bits", "2ms", "9kB")]
    with pytest.raises(BudgetInfeasible) as caught:
        ledger.require_feasible(asked, ())
    assert "the budgets 2bits and 2ms cannot be met" in str(caught.value)
    assert "the smallest feasible budgets are 2.5000bits and 3.001ms and 2.56000kB, each alone" in str(caught.value)


def test_options_that_must_not_be_taken_are_not_offered_as_enough(ledger: Ledger) -> None:
    asked = [parse_budget("3bits")]
    problem = ledger.problem([[np.inf, 1.0, 0.0]] * 2, asked, ())
    assert str(conflict(ledger, problem, asked)) == "the budget 3bits cannot be met; enough would be 4.5000bits"
    assert str(conflict(ledger, problem, asked, proven=False)).startswith("no allocation was found that meets 3bits;")


def test_conflicts_are_found_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocate, "measured_losses", lambda *_: pytest.fail("measured"))
    fewest = 2 * 64 * 64 * 32 * 2
    with pytest.raises(BudgetInfeasible, match=r"the budget 2\.1bits cannot be met"):
        Allocate(budget=("2.1bits", f"{fewest}bops")).run(model_of(), Silent())


def test_infinite_losses_that_leave_no_choice_are_told_in_the_budgets_units() -> None:
    """The narrowest format makes the output infinite."""
    model = model_of()
    narrow = allocate.measured_losses

    def measured(*args: object) -> allocate.Losses:
        found = narrow(*args)  # type: ignore[arg-type]
        return allocate.Losses([[np.inf, *row[1:]] for row in found.rows], found.noise, None, found.facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "measured_losses", measured)
        with pytest.raises(BudgetInfeasible, match=r"the budget 2\.6bits cannot be met; enough would be 3\..*bits"):
            Allocate(budget=("2.6bits",)).run(model, Silent())
