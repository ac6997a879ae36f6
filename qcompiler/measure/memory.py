"""Giving memory back to the system between the steps of long work."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import onnx_ir as ir


def give_back(values: Iterable[ir.Value] = ()) -> None:
    """Let the system take memory that nothing needs at present.

    Args:
        values: initializers; where their tensors lie in mapped files, the pages that were read count as memory of
            this process until they are let go. They stay usable: the next access reads the file again, which the
            system usually still holds.
    """
    for value in values:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None and hasattr(mmap, "MADV_DONTNEED"):
            tensor.raw.madvise(mmap.MADV_DONTNEED)
    # The C library keeps what large temporaries leave free, in one heap for each thread of ONNX Runtime.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)
