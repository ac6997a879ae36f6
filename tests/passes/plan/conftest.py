"""What tests of allocation stand on."""

from __future__ import annotations

import pytest

from tests.passes.plan.made_up import Measured, Target, Truth, use_target


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    measured = Measured()
    monkeypatch.setattr("qcompiler.passes.plan.losses.sensitivities", measured)
    monkeypatch.setattr("qcompiler.passes.plan.allocate.judge", lambda *given: (Truth(measured, *given), 0.0))
    use_target(monkeypatch, Target())
    return measured
