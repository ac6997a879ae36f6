"""Number formats: grids, granularities, exact stored bits, packing."""

from qcompiler.formats.base import Format, QTensor, QuantSpec, parse_format, parse_spec, round_scale, spread
from qcompiler.formats.granularity import Granularity, PerChannel, PerGroup, PerRowGroup, PerTensor, parse_granularity
from qcompiler.formats.integer import Int, UInt
from qcompiler.formats.progressive import Progressive
from qcompiler.formats.promoted import Promoted

__all__ = [
    "Format", "Granularity", "Int", "PerChannel", "PerGroup", "PerRowGroup", "PerTensor", "Progressive", "Promoted",
    "QTensor", "QuantSpec", "UInt", "parse_format", "parse_granularity", "parse_spec", "round_scale", "spread",
]  # fmt: skip
