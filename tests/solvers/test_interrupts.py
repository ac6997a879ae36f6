"""A solve that is interrupted ends at once, leaves nothing behind, and the next one is as if it had not been."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.solvers import clock
from qcompiler.solvers.certificate import check
from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.k_best import k_best
from qcompiler.solvers.pareto import pareto
from qcompiler.solvers.problem import NoChoiceFound, Problem, Solution
from qcompiler.solvers.solve import METHODS, solve
from tests.solvers.toys import layers, quadratic

PAIRED = ("quadratic", "metropolis", "soft-mixture", "policy-search")  # methods that take terms between units
_SLOW = 3.0  # seconds: no step between two looks at a signal takes longer, on a busy machine


@contextmanager
def interrupted(seconds: float) -> Generator[list[float]]:
    """Ctrl-C after some seconds; gives the moment when it came, if it did."""
    came: list[float] = []

    def stop(*_: object) -> None:
        came.append(time.monotonic())
        raise KeyboardInterrupt

    with _alarm(stop, seconds):
        yield came


@contextmanager
def ctrl_c(*seconds: float) -> Generator[None]:
    """SIGINT to this process after some seconds, and again after some more."""
    left = [*seconds]

    def press(*_: object) -> None:
        left.pop(0)
        signal.setitimer(signal.ITIMER_REAL, left[0] if left else 0)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background shells
    try:
        with _alarm(press, seconds[0]):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _alarm(handler: Callable[..., None], seconds: float) -> Generator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def children() -> set[str]:
    """Processes of ours that still run."""
    listed = [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
    return {pid for pid in listed if _runs(pid)}


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def problem_for(method: str) -> Problem:
    return quadratic(3, 9, 4) if method in PAIRED else layers(3, 60)


SOLVES: dict[str, Any] = {
    **METHODS,
    "ilp by cbc": lambda problem, seconds: solve_ilp(problem, seconds, "cbc"),
    "k best": lambda problem, seconds: k_best(problem, 5, seconds)[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", SOLVES)
def test_an_interrupt_ends_a_solve_and_nothing_else(method: str, scratch: Path) -> None:
    solve, problem, chance = SOLVES[method], problem_for(method), random.Random(method)
    begin = time.monotonic()
    before, running = solve(problem, 20.0 if "search" not in method and method != "metropolis" else 1.0), children()
    usual = min(time.monotonic() - begin, 1.0)
    for _ in range(6):
        came: list[float] = []
        try:  # around all of it: the signal may come when the solve has just ended
            with interrupted(chance.uniform(0.05, 0.95) * usual) as came:
                found = solve(problem, 1.0)
        except KeyboardInterrupt:
            assert time.monotonic() - came[0] < _SLOW
        except NoChoiceFound:
            pytest.fail("a choice is easily found")
        else:
            assert problem.feasible(found.choice)
            assert check(problem, found).valid
        assert not list(scratch.iterdir())
        # a process that was just being started cannot be told to end, it ends when its time is over
        until = time.monotonic() + _SLOW
        while children() != running and time.monotonic() < until:
            time.sleep(0.02)
        assert children() == running
    if method in ("lagrangian", "ilp", "quadratic"):
        after = solve(problem, 20.0)
        assert after.objective == before.objective
        assert after.bound == pytest.approx(before.bound, rel=1e-6)


def test_the_process_of_cbc_ends_with_the_solve(scratch: Path) -> None:
    running = children()
    with pytest.raises(KeyboardInterrupt), interrupted(3.0):
        solve_ilp(busy(), 60.0, "cbc")
    assert children() == running
    assert not list(scratch.iterdir())


def busy() -> Problem:
    """Six random budgets keep integer solvers busy for minutes."""
    rng = np.random.default_rng(5)
    costs = {f"r{r}": rng.integers(1, 1000, (80, 5)).astype(float) for r in range(6)}
    budgets = {name: float(int(cost.mean(axis=1).sum() * 0.8)) for name, cost in costs.items()}
    return Problem(rng.uniform(1, 2, (80, 5)), costs, budgets)


@pytest.mark.parametrize("engine", ["highs", "cbc"])
def test_at_ctrl_c_a_solve_gives_its_best_and_a_bound(
    engine: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "ilp", lambda problem, seconds: solve_ilp(problem, seconds, engine))
    problem, running, begin = busy(), children(), time.monotonic()
    with ctrl_c(1.5):
        found = solve(problem, deadline=60.0)
    assert 1.5 <= time.monotonic() - begin < 1.5 + _SLOW
    assert found.status == "feasible"
    assert problem.feasible(found.choice)
    assert 0 < found.gap < 0.2
    assert check(problem, found).valid
    assert children() == running
    assert not list(scratch.iterdir())
    assert signal.getsignal(signal.SIGINT) is not None
    assert not clock.interrupted()


def test_at_ctrl_c_terms_between_units_give_their_best_too() -> None:
    problem, begin = quadratic(3, 60, 4), time.monotonic()
    with ctrl_c(1.0):
        found = solve(problem, deadline=60.0)
    assert time.monotonic() - begin < 1.0 + _SLOW
    assert check(problem, found).valid


def test_the_second_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(problem: Problem, seconds: float) -> Solution:
        time.sleep(seconds)
        raise NoChoiceFound("not reached")

    monkeypatch.setitem(METHODS, "ilp", deaf)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ctrl_c(0.2, 0.2):
        solve(busy(), deadline=20.0)
    assert time.monotonic() - begin < _SLOW


def test_without_a_choice_ctrl_c_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def hopeless(problem: Problem, seconds: float) -> Solution:
        until = time.monotonic() + seconds
        while clock.now() < until:
            time.sleep(0.01)
        raise NoChoiceFound("none")

    monkeypatch.setitem(METHODS, "ilp", hopeless)
    with pytest.raises(KeyboardInterrupt), ctrl_c(0.2):
        solve(busy(), deadline=20.0)
    with pytest.raises(NoChoiceFound):
        solve(busy(), deadline=0.1)


def test_at_ctrl_c_a_path_and_the_best_few_are_what_is_known_by_then() -> None:
    problem = busy()
    with ctrl_c(1.5):
        few = k_best(problem, 5, deadline=60.0)
    assert 1 <= len(few) <= 5
    assert all(problem.feasible(found.choice) for found in few)
    amounts = np.linspace(0.8, 1.2, 9) * problem.budgets["r0"]
    with ctrl_c(1.5):
        points = pareto(problem, "r0", amounts)
    assert 1 <= len(points) < 9


def test_where_a_solve_is_part_of_more_ctrl_c_ends_all() -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ctrl_c(1.0), clock.interrupts_raise():
        solve(busy(), deadline=60.0)
    assert time.monotonic() - begin < 1.0 + _SLOW  # HiGHS would have gone on to its deadline
