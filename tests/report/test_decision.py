"""How an allocation was decided, as the report tells it: from the metrics of passes to words and bars."""

from __future__ import annotations

import json
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from qcompiler.pipeline import PassReport
from qcompiler.report import allocation_plots
from qcompiler.report.decision import decision, latencies
from qcompiler.report.html import render
from tests.report.test_html import data

MEASURED = {"mode": "tail", "samples": 512, "probes": 30, "seconds": 1.25, "method": "gram", "cross terms": True}
SOLVED = {
    "method": "quadratic", "status": "feasible", "predicted_loss": 0.12, "lower_bound": 0.1188, "gap": 0.01,
    "seconds": 0.5,
}  # fmt: skip
RUNS = {
    "methods": ["ilp", "quadratic", "quadratic"], "predicted": [0.11, 0.12, 0.13], "true": [0.2, 0.15, math.inf],
    "gains": [0.0, 0.05, math.nan], "errors": [0.0, 0.0101, math.inf], "margin": 2.0, "taken": 1, "gain": 0.05,
    "noise": 0.0101, "samples": 47,
}  # fmt: skip
TIMES = {
    "budget": 8e-3, "fastest": 5e-3, "fixed": 1e-3, "taken": 1, "measured": 7.5e-3, "by_bops": 9e-3,
    "same_as_by_bops": False, "faster_than_by_bops": True, "loss": 0.1, "loss_by_bops": 0.1,
    "tries": [
        {"predicted": 7.9e-3, "fixed": 1e-3, "measured": 8.8e-3, "error": 7.9 / 8.8 - 1},
        {"predicted": 7.2e-3, "fixed": 1.9e-3, "measured": 7.6e-3, "error": 7.2 / 7.6 - 1},
    ],
}  # fmt: skip


def reports(**metrics: Any) -> list[PassReport]:
    return [PassReport("smooth"), PassReport("allocate", metrics=metrics), PassReport("nearest")]


