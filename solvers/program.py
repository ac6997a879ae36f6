"""Run an integer program that PuLP describes, and say truly what came out of it."""

from __future__ import annotations

import math
import subprocess
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pulp

from qcompiler.solvers.clock import interrupted, interrupts_raise
from qcompiler.solvers.problem import Choice

ACCURACY = 1e-7  # of the integer solvers' bounds, on losses scaled to 1
_TOLERANCES: dict[str, Any] = {"mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}


@dataclass(frozen=True)
class Answer:
    """What an integer solver found out.

    Attributes:
        choice: int [units], or None where it found none.
        bound: of the program's objective; -inf where none is known.
        optimal: proven.
        infeasible: proven to have no choice at all.
    """

    choice: Choice | None
    bound: float
    optimal: bool
    infeasible: bool


def check_engine(engine: str) -> None:
    """Raise ValueError for an integer solver that is not known."""
    if engine not in ("highs", "cbc"):
        raise ValueError(f"unknown engine '{engine}': use highs or cbc")


def installed() -> str | None:
    """The integer solver that `run` takes: "highs", "cbc" where HiGHS is not usable, None where neither is."""
    if pulp.HiGHS(msg=False).available():
        return "highs"
    return "cbc" if pulp.PULP_CBC_CMD(msg=False).available() else None


def run(
    program: pulp.LpProblem,
    variables: dict[tuple[int, int], pulp.LpVariable],
    options: npt.NDArray[np.bool_],
    seconds: float,
    engine: str = "highs",
) -> Answer:
    """Solve a program whose one-hot variables are given by (unit, option).

    Args:
        program: a minimisation.
        variables: by (unit, option); of units that have one option there need be none.
        options: bool [units, options], which options there are; at least one a unit.
        seconds: after which it stops with what it has.
        engine: "highs", or "cbc" (also taken where HiGHS is not usable).

    Raises ValueError for another engine, or if none is installed.
    """
    check_engine(engine)
    limits: dict[str, Any] = {"msg": False, "timeLimit": seconds, "gapRel": 0.0, "gapAbs": 1e-9, "threads": 1}
    if engine == "highs" and pulp.HiGHS(msg=False).available():
        program.solve(pulp.HiGHS(**limits, **_TOLERANCES, callbackTuple=(_look_up, None), callbacksToActivate=_looks()))
        # PuLP calls a HiGHS run that timed out "Optimal": the bound is asked of HiGHS itself.
        model: Any = program.solverModel
        bound = float(model.getInfo().mip_dual_bound)
    else:
        cbc = pulp.PULP_CBC_CMD(**limits)
        if not cbc.available():
            raise ValueError("no integer solver is installed: pip install highspy")
        try:
            _solve_outside(program, cbc)
        except KeyboardInterrupt:
            if not interrupted():
                raise
            return Answer(None, -math.inf, False, False)
        bound = math.nan
    optimal = program.sol_status == pulp.LpSolutionOptimal
    infeasible = program.sol_status == pulp.LpSolutionInfeasible and program.status == pulp.LpStatusInfeasible
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Answer(None, bound if math.isfinite(bound) else -math.inf, False, infeasible)
    if math.isnan(bound):  # CBC tells no bound: its objective is one where it proved optimality
        bound = float(cast(float, pulp.value(program.objective))) if optimal else -math.inf
    share = np.where(options.sum(axis=1, keepdims=True) == 1, options, -1.0)
    for key, variable in variables.items():
        share[key] = variable.varValue or 0.0
    return Answer(share.argmax(axis=1), bound, optimal, False)


def _looks() -> list[Any]:
    """When HiGHS calls `_look_up`."""
    import highspy  # where it is missing, CBC is taken

    kinds: Any = highspy.cb.HighsCallbackType
    return [kinds.kCallbackMipInterrupt, kinds.kCallbackSimplexInterrupt]


def _look_up(_kind: object, _message: str, _given: object, wanted: Any, _data: object) -> None:
    """Called by HiGHS as it works, which gives Python a chance to see an interrupt at all."""
    if interrupted():
        wanted.user_interrupt = True


def _solve_outside(program: pulp.LpProblem, solver: Any) -> None:
    """Solve by a program of its own, which ends with us and whose files go away, even when we are interrupted."""
    # Two folders: an interrupt while the inner one is being emptied leaves it to the outer one.
    with (
        interrupts_raise(),
        tempfile.TemporaryDirectory(prefix="qcompiler-program-") as outer,
        tempfile.TemporaryDirectory(dir=outer) as own,
    ):
        solver.tmpDir = own
        try:
            program.solve(solver)
        except BaseException as error:
            _end_processes(error.__traceback__)
            raise


def _end_processes(trace: TracebackType | None) -> None:
    """Kill what the frames of a traceback have started: PuLP neither ends its process nor hands it out."""
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, subprocess.Popen) and value.pid:
                value.kill()
                value.wait()
        trace = trace.tb_next
