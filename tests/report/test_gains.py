"""What each step gained: rows, shares, what was kept, and that the page shows it."""

from __future__ import annotations

import pytest

from qcompiler.pipeline import PassReport
from qcompiler.report.gains import gains
from qcompiler.report.html import render
from tests.report.test_html import data

_TRIALS = [
    {"steps": [], "loss": 0.8, "seconds": 1.0, "refused": ""},
    {"steps": ["smooth"], "loss": 0.4, "seconds": 2.0, "refused": ""},
    {"steps": ["rotate"], "loss": None, "seconds": 0.1, "refused": "no <stream>"},
]
_PAIR = {"first": "smooth", "second": "rotate", "alone": [0.693, 0.1], "both": 0.5, "interaction": -0.293}


def reports() -> list[PassReport]:
    tuned = {"held_back_loss_before": 0.4, "held_back_loss_after": 0.5, "kept": False}
    chosen = {"trials": _TRIALS, "chosen": "smooth", "interactions": [_PAIR]}
    return [
        PassReport("choose-transforms", 1, metrics=chosen),
        PassReport("gptq", 3),
        PassReport("tune", 0, metrics=tuned),
    ]


def test_rows_say_what_was_kept_and_what_it_gained() -> None:
    transforms, tuned = gains(reports())
    assert [row["steps"] for row in transforms["rows"]] == ["none", "smooth", "rotate"]
    assert [row["share"] for row in transforms["rows"]] == [1.0, pytest.approx(0.5), None]
    assert [row["kept"] for row in transforms["rows"]] == [False, True, False]
    assert [(row["steps"], row["kept"]) for row in tuned["rows"]] == [("without", True), ("tune", False)]


def test_the_page_shows_gains_and_interactions() -> None:
    page = render(data() | {"gains": gains(reports())})
    assert "What each step gained" in page
    assert "no &lt;stream&gt;" in page
    assert "-0.293" in page
    assert "50.0" in page


def test_pages_of_earlier_versions_have_no_such_section() -> None:
    assert "What each step gained" not in render(data())
    assert gains([PassReport("gptq", 3)]) == []


def test_losses_that_are_no_numbers_are_left_out() -> None:
    metrics = {"held_back_loss_before": float("nan"), "held_back_loss_after": float("inf"), "kept": False}
    (entry,) = gains([PassReport("tune", 0, metrics=metrics)])
    assert [row["loss"] for row in entry["rows"]] == [None, None]
    assert "without" in render(data() | {"gains": [entry]})
