"""Over which part of a weight matrix [rows, columns] one scale reaches.

Rows are output channels, columns are what the product sums over (input channels; for a convolution the
flattened in_channels/groups * kernel). Groups run along the columns; the last one may be ragged.
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

    def __str__(self) -> str:
        return f"g{self.size}"


Granularity = PerTensor | PerChannel | PerGroup


def parse_granularity(text: str) -> Granularity:
    """The inverse of `str(granularity)`: "tensor", "channel", "g32"."""
    if text == "tensor":
        return PerTensor()
    if text == "channel":
        return PerChannel()
    if text.startswith("g") and text[1:].isdigit():
        return PerGroup(int(text[1:]))
    raise BadOption(f"unknown granularity '{text}'", fix="write tensor, channel or g<size>, such as g32")
