"""What is shown of long work where stderr is a file."""

from __future__ import annotations

import time

import pytest

from qcompiler.progress import Terminal


def test_the_time_left_is_by_what_is_done_now_not_by_what_the_cache_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 items of an earlier run take nothing, then there is one in 8 seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for number in Terminal().track(range(100), "Work"):
        now[0] += 0 if number < 60 else 8
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "Work: 64 of 100, 288 s left"
    assert lines[-1] == "Work: 98 of 100, 16 s left"
