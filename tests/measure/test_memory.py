from __future__ import annotations

import numpy as np
import pytest

from qcompiler.measure import memory
from qcompiler.measure.memory import Growth, anonymous_bytes


def test_memory_of_this_process_is_counted() -> None:
    before = anonymous_bytes()
    array = np.ones(1 << 26, np.uint8)
    assert before + (1 << 25) < anonymous_bytes() < before + (1 << 28)
    del array


def test_heaps_are_trimmed_when_the_process_has_grown_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    held, trimmed = [1000], list[int]()

    def trim() -> None:
        trimmed.append(held[0])
        held[0] -= 50

    monkeypatch.setattr(memory, "anonymous_bytes", lambda: held[0])
    monkeypatch.setattr(memory, "_trim_heaps", trim)
    growth = Growth(100)
    for now in (1050, 1100, 1101, 1151, 900, 1151, 1152):  # what stays after a trim is what growth is counted from
        held[0] = now
        growth.check()
    assert trimmed == [1101, 1152]
