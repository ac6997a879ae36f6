"""Sixteen-lane building blocks of the kernel generators.

Rules that were learned the hard way: an accumulator is one 64-byte buffer in scope "global", which becomes a
stack slot and then a register (scope "local" becomes a heap workspace); every buffer argument is declared with
the alignment of its element, because TVM otherwise emits 64-byte aligned loads without checking.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.backends.tvm.layout import LANES
from qcompiler.backends.tvm.tvm_api import B, T

Expr = Any  # TVM publishes no types


def argument(name: str, shape: tuple[Expr, ...], dtype: str) -> Expr:
    """A buffer argument that may start at any multiple of its element's size."""
    return B.arg(name, B.buffer(shape, dtype, align=np.dtype(dtype).itemsize))


def register(dtype: str) -> Expr:
    """A 16-lane register."""
    return B.alloc_buffer((LANES,), dtype)


def lanes(start: Expr = 0, stride: int = 1) -> Expr:
    """Sixteen consecutive (or strided) indices."""
    return B.ramp(start, stride, LANES)


def spread(value: Expr) -> Expr:
    """A scalar in all lanes."""
    return B.broadcast(value, LANES)


def get(reg: Expr) -> Expr:
    """All lanes of a register."""
    return reg[lanes()]


def put(reg: Expr, value: Expr) -> None:
    """Set all lanes of a register."""
    B.buffer_store(reg, value, [lanes()])


def ints(value: int) -> Expr:
    """An int32 constant in all lanes; values beyond 2^31 wrap, so masks can be written unsigned."""
    return spread(B.int32(value - (1 << 32) if value >= 1 << 31 else value))


def as_float(value: Expr, dtype: str, vector: bool = True) -> Expr:
    """Stored scale -> float32; bfloat16 is stored as uint16 and shifted into the upper half of a float."""
    width = f"x{LANES}" if vector else ""
    if dtype == "bfloat16":
        wide = B.cast(value, f"int32{width}")
        return T.reinterpret(T.shift_left(wide, ints(16) if vector else B.int32(16)), dtype=f"float32{width}")
    return B.cast(value, f"float32{width}")


def buffer_dtype(scale_dtype: str) -> str:
    """The dtype of the buffer in which scales of this dtype lie."""
    return "uint16" if scale_dtype == "bfloat16" else scale_dtype
