"""Giving memory back to the system between the steps of long work."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import onnx_ir as ir

from qcompiler.scratch import forget

_WORTH_TRIMMING = 1 << 22  # bytes of weights; walking all heaps takes longer than small temporaries are worth


def give_back(values: Iterable[ir.Value] = ()) -> None:
    """Let the system take memory that nothing needs at present.

    Args:
        values: initializers; where their tensors lie in mapped files, the pages that were read count as memory of
            this process until they are let go. They stay usable: the next access reads the file again, which the
            system usually still holds.
    """
    held = 0
    for value in values:
        tensor = value.const_value
        held += 0 if tensor is None else tensor.nbytes
        if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None and hasattr(mmap, "MADV_DONTNEED"):
            tensor.raw.madvise(mmap.MADV_DONTNEED)
    if held >= _WORTH_TRIMMING:
        trim()


def trim() -> None:
    """Return what large temporaries have left free to the system, and forget spilled arrays."""
    forget()
    # The C library keeps what large temporaries leave free, in one heap for each thread of ONNX Runtime.
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # glibc only
        malloc_trim(0)
