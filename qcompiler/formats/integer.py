"""Integer grids: `Int(b)` holds -2^(b-1) ... 2^(b-1)-1 and `UInt(b)` holds 0 ... 2^b-1.

Rounding is half to even everywhere, as in ONNX QuantizeLinear and `numpy.rint`. A symmetric UInt has its
zero at the middle code 2^(b-1) (what ONNX Runtime's MatMulNBits assumes without zero points).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from qcompiler.errors import BadOption
from qcompiler.formats.base import Codes, Floats
from qcompiler.formats.granularity import Granularity
from qcompiler.formats.packing import packed_bits


def _step(span: npt.NDArray[np.floating], steps: int) -> Floats:
    """One step of a grid: span / steps as a normal float32; 1 where there is no span."""
    step = np.where(span > 0, span / steps, 1)
    return np.maximum(step, np.finfo(np.float32).tiny).astype(np.float32)


@dataclass(frozen=True)
class _Integer:
    bits: int
    signed: ClassVar[bool]

    def __post_init__(self) -> None:
        if self.bits not in range(2, 17):
            raise BadOption(f"an integer format of {self.bits} bits does not exist", fix="use 2 to 8 bits")

    @property
    def lo(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        """Largest code."""
        return self.lo + (1 << self.bits) - 1

    @property
    def code_range(self) -> tuple[int, int]:
        """(lo, hi)."""
        return self.lo, self.hi

    @property
    def free_scales(self) -> bool:
        """Scales are any numbers."""
        return True

    def check(self, granularity: Granularity, symmetric: bool) -> None:
        """Scales may be shared in any way, with zero points or without."""

    @property
    def middle(self) -> int:
        """The code of zero when there are no zero points."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """The numpy dtype that holds one code unpacked."""
        return np.dtype(f"{'int' if self.lo < 0 else 'uint'}{8 if self.bits <= 8 else 16}")

    @property
    def onnx_type(self) -> str | None:
        """INT2, INT4, INT8, INT16 and their unsigned forms exist; other widths do not."""
        return str(self).upper() if self.bits in (2, 4, 8, 16) else None

    def fit(self, low: Floats, high: Floats, symmetric: bool) -> tuple[Floats, Floats | None]:
        """Scale (and zero point) whose grid covers [low, high]; zero is always exactly representable.

        Symmetric: scale = max(|low|, |high|) / (2^(b-1) - 1). Asymmetric: scale = (high - low) / (2^b - 1),
        zero = round(lo - low / scale). A range without extent gets scale 1.
        """
        low = np.minimum(low, 0).astype(np.float32)
        high = np.maximum(high, 0).astype(np.float32)
        if symmetric:
            return _step(np.maximum(-low, high), (1 << (self.bits - 1)) - 1), None
        scale = _step(high.astype(np.float64) - low, self.hi - self.lo)
        return scale, self.zero_point(low, scale)

    def zero_point(self, low: Floats, scale: Floats) -> Floats:
        """The zero point that puts `low` at the smallest code, for a given scale."""
        return np.clip(np.rint(self.lo - low / scale), self.lo, self.hi).astype(np.float32)

    def encode(self, w: Floats, scale: Floats, zero: Floats | None) -> Codes:
        """Codes clip(rint(w / scale) + zero), in `dtype`."""
        offset = self.middle if zero is None else zero
        return np.clip(np.rint(w / scale) + offset, self.lo, self.hi).astype(self.dtype)

    def decode(self, codes: Codes, scale: Floats, zero: Floats | None) -> Floats:
        """(codes - zero) * scale, float32."""
        offset = np.float32(self.middle) if zero is None else zero
        return (codes.astype(np.float32) - offset) * scale

    def with_bits(self, bits: int) -> Self:
        """The same with another width."""
        return replace(self, bits=bits)

    def storage(self, rows: int, columns: int, granularity: Granularity, symmetric: bool) -> tuple[int, int]:
        """Stored bits of a [rows, columns] matrix: of its packed codes, and of its packed zero points."""
        scale_rows, groups = granularity.grid(rows, columns)
        return packed_bits(rows * columns, self.bits), 0 if symmetric else packed_bits(scale_rows * groups, self.bits)

    def scale_bits(self, scale_rows: int, groups: int, each: int) -> int:
        """One scale a group."""
        return scale_rows * groups * each


@dataclass(frozen=True)
class Int(_Integer):
    """Signed integers of `bits` bits."""

    signed = True

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True)
class UInt(_Integer):
    """Unsigned integers of `bits` bits."""

    signed = False

    def __str__(self) -> str:
        return f"uint{self.bits}"
