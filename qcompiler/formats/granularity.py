"""Over which part of a weight matrix [rows, columns] one scale reaches.

Rows are output channels, columns are what the product sums over (input channels; for a convolution the
flattened in_channels/groups * kernel). Groups run along the columns, or along the rows of one column, which keeps
an input channel of large weights to itself (Heo et al., "Rethinking Channel Dimensions to Isolate Outliers for Low-bit
Weight Quantization of Large Language Models", 2024); the last one may be ragged.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.errors import BadOption


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole matrix."""

    def grid(self, rows: int, columns: int) -> tuple[int, int]:  # noqa: ARG002
        """Shape [scale rows, groups] of the scales of a [rows, columns] matrix."""
        return (1, 1)

    def group_size(self, columns: int) -> int:
        """Columns that share a scale."""
        return columns

    def group_rows(self, rows: int) -> int:
        """Rows that share a scale."""
        return rows

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale a row (output channel)."""

    def grid(self, rows: int, columns: int) -> tuple[int, int]:  # noqa: ARG002
        """Shape [rows, 1]."""
        return (rows, 1)

    def group_size(self, columns: int) -> int:
        """All columns of the row."""
        return columns

    def group_rows(self, rows: int) -> int:  # noqa: ARG002
        """Every row has its own."""
        return 1

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale for `size` consecutive columns of a row; the last group holds what is left."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadOption(f"group size {self.size} is not positive", fix="use g32, g64, g128, ...")

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape [rows, ceil(columns / size)]."""
        return (rows, -(-columns // self.size))

    def group_size(self, columns: int) -> int:
        """`size`, or all columns where the matrix is narrower."""
        return min(self.size, columns)

    def group_rows(self, rows: int) -> int:  # noqa: ARG002
        """Every row has its own."""
        return 1

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True)
class PerRowGroup:
    """One scale for `size` consecutive rows of a column (per input channel); the last group holds what is left."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadOption(f"group size {self.size} is not positive", fix="use r32, r64, r128, ...")

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape [ceil(rows / size), columns]."""
        return (-(-rows // self.size), columns)

    def group_size(self, columns: int) -> int:  # noqa: ARG002
        """Every column has its own."""
        return 1

    def group_rows(self, rows: int) -> int:
        """`size`, or all rows where the matrix is lower."""
        return min(self.size, rows)

    def __str__(self) -> str:
        return f"r{self.size}"


Granularity = PerTensor | PerChannel | PerGroup | PerRowGroup


def parse_granularity(text: str) -> Granularity:
    """The inverse of `str(granularity)`: "tensor", "channel", "g32", "r32"."""
    if text == "tensor":
        return PerTensor()
    if text == "channel":
        return PerChannel()
    if text.startswith("g") and text[1:].isdigit():
        return PerGroup(int(text[1:]))
    if text.startswith("r") and text[1:].isdigit():
        return PerRowGroup(int(text[1:]))
    fix = "write tensor, channel, g<size> for groups of columns, such as g32, or r<size> for groups of rows"
    raise BadOption(f"unknown granularity '{text}'", fix=fix)
