"""A scratch file for large arrays that are needed only now and then: rewritten weights, codes.

Arrays that live in a mapped file are read like any others, but the system can take their memory at any time, and
`forget` tells it to. The file has no name and vanishes with the process.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LEAST_BYTES = 1 << 18
_SEGMENT = 1 << 26  # bytes that are mapped together: every mapping holds a file descriptor


class _Segment:
    """A mapped file, filled from its start."""

    def __init__(self, size: int) -> None:
        with tempfile.TemporaryFile(prefix="qcompiler-") as file:
            if hasattr(
                os, "posix_fallocate"
            ):  # without room this fails here; a sparse file would kill the process later
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            self.map = mmap.mmap(file.fileno(), size)
        self.used = 0


_open: _Segment | None = None
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def spilled(array: Array) -> Array:
    """The same numbers in the scratch file; the array itself if it is small, is there already, or nothing has room.

    Args:
        array: of any shape and type without objects.
    """
    global _open
    if array.nbytes < LEAST_BYTES or array.dtype.hasobject or is_spilled(array):
        return array
    try:
        if _open is None or _open.used + array.nbytes > len(_open.map):
            _open = _Segment(max(_SEGMENT, array.nbytes))
            _maps.add(_open.map)
    except OSError:
        return array
    start = _open.used
    _open.used = -(-(start + array.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    result = np.frombuffer(_open.map, array.dtype, array.size, start).reshape(array.shape)
    result[...] = array
    return result


def is_spilled(array: Array) -> bool:
    """Whether an array lies in the scratch file (or in another mapped one)."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def forget() -> None:
    """Let the system take the memory behind all spilled arrays; the next access reads the file again."""
    for mapped in list(_maps):
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def forgetting(seconds: float = 0.01) -> Generator[None]:
    """`forget` again and again, while a library reads spilled arrays one after the other and needs each only once."""
    done = threading.Event()

    def keep_forgetting() -> None:
        while not done.wait(seconds):
            forget()

    thread = threading.Thread(target=keep_forgetting, name="forgetting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        forget()
