"""Giving memory back to the system between the steps of long work."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.model import Model
from qcompiler.scratch import forget, let_go, spilled

_WORTH_TRIMMING = 1 << 22  # bytes of weights; walking all heaps takes longer than small temporaries are worth


def give_back(values: Iterable[ir.Value] = ()) -> None:
    """Let the system take memory that nothing needs at present.

    Args:
        values: initializers; where their tensors lie in mapped files, the pages that were read count as memory of
            this process until they are let go. They stay usable: the next access reads the file again, which the
            system usually still holds.
    """
    tensors = [value.const_value for value in values]
    held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    let_go(tensors)
    if held >= _WORTH_TRIMMING:
        trim()


def spill(work: Model, original: Model) -> None:
    """Put what passes have made into the scratch file: rewritten weights, codes, packed codes.

    Args:
        work: the model that they changed.
        original: what it was cloned from, whose tensors lie in a file already, or are another's to spill.
    """
    kept = {id(value.const_value) for value in original.graph.initializers.values()}
    for value in work.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray) and id(tensor) not in kept:
            raw = spilled(tensor.raw)
            if raw is not tensor.raw:
                value.const_value = ir.Tensor(raw, tensor.dtype, shape=tensor.shape, name=tensor.name)
    work.weights = {name: replace(codes, codes=spilled(codes.codes)) for name, codes in work.weights.items()}


def trim() -> None:
    """Return what large temporaries have left free to the system, and forget spilled arrays."""
    forget()
    _trim_heaps()


class Growth:
    """Watches how much more a process holds than when its heaps were trimmed last.

    The C library keeps what temporaries leave free, in one heap for each thread of ONNX Runtime: a walk through a
    language model in dozens of sessions leaves a gigabyte behind.

    Args:
        limit: bytes; smaller ones are sooner used again than asked for anew.
    """

    def __init__(self, limit: int = 1 << 29) -> None:
        self.limit, self._held = limit, anonymous_bytes()

    def check(self) -> None:
        """Trim all heaps if the process has grown by more than the limit."""
        if anonymous_bytes() - self._held > self.limit:
            _trim_heaps()
            self._held = anonymous_bytes()


def anonymous_bytes() -> int:
    """Resident memory of this process that is no part of a file; 0 where the system does not tell."""
    try:
        resident, shared = map(int, Path("/proc/self/statm").read_bytes().split()[1:3])
    except OSError:
        return 0
    return (resident - shared) * mmap.PAGESIZE


def _trim_heaps() -> None:
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # glibc only
        malloc_trim(0)
