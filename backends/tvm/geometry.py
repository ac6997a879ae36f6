"""What convolution kernels are specialised for."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Geometry:
    """A two-dimensional convolution without its weights' format.

    Attributes:
        channels: input channels.
        rows: output channels.
        groups: of channels.
        kernel, strides, dilations: (height, width).
        pads: (top, left); bottom and right follow from the size of the output.
    """

    channels: int
    rows: int
    groups: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int]

    @property
    def columns(self) -> int:
        """Of the weight matrix."""
        return self.channels // self.groups * prod(self.kernel)


@dataclass(frozen=True)
class FlatFormat:
    """Format of a flat weight: bits of a code, groups of columns with a scale each, zero points, dtype of scales."""

    bits: int
    groups: int
    group: int
    zeros: bool
    scale_dtype: str
