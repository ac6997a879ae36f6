"""Times on a fake machine, whose clock stands still but for the work that it does."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.formats import parse_spec
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.latency import Effort, Part, Shapes, Times, interleaved
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent


@dataclass
class Machine:
    """A clock and a scheduler; each run of a work takes the next of its durations, then the last one for good."""

    time: float = 0.0
    preempted: int = 0

    def work(self, *durations: float, preempted: Sequence[int] = ()) -> Callable[[], None]:
        """A run; those of the given numbers are interrupted by another process."""
        count = 0

        def run() -> None:
            nonlocal count
            self.time += durations[min(count, len(durations) - 1)]
            self.preempted += count in preempted
            count += 1

        return run

    def interleaved(self, effort: Effort, **runs: Callable[[], None]) -> dict[str, float]:
        return interleaved(runs, effort, lambda: self.time, lambda: self.preempted)


def test_the_least_of_the_windows_medians_is_taken() -> None:
    machine = Machine()
    warm_up, busy, quiet = [100.0], [9.0, 9.0, 9.0], [1.0, 7.0, 2.0]
    found = machine.interleaved(Effort(2, 3, 1, 1e9), a=machine.work(*warm_up, *busy, *quiet))
    assert found == {"a": 2.0}


def test_interrupted_runs_do_not_count_where_others_are_left() -> None:
    machine = Machine()
    run = machine.work(50.0, 60.0, 3.0, preempted=[0, 1])
    assert machine.interleaved(Effort(1, 3, 0, 1e9), a=run) == {"a": 3.0}


def test_where_all_runs_are_interrupted_the_processor_time_counts_if_it_is_less() -> None:
    machine = Machine()
    run = machine.work(50.0, 40.0, 60.0, preempted=[0, 1, 2])
    assert machine.interleaved(Effort(1, 3, 0, 1e9), a=run)["a"] < 1.0
    run = machine.work(0.0, preempted=[0, 1, 2])
    assert machine.interleaved(Effort(1, 3, 0, 1e9), a=run) == {"a": 0.0}


def test_runs_take_turns_in_both_orders() -> None:
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) for name in "abc"}, Effort(1, 2, 0, 1e9))
    assert order == ["c", "b", "a", "a", "b", "c"]


def test_time_ends_the_windows_but_not_the_first() -> None:
    machine, effort = Machine(), Effort(windows=5, rounds=4, warm=0, seconds=2.0)
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        machine.time += 1.0

    assert machine.interleaved(effort, a=run) == {"a": 1.0}
    assert runs == 4


@dataclass
class FakeClock:
    """A work is a number of seconds."""

    machine: str = "one"
    built: list[list[Hashable]] = field(default_factory=list[list[Hashable]])
    world: Machine = field(default_factory=Machine)
    broken: float | None = None

    def parts(self, site: Site, plan: SitePlan, shapes: Shapes) -> list[Part]:
        """A product that takes as long as its weight has bits times its rows, and half a preparation of 1 s."""
        assert site.activation is not None
        if plan.weight is None:
            return []
        return [Part(1.0, 0.5), Part(float(plan.weight.bits * shapes[str(site.activation.name)][0]))]

    def build(self, works: Sequence[Any]) -> Callable[[Any], Callable[[], object]]:
        self.built.append(list(works))

        def prepare(work: Any) -> Callable[[], None]:
            if work == self.broken:
                raise KeyboardInterrupt
            return self.world.work(work)

        return prepare

    def times(self, cache: Cache | None = None, effort: Effort | None = None) -> Times:
        return Times(self, cache, effort or Effort(1, 1, 0), lambda: self.world.time, lambda: 0)


def two_sites() -> list[Site]:
    weights = [numpy_helper.from_array(np.ones((4, 4), np.float32), name) for name in ("a", "b")]
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return find_sites(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])))


def test_a_table_sums_shares_and_measures_equal_work_once() -> None:
    clock, plans = FakeClock(), [SitePlan(parse_spec("int4")), SitePlan(parse_spec("int8")), SitePlan(None)]
    table = clock.times().table(two_sites(), [plans, plans], {"x": (3, 4), "h": (3, 4)}, Silent())
    assert table == [[12.5, 24.5, 0.0]] * 2
    assert clock.built == [[1.0, 12.0, 24.0]]


def test_what_was_measured_on_this_machine_is_not_measured_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert FakeClock().times(cache).measure([2.0, 3.0], Silent()) == {2.0: 2.0, 3.0: 3.0}
    again = FakeClock()
    assert again.times(cache).measure([3.0, 4.0], Silent()) == {3.0: 3.0, 4.0: 4.0}
    assert again.built == [[4.0]]


@pytest.mark.parametrize(("machine", "effort"), [("two", Effort(1, 1, 0)), ("one", Effort(2, 3, 1))])
def test_other_kernels_machines_and_efforts_have_times_of_their_own(
    tmp_path: Path, machine: str, effort: Effort
) -> None:
    FakeClock().times(Cache(tmp_path)).measure([2.0], Silent())
    other = FakeClock(machine)
    other.times(Cache(tmp_path), effort).measure([2.0], Silent())
    assert other.built == [[2.0]]


def test_a_killed_measurement_keeps_what_it_had(tmp_path: Path) -> None:
    works: list[Hashable] = [float(i) for i in range(1, 81)]
    killed = FakeClock(broken=80.0)
    with pytest.raises(KeyboardInterrupt):
        killed.times(Cache(tmp_path)).measure(works, Silent())
    again = FakeClock()
    again.times(Cache(tmp_path)).measure(works, Silent())
    assert again.built == [works[64:]]


def test_a_process_counts_its_preemptions_upwards() -> None:
    found = interleaved({"a": lambda: sum(range(1000))}, Effort(1, 3, 0))
    assert 0 < found["a"] < 1
