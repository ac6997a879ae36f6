"""Two widths in one weight: most groups at `bits`, those that gain most from it at `high` bits.

FGMP (Hooper et al., "FGMP: Fine-Grained Mixed-Precision Weight and Activation Quantization", 2025) promotes blocks
by one threshold over the whole model, SliM-LLM whole groups of columns. Which groups are promoted is data: one flag a
group, carried in the zero points, as `FLAG` that is added to them (0 in a symmetric spec).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompiler.errors import BadOption
from qcompiler.formats.base import Codes, Floats
from qcompiler.formats.granularity import Granularity, PerRowGroup
from qcompiler.formats.integer import Int
from qcompiler.formats.packing import packed_bits

FLAG = np.float32(1 << 17)  # beyond all zero points; float32 holds the sum exactly


def split_zero(zero: Floats) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Flags and zero points of what `Promoted` formats carry as zero points."""
    flags = zero > FLAG / 2
    return flags, np.where(flags, zero - FLAG, zero).astype(np.float32)


@dataclass(frozen=True)
class Promoted:
    """Signed integers of `bits` bits, of `high` bits in `percent` percent of the groups.

    `str` of it is like "int4to8p10" or "int3to4p2.5". The exact number of promoted groups is `promoted`. With a
    tensor or a row for a group, what is promoted is tensors or rows.

    Attributes:
        bits: of a code of an ordinary group.
        high: of a code of a promoted one.
        percent: of the groups that are promoted, to two decimals, 0 < percent < 100.
    """

    bits: int
    high: int
    percent: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "percent", round(self.percent, 2))
        if self.bits >= self.high:
            raise BadOption(f"{self.high} bits promote no code of {self.bits}", str(self), "write it as int4to8p10")
        if not 0 < self.percent < 100:
            fix = "write int4to8p10 for 10 percent, int4 or int8 for none or all"
            raise BadOption(f"{self.percent:g} percent of the groups are none or all of them", str(self), fix)
        _ = self.narrow, self.wide  # which widths exist is theirs to say

    @property
    def narrow(self) -> Int:
        """The grid of an ordinary group."""
        return Int(self.bits)

    @property
    def wide(self) -> Int:
        """The grid of a promoted group."""
        return Int(self.high)

    @property
    def onnx_type(self) -> None:
        """No one tensor holds codes of two widths."""
        return

    @property
    def code_range(self) -> tuple[int, int]:
        """Of a promoted group."""
        return self.wide.code_range

    @property
    def free_scales(self) -> bool:
        """Scales are any numbers."""
        return True

    def check(self, granularity: Granularity, symmetric: bool) -> None:  # noqa: ARG002
        """Groups are stored as they lie in a row."""
        if isinstance(granularity, PerRowGroup):
            raise BadOption(f"groups of {self} lie along the columns", fix="write g32 in place of r32")

    @property
    def average_bits(self) -> float:
        """Bits of a code, over all groups."""
        return self.bits + self.percent / 100 * (self.high - self.bits)

    def promoted(self, groups: int) -> int:
        """How many of so many groups are promoted: the nearest whole number, halves up."""
        return (round(100 * self.percent) * groups + 5000) // 10000

    def fit(self, low: Floats, high: Floats, symmetric: bool) -> tuple[Floats, Floats]:
        """Scale and flagged zero of promoted groups that cover [low, high]: any group may be one.

        Which groups of a matrix are promoted, `formats.fit` decides.
        """
        scale, zero = self.wide.fit(low, high, symmetric)
        return scale, (np.zeros_like(scale) if zero is None else zero) + FLAG

    def encode(self, w: Floats, scale: Floats, zero: Floats | None) -> Codes:
        """Codes clip(rint(w / scale) + zero point), each on the grid that its flag tells; zero None: all ordinary."""
        flags, point = split_zero(np.zeros(1, np.float32) if zero is None else zero)
        most = np.where(flags, np.float32(self.wide.hi), np.float32(self.narrow.hi))
        return np.clip(np.rint(w / scale) + point, -most - 1, most).astype(self.wide.dtype)

    def decode(self, codes: Codes, scale: Floats, zero: Floats | None) -> Floats:
        """The numbers (codes - zero point) * scale, float32: flags only matter in the file."""
        numbers = codes.astype(np.float32)
        return (numbers if zero is None else numbers - split_zero(zero)[1]) * scale

    def with_bits(self, bits: int) -> Promoted:
        """So many bits in ordinary groups, and as many more as now in promoted ones."""
        return Promoted(bits, self.high + bits - self.bits, self.percent)

    def storage(self, rows: int, columns: int, granularity: Granularity, symmetric: bool) -> tuple[int, int]:
        """Stored bits of the codes of a [rows, columns] matrix, and of its flags and zero points.

        Groups are stored whole, the last of a row filled up with zeros. Where none or all are promoted, the matrix is
        stored as one of a single width.
        """
        scale_rows, per_row = granularity.grid(rows, columns)
        groups = scale_rows * per_row
        high = self.promoted(groups)
        if high in (0, groups):
            return (self.wide if high else self.narrow).storage(rows, columns, granularity, symmetric)
        size = rows // scale_rows * granularity.group_size(columns)
        codes = packed_bits((groups - high) * size, self.bits) + packed_bits(high * size, self.high)
        points = packed_bits(groups - high, self.bits) + packed_bits(high, self.high)
        return codes, packed_bits(groups, 1) + (0 if symmetric else points)

    def scale_bits(self, scale_rows: int, groups: int, each: int) -> int:
        """One scale a group."""
        return scale_rows * groups * each

    def __str__(self) -> str:
        return f"int{self.bits}to{self.high}p{self.percent:g}"
