"""Latency and bit operations as budgets: prices, corrections and reports on a target whose times are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.budget import parse_budget
from qcompiler.calibration import Calibration
from qcompiler.errors import BadOption, BudgetInfeasible, PassRefused
from qcompiler.formats import parse_spec
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure import latency
from qcompiler.measure.cache import Cache
from qcompiler.measure.latency import Part, Shapes
from qcompiler.model import Model
from qcompiler.passes.plan import measured
from qcompiler.passes.plan.allocate import Allocate
from qcompiler.passes.plan.candidates import Menu
from qcompiler.passes.plan.ledger import Ledger, Priced
from qcompiler.passes.plan.measured import Measured
from qcompiler.passes.plan.trial import lowered, trial_seconds
from qcompiler.plan import Plan, SitePlan
from qcompiler.progress import Progress, Silent
from qcompiler.solvers.problem import InfeasibleProblem, Problem, Solution
from qcompiler.solvers.solve import solve

PLANS = (SitePlan(parse_spec("int2")), SitePlan(parse_spec("int4")), SitePlan(parse_spec("int8")))
LOSSES = [[9.0, 3.0, 1.0], [6.0, 4.0, 0.5], [5.0, 2.0, 0.1]]
PARTS = {2: 1e-3, 4: 2e-3, 8: 5e-3}  # seconds of every site's kernel, by bits


def model_of(rows: int | str = "n", samples: int = 4) -> Model:
    """Three products in a row, the last one wider."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 4), "b": (4, 4), "c": (4, 8)}
    weights = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in shapes.items()]
    chain = [("x", "a", "h"), ("h", "b", "k"), ("k", "c", "y")]
    nodes = [helper.make_node("MatMul", [x, w], [y], name=w) for x, w, y in chain]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [rows, s]) for n, s in (("x", 4), ("y", 8))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = Model(ir.from_proto(made))
    model.calibration = Calibration.from_arrays({"x": rng.normal(size=(samples, 4)).astype(np.float32)}, model.ir)
    return model


class Clock:
    """Kernels that take no time; the times come from the patched `interleaved`."""

    machine = "fake"

    def parts(self, site: Site, plan: SitePlan, shapes: Shapes) -> Sequence[Part]:
        assert plan.weight is not None
        assert site.activation is not None
        return [Part((plan.weight.bits, shapes[str(site.activation.name)][0]))]

    def build(self, works: Sequence[Any]) -> Callable[[Any], Callable[[], object]]:
        return lambda work: lambda: None


@dataclass(frozen=True)
class Target:
    """A target that can be timed."""

    name: str = "fake"

    def clock(self) -> Clock:
        return Clock()


@dataclass
class Bench:
    """What artifacts take: `fixed` and `factor` times their parts; counts what is built."""

    fixed: float = 1e-3
    factor: float = 1.0
    built: list[list[Plan]] = field(default_factory=list[list[Plan]])

    def seconds(self, model: Model, plans: Sequence[Plan], *_rest: object) -> list[float]:
        self.built.append(list(plans))
        return [self.fixed + self.factor * sum(PARTS[p.weight.bits] for p in plan.sites.values() if p.weight)
                for plan in plans]  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(measured, "trial_seconds", made.seconds)
    monkeypatch.setattr(measured, "preemptions", lambda: 0)
    monkeypatch.setattr(latency, "interleaved", lambda runs, *_: {work: work[1] * PARTS[work[0]] for work in runs})
    return made


def parts_of(*budgets: str, model: Model | None = None, target: Any = None) -> tuple[Measured, Ledger]:
    model = model or model_of()
    sites = find_sites(model.ir)
    ledger = Ledger.of(model, sites, [Menu(site, PLANS) for site in sites], ())
    backend: Any = target or Target()
    return Measured(model, backend, sites, [parse_budget(b) for b in budgets], Silent()), ledger


def solving(problem: Problem) -> Solution:
    try:
        return solve(problem)
    except InfeasibleProblem as error:
        raise BudgetInfeasible(str(error)) from error


def posing(work: Measured) -> Callable[[Ledger], Problem]:
    return lambda ledger: ledger.problem(LOSSES, work.budgets, ())