def words(**metrics: Any) -> str:
    """The text of a page, in one line."""
    solution = metrics.pop("solution", SOLVED)
    made = reports(**metrics)
    page = render(data() | {"decision": decision(made, solution), "latencies": latencies(made)})
    visible = re.sub(r"<(script|style).*?</\1>|<title>.*?</title>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub("<.*?>", " ", visible).split())


def test_where_the_losses_came_from_and_what_was_proven() -> None:
    text = words(measured=MEASURED, runs=RUNS)
    assert "on 512 calibration samples; formats above 5 bits were mostly told from narrower ones" in text
    assert "30 new runs of the model, 1.2 s" in text
    assert "quadratic: predicted loss 0.12, proven bound 0.1188, gap 1.00 %, 0.5 s" in text
    assert "proven optimal" not in text


def test_why_an_answer_was_taken() -> None:
    text = words(measured=MEASURED, runs=RUNS)
    assert "number 2 was taken: it loses 0.05 ± 0.01 less than the first, more than 2 standard errors" in text
    assert "2 quadratic 0.12 0.15 -0.05 ± 0.01 yes" in text
    assert "3 quadratic 0.13 infinite –" in text
    assert "counted, but for the first allocation below" in text
    kept = words(measured=MEASURED, runs=RUNS | {"taken": 0, "gain": 0.0, "noise": 0.0})
    assert "the first was taken: no other lost less by more than 2 standard errors of the difference" in kept
    broken = words(measured=MEASURED, runs=RUNS | {"true": [math.inf, 0.15, 0.2]})
    assert "number 2 was taken: the first makes the output infinite" in broken


def test_a_plain_answer_is_said_to_be_one() -> None:
    plain = SOLVED | {"method": "ilp", "status": "optimal", "gap": 0.0}
    runs = RUNS | {"taken": 0}
    assert "ilp, proven optimal" in words(measured=MEASURED, runs=runs, solution=plain)
    assert "loss and bound are those without terms between layers" in words(
        measured=MEASURED, runs=runs, solution=plain
    )
    alone = words(measured=MEASURED | {"cross terms": False}, solution=plain)
    assert "without terms between layers" not in alone
    assert "no other allocation: this is the solver's answer" in alone
    assert "Terms between layers not counted" in words(measured=MEASURED, solution=plain)


def test_nothing_proven_is_said() -> None:
    text = words(measured=MEASURED, solution=SOLVED | {"method": "policy-search", "lower_bound": None, "gap": None})
    assert "policy-search: predicted loss 0.12, nothing proven about it" in text


def test_runs_of_an_earlier_version() -> None:
    few = {name: RUNS[name] for name in ("predicted", "true", "taken", "gain", "noise", "samples")}
    text = words(measured=MEASURED, runs=few)
    assert "number 2 was taken: it loses 0.05 ± 0.01 less than the first" in text


def test_no_solver_no_decision() -> None:
    assert decision(reports(), {}) is None
    assert decision(reports(), {"method": "mine", "predicted_loss": 1.0}) is not None
    assert "mine: predicted loss 1" in words(solution={"method": "mine", "predicted_loss": 1.0})


def test_what_is_collected_is_json() -> None:
    made = reports(measured=MEASURED, runs=RUNS, latency={"seconds@4": TIMES, "bops": 1.5e9})
    json.dumps([decision(made, SOLVED), latencies(made)], allow_nan=False)


def test_times_only_where_a_latency_was_asked_for() -> None:
    assert latencies(reports(measured=MEASURED, latency={})) == []
    assert latencies(reports(measured=MEASURED, latency={"bops": 1e9})) == []
    assert "Bit operations 1.5 Gbops a sample" in words(measured=MEASURED, latency={"bops": 1.5e9})
    assert [entry["samples"] for entry in latencies(reports(latency={"seconds": TIMES, "seconds@4": TIMES}))] == [1, 4]


def test_times_say_whether_budget_sum_and_comparison_hold() -> None:
    text = words(measured=MEASURED, latency={"seconds": TIMES})
    assert "may take 8 ms and takes 7.5 ms. The kernels" in text
    assert "their sum is 5.3 % below the time of the whole artifact" in text
    assert "at equal predicted loss takes 20.0 % more time" in text
    assert "2, taken 7.2 ms 7.6 ms -5.3 %" in text
    slow = TIMES | {"measured": 8.8e-3, "by_bops": 8e-3, "faster_than_by_bops": False}
    text = words(measured=MEASURED, latency={"seconds@4": slow})
    assert "A run of 4 samples at once may take 8 ms and takes 8.8 ms: 10.0 % more than the budget" in text
    assert "The allocation by bit operations at equal predicted loss is not slower." in text
    assert "is the same one" in words(measured=MEASURED, latency={"seconds": TIMES | {"same_as_by_bops": True}})


def bars(found: dict[str, Any]) -> list[float]:
    chart = ElementTree.fromstring(allocation_plots.latency_bars(found))
    return [float(rect.get("width", 0)) for rect in chart.iter("rect")]


@pytest.mark.parametrize("budget", [8e-3, 1.0])
def test_bars_are_as_long_as_the_times(budget: float) -> None:
    fixed, parts, measured, by_bops, fastest = bars(TIMES | {"budget": budget})
    for width, seconds in ((fixed, 1.9), (parts, 5.3), (by_bops, 9.0), (fastest, 5.0)):
        assert width / measured == pytest.approx(seconds / 7.5, rel=1e-2)
    drawn = allocation_plots.latency_bars(TIMES | {"budget": budget})
    assert ("budget" in drawn.replace("against the budget", "")) == (budget < 0.01)


def test_sensitivities_have_their_errors() -> None:
    found = {"layers": ["a", "b"], "widths": [2, 4], "loss": [[0.1, 0.01], [None, 0.001]], "chosen": [1, 1]}
    noise = {"noise": [[0.02, 0.02], [None, None]]}
    chart = ElementTree.fromstring(allocation_plots.sensitivity(found | noise))
    ends = {title.text for title in chart.iter("{*}title")} or {title.text for title in chart.iter("title")}
    assert {"a\n2 bits: loss 0.1 ± 0.02", "b\n4 bits: loss 0.001"} <= ends
    boxes = [float(rect.get("height", 0)) for rect in chart.iter("rect")]
    strokes = [height for height in boxes if height == 1.2]
    assert len(strokes) == 3
    assert len(boxes) == 5
    assert len(list(chart.iter("circle"))) == 2
    # 0.01 - 0.02 is below every loss: the box ends at the floor of the chart, not outside
    assert max(float(r.get("y", 0)) + float(r.get("height", 0)) for r in chart.iter("rect")) <= 330 - 38 + 0.1
    assert allocation_plots.sensitivity(found).count("<rect") == 3


def test_what_is_no_loss_of_the_model_is_not_set_beside_one() -> None:
    told, own = words(), words(solution=SOLVED | {"loss_units": "errors of single layers"})
    assert "realised; predicted 0.3" in told
    assert "Predicted against realised" in told
    assert "realised; the predicted 0.3 is of errors of single layers" in own
    assert "Predicted against realised" not in own
