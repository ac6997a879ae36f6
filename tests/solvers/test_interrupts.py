"""A solve that is interrupted ends at once, leaves nothing behind, and the next one is as if it had not been."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.solvers.certificate import check
from qcompiler.solvers.ilp import solve_ilp
from qcompiler.solvers.k_best import k_best
from qcompiler.solvers.problem import NoChoiceFound, Problem
from qcompiler.solvers.solve import METHODS
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

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield came
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
    """Six random budgets keep it busy for minutes."""
    rng, running = np.random.default_rng(5), children()
    costs = {f"r{r}": rng.integers(1, 1000, (80, 5)).astype(float) for r in range(6)}
    budgets = {name: float(int(cost.mean(axis=1).sum() * 0.8)) for name, cost in costs.items()}
    problem = Problem(rng.uniform(1, 2, (80, 5)), costs, budgets)

    with pytest.raises(KeyboardInterrupt), interrupted(3.0):
        solve_ilp(problem, 60.0, "cbc")
    assert children() == running
    assert not list(scratch.iterdir())
