from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from pathlib import Path
from typing import NoReturn

import ml_dtypes
import numpy as np
import psutil
import pytest

from qcompiler import scratch
from qcompiler.scratch import forget, forgetting, is_spilled, map_of, spilled


@pytest.mark.parametrize("dtype", [np.float32, np.int8, ml_dtypes.bfloat16, ml_dtypes.int4])
def test_spilled_arrays_hold_the_same_numbers_before_and_after_they_are_forgotten(dtype: type) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-8, 8, (700, k)).astype(dtype) for k in (900, 1, 1100)]
    found = [spilled(a) for a in arrays]
    assert [is_spilled(a) for a in found] == [a.nbytes >= scratch.LEAST_BYTES for a in arrays]
    for _ in range(2):
        for a, b in zip(arrays, found, strict=True):
            assert b.dtype == a.dtype
            np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))
        forget()
    assert spilled(found[0]) is found[0]


def test_forgotten_arrays_take_no_memory() -> None:
    found = spilled(np.ones(1 << 26, np.uint8))
    process = psutil.Process()
    held = process.memory_info().rss
    forget()
    assert process.memory_info().rss < held - (1 << 25)
    assert found.sum() == 1 << 26


def test_what_was_read_does_not_pile_up_while_forgetting() -> None:
    found = [spilled(np.ones(1 << 25, np.uint8)) for _ in range(8)]
    forget()
    process, held = psutil.Process(), psutil.Process().memory_info().rss
    with forgetting(0.001):
        seen: list[int] = []
        for array in found:
            assert array.sum() == 1 << 25
            time.sleep(0.05)
            seen.append(process.memory_info().rss - held)
        assert min(seen) < 1 << 25
        assert max(seen) < 4 << 25  # all together are 8 << 25
    assert not [thread for thread in threading.enumerate() if thread.name == "forgetting"]
    assert sum(int(array.sum()) for array in found) == 8 << 25


def test_mapped_files_of_others_can_be_forgotten_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * (1 << 26))
    with path.open("rb") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    dropped: list[object] = []
    with forgetting(0.001, [array, np.ones(3)]):
        monkeypatch.setattr(scratch, "_drop", lambda maps: dropped.extend(maps))
        assert array.sum() == 1 << 26
        time.sleep(0.05)
    assert map_of(array) in dropped
    assert array.sum() == 1 << 26


def test_without_room_on_the_disk_arrays_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(scratch, "_open", None)
    array = np.ones(1 << 20, np.uint8)
    assert spilled(array) is array
