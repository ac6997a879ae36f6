"""Scales per input channel of a layer as what they do to its weight: columns are multiplied, rounded, divided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompiler.errors import PassRefused, Refusal
from qcompiler.formats import PerTensor, QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.varied import Undo
from qcompiler.graph.folds import Fold
from qcompiler.graph.sites import Site

Doubles = npt.NDArray[np.float64]
Formats = Mapping[Site, Sequence[QuantSpec]]
_SMALLEST = 1e-4


@dataclass(frozen=True, eq=False)
class Columns:
    """The effect on one site (`varied.Effect`): its weight is multiplied by factors, and divided after rounding.

    Attributes:
        factors: float64 [rows or 1, columns].
        dtype: in which the weight is stored.
    """

    factors: Doubles
    dtype: np.dtype[np.generic]

    @staticmethod
    def of(fold: Fold, site: Site, numbers: Doubles) -> Columns:
        """What `fold.scale(numbers)` does to a site's weight; numbers float64 [channels]."""
        factors = factors_of(fold, site, numbers)
        assert site.weight.const_value is not None
        alike = (factors == factors[:1]).all()
        return Columns(factors[:1].copy() if alike else factors, site.weight.const_value.dtype.numpy())

    def change(self, matrix: Floats, spec: QuantSpec) -> tuple[Floats, Undo]:
        """See `Effect`; the numbers are those that the fold stores."""
        del spec
        scaled = (matrix * self.factors).astype(self.dtype).astype(np.float32)
        return scaled, lambda rounded: (rounded / self.factors).astype(np.float32)

    def extra_bits(self, rows: int, columns: int) -> int:
        """Nothing: the producer's own constants hold the scales."""
        del rows, columns
        return 0

    def part(self, step: int) -> Columns:
        """The effect on every `step`-th row."""
        return Columns(self.factors if len(self.factors) == 1 else self.factors[::step], self.dtype)


def factors_of(fold: Fold, site: Site, numbers: Doubles) -> Doubles:
    """What `fold.scale(numbers)` multiplies a site's matrix by, float64 [rows, columns]."""
    tensor = np.broadcast_to(fold.factors(numbers, site.weight), site.shape)
    return np.asarray(site.to_matrix(tensor), np.float64)


def probe(fold: Fold) -> Doubles:
    """Scales float64 [channels], different wherever ties let them be."""
    return fold.tied(1.0 + np.arange(fold.size) / fold.size, lambda group: float(group[0]))


def readers_of(fold: Fold, sites: Iterable[Site]) -> list[Site]:
    """The sites whose columns a fold scales: those that are multiplied differently within a row."""
    weights = {edit.constant.value for edit in fold.region.edits.values()}
    found, numbers = list[Site](), probe(fold)
    for site in sites:
        if site.weight in weights and site.columns > 1:
            factors = factors_of(fold, site, numbers)
            if (factors != factors[:, :1]).any():
                found.append(site)
    return found


def stored_only(formats: Formats) -> Callable[[Fold], str | None]:
    """Says which folds change nothing but stored numbers, of sites that are in no other fold; else why not."""
    by_weight = {site.weight: site for site in formats}
    taken: set[Site] = set()

    def accept(fold: Fold) -> str | None:
        if fold.region.clips or any(edit.constant.shared for edit in fold.region.edits.values()):
            return "constants that it changes are shared: copies would take room"
        readers = readers_of(fold, formats)
        if not readers:
            return "no weight that is quantized reads it"
        if any(site in taken for site in readers):
            return "a weight that reads it has scales for another value"
        others = {by_weight[e.constant.value] for e in fold.region.edits.values() if e.constant.value in by_weight}
        if any(isinstance(s.granularity, PerTensor) for o in others.difference(readers) for s in formats[o]):
            return "a weight before it has one scale for all rows"
        taken.update(readers)
        return None

    return accept


def centred(fold: Fold, reach: Doubles, strength: float) -> Doubles:
    """reach^strength, float64 [channels], such that the largest times the smallest is 1; 1 for dead channels."""
    alive = (reach > 0) & fold.free
    raw = np.maximum(np.where(alive, reach, 1.0) ** strength, _SMALLEST)
    if alive.any():
        raw = np.where(alive, raw / np.sqrt(raw[alive].max() * raw[alive].min()), 1.0)
    return fold.tied(raw)


def fold_all(chosen: Iterable[tuple[Fold, Doubles]]) -> list[Refusal]:
    """Absorb scales; those under which a weight overflows its element type are refused, and change nothing."""
    refused: list[Refusal] = []
    for fold, numbers in chosen:
        try:
            fold.scale(numbers)
        except PassRefused as error:
            refused.append(Refusal(fold.value.name or "?", f"{error.what} ('{error.where}')"))
    return refused
