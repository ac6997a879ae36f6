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
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

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
    if array.nbytes < LEAST_BYTES or array.dtype.hasobject or is_spilled(array):
        return array
    result = room(array.shape, array.dtype)
    if result is None:
        return array
    result[...] = array
    return result


def room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
    """An array in the scratch file, to be filled; None where nothing has room.

    Args:
        shape: of any size.
        dtype: a type without objects.
    """
    global _open
    count = prod(shape)
    size = count * dtype.itemsize
    try:
        if _open is None or _open.used + size > len(_open.map):
            _open = _Segment(max(_SEGMENT, size))
            _maps.add(_open.map)
    except OSError:
        return None
    start = _open.used
    _open.used = -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE
    return np.frombuffer(_open.map, dtype, count, start).reshape(shape)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], least: int = LEAST_BYTES) -> Array:
    """An array to be filled: in the scratch file if it has at least so many bytes and there is room."""
    found = room(shape, dtype) if prod(shape) * dtype.itemsize >= least else None
    return np.empty(shape, dtype) if found is None else found


def is_spilled(array: Array) -> bool:
    """Whether an array lies in the scratch file (or in another mapped one)."""
    return map_of(array) is not None


def map_of(array: Array) -> mmap.mmap | None:
    """The mapped file in which an array lies."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    found = base.obj if isinstance(base, memoryview) else base
    return found if isinstance(found, mmap.mmap) else None


def forget() -> None:
    """Let the system take the memory behind all spilled arrays; the next access reads the file again."""
    _drop(_maps)


def _drop(maps: Iterable[mmap.mmap]) -> None:
    """Let the system take all pages of mapped files."""
    for mapped in list(maps):
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def let_go(tensors: Iterable[ir.TensorProtocol | None]) -> None:
    """Let the system take the pages of mapped files in which tensors lie; they stay usable."""
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
            _drop([tensor.raw])


@contextmanager
def forgetting(seconds: float = 0.01, arrays: Iterable[Array] = ()) -> Generator[None]:
    """`forget` again and again, while a library reads spilled arrays one after the other and needs each only once.

    Args:
        seconds: in between; what is needed for longer is read again.
        arrays: others that lie in mapped files.
    """
    done = threading.Event()
    maps = {id(found): found for array in arrays if (found := map_of(array)) is not None}

    def keep_forgetting() -> None:
        while not done.wait(seconds):
            forget()
            _drop(maps.values())

    thread = threading.Thread(target=keep_forgetting, name="forgetting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        forget()
        _drop(maps.values())
