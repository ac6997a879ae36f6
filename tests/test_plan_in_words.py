"""What `qcompile --explain` says of a plan: nothing that is not so, and what a latency came to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qcompiler.api import CompileResult
from qcompiler.commands.compile import _is_far_off, _print_plan
from qcompiler.formats import parse_spec
from qcompiler.pipeline import PassReport
from qcompiler.plan import Plan, SitePlan
from tests.report.test_decision import MEASURED, RUNS, SOLVED, TIMES


def explained(solution: dict[str, Any], **metrics: Any) -> CompileResult:
    plan = Plan({"a": SitePlan(parse_spec("int4"))}, solution)
    nothing: dict[str, float | None] = {"sqnr_db": None, "kl": None, "top1_agreement": None}
    gap = solution.get("gap")
    return CompileResult(
        None, "cpu", ("8ms",), 4.25, 1000, 8000, 0.12, None, gap, None, nothing, False, 1.0, 10**8, plan,
        [PassReport("allocate", metrics=metrics)],
    )  # fmt: skip


def shown(capsys: pytest.CaptureFixture[str], solution: dict[str, Any], **metrics: Any) -> dict[str, str]:
    _print_plan(explained(solution, **metrics))
    lines = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1].strip() for line in lines if len(line) > 1}


def test_a_gap_is_that_of_the_problem_that_was_solved(capsys: pytest.CaptureFixture[str]) -> None:
    whole = shown(capsys, SOLVED, measured=MEASURED, runs=RUNS)
    plain = shown(capsys, SOLVED | {"method": "ilp"}, measured=MEASURED, runs=RUNS | {"taken": 0})
    assert whole["gap to the bound"] == "1.00%"
    assert plain["gap to the bound"] == "1.00%, terms between layers left out"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "7.5 ms measured, budget 8 ms; faster than the allocation by bit operations (9 ms)"),
        ({"faster_than_by_bops": False, "by_bops": 7e-3}, "; NOT faster than the allocation by bit operations (7 ms)"),
        ({"same_as_by_bops": True}, "; the same allocation as by bit operations"),
    ],
)
def test_a_latency_is_compared(capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str) -> None:
    lines = shown(capsys, SOLVED, measured=MEASURED, latency={"seconds": TIMES | change, "seconds@4": TIMES})
    assert lines["time of a run"].endswith(words)
    assert "time of 4 samples" in lines


def test_without_a_latency_no_time_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [name for name in shown(capsys, SOLVED, measured=MEASURED, latency={}) if name.startswith("time")]


def test_what_is_no_loss_of_the_model_is_said_to_be_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, SOLVED)["predicted loss"] == "0.12"
    own = shown(capsys, SOLVED | {"loss_units": "errors of single layers"})
    assert own["predicted loss"] == "0.12 (no loss of the model: errors of single layers)"


@pytest.mark.parametrize(
    ("predicted", "realised", "units", "far"),
    [
        (0.12, 1.21, None, True),
        (0.12, 1.19, None, False),
        (1e-9, 0.09, None, False),  # next to nothing, both
        (1e-9, 0.11, None, True),
        (None, 9.0, None, False),
        (0.12, 9.0, "errors of single layers", False),
    ],
)
def test_a_loss_far_above_its_prediction_is_noticed(
    predicted: float | None, realised: float, units: str | None, far: bool
) -> None:
    result = replace(explained(SOLVED | {"loss_units": units}), predicted_loss=predicted, realised_loss=realised)
    assert _is_far_off(result) == far
