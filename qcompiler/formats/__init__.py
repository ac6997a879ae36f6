"""Number formats: grids, granularities, exact stored bits, packing."""

from qcompiler.formats.base import Format, QTensor, QuantSpec, parse_format, parse_spec, round_scale, spread
from qcompiler.formats.granularity import Granularity, PerChannel, PerGroup, PerTensor, parse_granularity
from qcompiler.formats.integer import Int, UInt

__all__ = [
    "Format", "Granularity", "Int", "PerChannel", "PerGroup", "PerTensor", "QTensor", "QuantSpec", "UInt",
    "parse_format", "parse_granularity", "parse_spec", "round_scale", "spread",
]  # fmt: skip
