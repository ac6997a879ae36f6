"""A measurement that is killed goes on where it was: what is stored is not measured again, and the end is the same."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.measure.resuming import WORK, child

_KILLS = 5
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.measure.resuming"])


class Runs:
    """Children that share a cache, one after the other.

    Attributes:
        logs: of each child the lines that it wrote.
        killed: for each child, whether it was.
    """

    def __init__(self, what: str, folder: Path) -> None:
        self.what, self.folder = what, folder
        self.logs: list[list[str]] = []
        self.killed: list[bool] = []
        folder.mkdir()

    def run(self, lines: int | None = None, delay: float = 0.0) -> dict[str, np.ndarray] | None:
        """Start a child; kill it `delay` seconds after it has written so many lines, unless it is done before."""
        log, result = self.folder / f"{len(self.logs)}.log", self.folder / "result.npz"
        process = _CONTEXT.Process(target=child, args=(self.what, self.folder / "cache", log, result))
        process.start()
        while lines is not None and process.is_alive() and len(_lines(log)) < lines:
            time.sleep(0.002)
        if lines is not None:
            time.sleep(delay)
            process.kill()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
        self.logs.append(_lines(log))
        self.killed.append(process.exitcode != 0)
        return None if self.killed[-1] else dict(np.load(result))

    def begun(self, child: int) -> list[list[str]]:
        """What a child began to measure, in its order: groups of works that are measured together."""
        return [line.split()[1].split(",") for line in self.logs[child] if line.startswith("start")]

    def stored(self) -> list[str]:
        return [line for log in self.logs for line in log if line.startswith("put")]

    def entries(self) -> set[str]:
        """What is in the cache in the end."""
        return {path.name for path in (self.folder / "cache").rglob("*.npz")}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=[pytest.mark.slow] if name == "a compilation" else []) for name in WORK]
)
def test_nothing_that_was_stored_is_measured_again(what: str, tmp_path: Path) -> None:
    """At most what was being measured at the moment of a kill is measured once more."""
    whole = Runs(what, tmp_path / "whole")
    expected = whole.run()
    assert expected is not None
    chance = random.Random(what)
    parts, steps = Runs(what, tmp_path / "parts"), len(whole.logs[0])
    for _ in range(_KILLS):
        parts.run(chance.randint(1, max(1, steps // (_KILLS + 1))), chance.uniform(0, 0.01))
    found = parts.run()
    assert found is not None
    assert sum(parts.killed) >= _KILLS // 2  # the last ones may have found nothing left to do
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes()

    assert len(set(parts.stored())) == len(parts.stored())
    assert set(parts.stored()) <= set(whole.stored())
    assert parts.entries() == whole.entries()
    done: set[str] = set()
    for number, killed in enumerate(parts.killed):
        begun = parts.begun(number)
        assert done.isdisjoint(work for group in begun for work in group)
        done |= {work for group in (begun[:-1] if killed else begun) for work in group}
    ever = {work for child in range(len(parts.logs)) for group in parts.begun(child) for work in group}
    assert ever == {work for group in whole.begun(0) for work in group}
    assert len(ever) == sum(map(len, whole.begun(0)))