def least_loss(costs: list[list[float]], room: float) -> float:
    """By enumeration."""
    choices = itertools.product(range(3), repeat=3)
    fitting = [c for c in choices if sum(costs[u][o] for u, o in enumerate(c)) <= room + 1e-12]
    return min(sum(LOSSES[u][o] for u, o in enumerate(c)) for c in fitting)


def answer(work: Measured, ledger: Ledger) -> tuple[Ledger, Solution]:
    ledger = work.price(ledger, ())
    return work.confirm(ledger, solving(posing(work)(ledger)), posing(work), solving)


def test_budgets_that_are_stored_cost_nothing(bench: Bench) -> None:
    work, ledger = parts_of("300bits", "1MB", target=object())
    assert work.price(ledger, ()) is ledger
    solution = solving(posing(work)(ledger))
    assert work.confirm(ledger, solution, posing(work), solving) == (ledger, solution)
    assert (bench.built, work.facts) == ([], {})


def test_bit_operations_are_counted_by_hand_and_kept_to(bench: Bench) -> None:
    work, ledger = parts_of("8kbops", target=object())
    ledger = work.price(ledger, ())
    costs = [[weights * 32.0 * b for b in (2, 4, 8)] for weights in (16, 16, 32)]
    assert ledger.priced["bops"] == Priced(costs)
    solution = solving(posing(work)(ledger))
    assert ledger.problem(LOSSES, work.budgets, ()).used(solution.choice, "bops") <= 8000
    assert solution.objective == least_loss(costs, 8000)
    assert work.confirm(ledger, solution, posing(work), solving) == (ledger, solution)
    assert work.facts == {"bops": ledger.problem(LOSSES, work.budgets, ()).used(solution.choice, "bops")}
    assert bench.built == []


def test_sites_without_options_count_their_float_bit_operations() -> None:
    model = model_of()
    sites = find_sites(model.ir)
    ledger = Ledger.of(model, sites, [Menu(sites[0], PLANS), Menu(sites[1], ())], [sites[2].name])
    work = Measured(model, Target(), sites, [parse_budget("1Mbops")], Silent())  # type: ignore[arg-type]
    assert work.price(ledger, ()).priced["bops"].fixed == (16 + 32) * 32 * 32


def test_the_part_that_no_format_changes_is_what_the_fastest_artifact_takes_beyond_its_parts(bench: Bench) -> None:
    work, ledger = parts_of("8ms")
    priced = work.price(ledger, ()).priced["seconds"]
    assert priced.costs == [[1e-3, 2e-3, 5e-3]] * 3
    assert priced.fixed == pytest.approx(1e-3)
    assert [[p.weight.bits for p in plan.sites.values() if p.weight] for plan in bench.built[0]] == [[2, 2, 2]]


def test_a_whole_that_is_faster_than_its_parts_has_no_negative_rest(bench: Bench) -> None:
    bench.fixed, bench.factor = 0.0, 0.5
    work, ledger = parts_of("8ms")
    assert work.price(ledger, ()).priced["seconds"].fixed == 0.0


def test_a_latency_is_kept_and_used(bench: Bench) -> None:
    work, ledger = parts_of("8ms")
    ledger, solution = answer(work, ledger)
    facts = work.facts["seconds"]
    assert facts["measured"] <= 8e-3
    assert facts["tries"][0]["error"] == pytest.approx(0.0)
    assert solution.objective == least_loss([[1e-3, 2e-3, 5e-3]] * 3, 7e-3)


def test_where_the_sum_of_parts_is_too_low_the_rest_is_corrected_until_the_artifact_keeps_the_latency(
    bench: Bench,
) -> None:
    bench.fixed, bench.factor = 0.0, 1.5
    work, ledger = parts_of("9ms")
    priced = work.price(ledger, ())
    first = solving(posing(work)(priced))
    ledger, solution = work.confirm(priced, first, posing(work), solving)
    facts = work.facts["seconds"]
    assert facts["tries"][0]["measured"] > 9e-3
    assert facts["tries"][0]["error"] < 0
    assert facts["measured"] <= 9e-3
    assert solution.objective > first.objective


