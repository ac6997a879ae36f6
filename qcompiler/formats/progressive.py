"""Two levels of scales: unsigned codes in groups expand to int8 by whole numbers, int8 to floats by one scale a row.

QoQ (Lin et al., "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", 2024): a row is scaled
to +-119 (of 4-bit codes) first; a group's scale is then a whole number, so that (code - zero) * scale is an int8 and a
product with int8 activations has nothing but integers in it until the row's own scale comes last. A group costs 8 bits
for its scale.

The paper shows that round to nearest stays within int8. Codes here may be chosen otherwise (GPTQ), so zero points are
kept where every code stays within int8. `QTensor.scale` holds the product of both levels, from which `split_scales`
has them back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qcompiler.errors import BadOption
from qcompiler.formats.granularity import Granularity, PerRowGroup
from qcompiler.formats.integer import UInt

if TYPE_CHECKING:
    from qcompiler.formats.base import Codes, Floats

INNER_BITS = 8  # of a group's scale


@dataclass(frozen=True)
class Progressive:
    """Unsigned integers of `bits` bits with zero points, and whole numbers as scales of groups: "qoq4".

    Attributes:
        bits: of a code, 2 to 4: wider ones leave group scales next to nothing.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise BadOption(f"two levels of scales exist for 2 to 4 bits, not for {self.bits}", fix="write qoq4")

    @property
    def grid(self) -> UInt:
        """The codes alone."""
        return UInt(self.bits)

    @property
    def onnx_type(self) -> str | None:
        """Of the codes."""
        return self.grid.onnx_type

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return self.grid.code_range

    @property
    def free_scales(self) -> bool:
        """Scales are products of two levels."""
        return False

    @property
    def largest_scale(self) -> int:
        """The largest group scale at which all codes can stay within int8."""
        return 256 >> self.bits

    @property
    def protective(self) -> int:
        """What the largest weight of a row becomes: half of the largest group scale is left to int8's 127."""
        return 127 - self.largest_scale // 2

    def zero_range(self, scale: Floats) -> tuple[Floats, Floats]:
        """The zero points at which (code - zero) * scale is an int8 for every code, scales up to `largest_scale`."""
        most = self.grid.hi
        return np.maximum(most - np.floor(127 / scale), 0), np.minimum(np.floor(128 / scale), most)

    def check(self, granularity: Granularity, symmetric: bool) -> None:
        """There are zero points, and a row has a scale."""
        if symmetric:
            raise BadOption(f"{self} has zero points", fix=f"write {self}-asym-g128")
        if isinstance(granularity, PerRowGroup):
            raise BadOption(f"groups of {self} lie along the columns", fix=f"write {self}-asym-g128")

    def fit(self, low: Floats, high: Floats, symmetric: bool) -> tuple[Floats, Floats | None]:
        """A scale and zero point that cover [low, high], of one level; two need the row (`fit_progressive`)."""
        return self.grid.fit(low, high, symmetric)

    def encode(self, w: Floats, scale: Floats, zero: Floats | None) -> Codes:
        """Codes clip(rint(w / scale) + zero)."""
        return self.grid.encode(w, scale, zero)

    def decode(self, codes: Codes, scale: Floats, zero: Floats | None) -> Floats:
        """(codes - zero) * scale, float32."""
        return self.grid.decode(codes, scale, zero)

    def with_bits(self, bits: int) -> Progressive:
        """The same with another width."""
        return replace(self, bits=bits)

    def storage(self, rows: int, columns: int, granularity: Granularity, symmetric: bool) -> tuple[int, int]:
        """Stored bits of the packed codes, and of the packed zero points."""
        return self.grid.storage(rows, columns, granularity, symmetric)

    def scale_bits(self, scale_rows: int, groups: int, each: int) -> int:
        """Stored bits of one scale a row, and one byte a group."""
        return scale_rows * (each + INNER_BITS * groups)

    def __str__(self) -> str:
        return f"qoq{self.bits}"


def split_scales(scale: Floats, dtype: str) -> tuple[Floats, Floats]:
    """Both levels of scales [scale rows, groups]: floats [scale rows, 1] and whole numbers [scale rows, groups].

    The largest row scale that fits is taken: group scales are then smallest, and int8 is kept.

    Raises:
        ValueError: there is none; then the scales do not come from `fit_progressive`.
    """
    from qcompiler.formats.base import round_scale

    wide = scale.astype(np.float64)
    outer = np.zeros((len(scale), 1))
    for divisor in range(1, 1 << INNER_BITS):
        guess = wide.min(1, keepdims=True) / divisor
        stored = round_scale(guess, dtype).astype(np.float64)
        whole = (stored == guess) & (np.fmod(wide, stored) == 0).all(1, keepdims=True)
        outer = np.where((outer == 0) & whole, guess, outer)
        if outer.all():
            return outer.astype(np.float32), (wide / outer).astype(np.float32)
    raise ValueError("scales are no products of a row's scale and whole numbers")