def test_room_that_the_sum_of_parts_leaves_unused_is_used(bench: Bench) -> None:
    """The fastest artifact has a hiccup when it is timed: the rest seems larger than it is."""
    work, ledger = parts_of("9.1ms")
    bench.fixed = 4e-3
    ledger = work.price(ledger, ())
    bench.fixed = 1e-3
    first = solving(posing(work)(ledger))
    _, solution = work.confirm(ledger, first, posing(work), solving)
    assert solution.objective == least_loss([[1e-3, 2e-3, 5e-3]] * 3, 8e-3) < first.objective
    assert work.facts["seconds"]["measured"] <= 9.1e-3


def test_the_least_slow_is_taken_and_told_where_nothing_keeps_the_latency(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, ledger = parts_of("4.5ms")
    priced = work.price(ledger, ())
    notes: list[str] = []
    monkeypatch.setattr(work.progress, "note", notes.append)
    bench.fixed = 2e-3  # the machine has become slower since
    _, solution = work.confirm(priced, solving(posing(work)(priced)), posing(work), solving)
    assert list(solution.choice) == [0, 0, 0]
    assert any("no artifact kept to the latency" in note and "11.1%" in note for note in notes)


def test_the_report_says_which_allocation_is_faster(bench: Bench) -> None:
    work, ledger = parts_of("8ms")
    ledger, solution = answer(work, ledger)
    facts = work.facts["seconds"]
    assert facts["loss_by_bops"] <= facts["loss"] == solution.objective
    assert facts["faster_than_by_bops"] == (facts["measured"] < facts["by_bops"])
    assert len(bench.built[-1]) == 2 - facts["same_as_by_bops"]


def test_terms_between_sites_count_in_the_allocation_by_bit_operations(bench: Bench) -> None:
    work, ledger = parts_of("8ms")
    ledger = work.price(ledger, ())
    cross = np.zeros((9, 9))
    cross[0, 3] = cross[3, 0] = 50.0  # two bits for both a and b
    problem = replace(posing(work)(ledger), cross=cross)
    chosen = np.array([1, 0, 1])
    solution = replace(solving(posing(work)(ledger)), choice=chosen, objective=problem.objective(chosen))
    other = measured._fewest_bops(problem, solution)
    assert problem.objective(other) <= solution.objective
    assert problem.used(other, "bops") <= problem.used(chosen, "bops") + 2048


def test_an_impossible_latency_names_the_smallest_possible(bench: Bench) -> None:
    work, ledger = parts_of("3ms")
    with pytest.raises(BudgetInfeasible, match=r"4\.00[01]ms; most room takes .*1\.00[01]ms"):
        work.price(ledger, ()).require_feasible(work.budgets, ())


def test_an_impossible_number_of_bit_operations_names_the_smallest_possible() -> None:
    work, ledger = parts_of("1kbops")
    with pytest.raises(BudgetInfeasible, match=r"4\.09600kbops; most room takes c"):
        work.price(ledger, ()).require_feasible(work.budgets, ())


def test_ties_hold_for_the_fastest_artifact(bench: Bench) -> None:
    work, ledger = parts_of("8ms")
    ties = ((0, 1),)
    ledger = work.price(ledger, ties)
    assert ledger.problem(LOSSES, work.budgets, ties).ties == ties
    chosen = bench.built[0][0].sites
    assert chosen["a"] == chosen["b"]


def test_latencies_of_several_samples_are_another_resource(bench: Bench) -> None:
    work, ledger = parts_of("8ms", "30ms@4", "9ms")
    priced = work.price(ledger, ()).priced
    assert set(priced) == {"bops", "seconds", "seconds@4"}
    assert priced["seconds@4"].costs[0] == pytest.approx([4e-3, 8e-3, 20e-3])
    assert [budget.text for budget in work.timed] == ["8ms", "30ms@4"]


@pytest.mark.parametrize(("model", "reason"), [
    (model_of(rows=1), "a run takes 1"),
    (model_of(samples=3), "there are only 3"),
])  # fmt: skip
def test_samples_that_cannot_run_at_once_are_refused(model: Model, reason: str) -> None:
    work, ledger = parts_of("8ms@4", model=model)
    with pytest.raises(BadOption, match=reason):
        work.price(ledger, ())


def test_a_target_without_clock_says_so_in_one_line() -> None:
    @dataclass
    class Untimed:
        name: str = "onnx"

    work, ledger = parts_of("8ms", target=Untimed())
    with pytest.raises(BadOption, match=r"target onnx cannot measure times.*use --target cpu"):
        work.price(ledger, ())


def test_without_data_there_is_nothing_to_measure_on() -> None:
    work, ledger = parts_of("8ms")
    work.model.calibration = None
    with pytest.raises(PassRefused, match="need calibration data"):
        work.price(ledger, ())


def test_neither_kernels_nor_artifacts_are_timed_twice(bench: Bench, tmp_path: Path) -> None:
    work, ledger = parts_of("8ms")
    work.model.cache = Cache(tmp_path)
    _, solution = answer(work, ledger)
    count = len(bench.built)
    again, ledger = parts_of("8ms")
    again.model.cache = Cache(tmp_path)
    assert np.array_equal(answer(again, ledger)[1].choice, solution.choice)
    assert again.facts == work.facts
    assert len(bench.built) == count


def test_what_a_busy_machine_takes_is_told_and_not_kept(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "preemptions", itertools.count(step=1000).__next__)
    notes: list[str] = []
    for _ in range(2):
        work, ledger = parts_of("8ms")
        monkeypatch.setattr(work.progress, "note", notes.append)
        work.model.cache = Cache(tmp_path)
        work.price(ledger, ())
    assert len(bench.built) == 2
    assert sum("the machine is busy" in note for note in notes) == 2


def test_another_model_is_timed_anew(bench: Bench, tmp_path: Path) -> None:
    for rows in ("n", 1):
        work, ledger = parts_of("8ms", model=model_of(rows))
        work.model.cache = Cache(tmp_path)
        work.price(ledger, ())
    assert len(bench.built) == 2


class Sleepy:
    """A target whose artifacts do nothing."""

    name = "sleepy"

    def __init__(self) -> None:
        self.compiled: list[Model] = []

    def compile(self, model: Model, folder: Path, progress: Progress) -> None:
        self.compiled.append(model)

    def load(self, folder: Path) -> Any:
        return self

    def run(self, feeds: Any) -> dict[str, Any]:
        return {}


def test_trials_leave_the_model_alone() -> None:
    model, backend = model_of(), Sleepy()
    plan = Plan({"a": PLANS[0], "b": SitePlan(parse_spec("int8"), "static"), "c": PLANS[2]})
    found = trial_seconds(model, [plan, plan], backend, {}, Silent(), latency.Effort(1, 2, 0))  # type: ignore[arg-type]
    assert len(found) == 2
    assert (model.plan, model.weights, model.ranges, model.lowered) == (Plan(), {}, {}, False)
    assert all(m.lowered for m in backend.compiled)
    kinds = [node.op_type for node in lowered(model, plan).graph]
    assert kinds.count("DequantizeLinear") == 4
    assert kinds.count("QuantizeLinear") == 1
    assert Fraction(found[0]) >= 0


def test_allocate_keeps_to_bit_operations() -> None:
    model = model_of(samples=16)
    report = Allocate(budget=("6kbops",), bits=(2, 4, 8), activations="float").run(model, Silent())
    assert 0 < report.metrics["latency"]["bops"] <= 6000
    assert {plan.weight.bits for plan in model.plan.sites.values() if plan.weight} != {8}


def test_allocate_foresees_that_a_target_has_no_clock() -> None:
    with pytest.raises(BadOption, match="target onnx cannot measure times"):
        Allocate(budget=("8ms",), target="onnx").foresee(model_of())


def test_allocate_times_the_artifacts_of_target_cpu() -> None:
    pytest.importorskip("tvm")
    model = model_of(samples=16)
    facts = Allocate(budget=("1s", "8MB"), target="cpu", bits=(4, 8)).run(model, Silent()).metrics["latency"]
    assert 0 < facts["seconds"]["fixed"] <= facts["seconds"]["fastest"] < 1
    assert 0 < facts["seconds"]["measured"] < 1
    assert set(model.plan.sites) == {"a", "b", "c"}
