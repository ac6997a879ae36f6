"""A low-rank correction beside a rounded weight, as an option of allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.errors import PassRefused, Refusal
from qcompiler.formats import QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.varied import Undo
from qcompiler.graph.branches import add_branch
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.gram import Gram, gram_parts, grams
from qcompiler.model import Model
from qcompiler.passes.transform.branching import BITS, unfit
from qcompiler.passes.transform.factors import Factors, Metric, Rounding, Search, search
from qcompiler.passes.transform.inputs import enough_samples
from qcompiler.progress import Progress
from qcompiler.variants import Offer

_SHARE = 8  # one bit for so many weights is what a correction may store


@dataclass(frozen=True, eq=False)
class Correction:
    """The effect on one site: W becomes Q(W - U V) + U V.

    Attributes:
        rank: columns of U and rows of V.
        factors: U and V for each format.
        original: the weight that they correct.
    """

    rank: int
    factors: Mapping[QuantSpec, Factors]
    original: ir.TensorProtocol

    def change(self, matrix: Floats, spec: QuantSpec) -> tuple[Floats, Undo]:
        """See `Effect`; `matrix` is the whole weight."""
        product = self.factors[spec].product()
        return matrix - product, lambda rounded: rounded + product

    def extra_bits(self, rows: int, columns: int) -> int:
        """U and V in float16."""
        return self.rank * (rows + columns) * BITS


@dataclass
class LowRank:
    """Two small products beside a product: what rounding loses in the few directions that matter most.

    U V is what the rounding error has in the directions in which it changes the output most (the largest eigenvectors
    of E H E^T, where H is the second moment of the input); the rest of the weight is rounded again. The rank is such
    that U and V store about an eighth of a bit per weight.

    Source: Yao et al., LoRC in ZeroQuant-V2 (2303.08302), weighted by the input as in QERA (2410.06040).
    """

    free: bool = False
    _offered: dict[str, Correction] = field(default_factory=dict[str, Correction])

    def offer(self, model: Model, formats: Mapping[Site, Sequence[QuantSpec]], progress: Progress) -> Offer:
        """See `Variant`. Refused: what is no plain product of one operation."""
        reasons = {site: unfit(site) or _too_small(site) for site in formats}
        fit = [site for site, reason in reasons.items() if reason is None]
        for chunk in gram_parts(fit, lambda site: [site]):
            known = grams(model, chunk, enough_samples(model))
            for site in progress.track([site for site in chunk if site.name in known], "low-rank corrections"):
                self._offered[site.name] = _correction(site, formats[site], known[site.name])
        tokens = {name: f"r{effect.rank}" for name, effect in self._offered.items()}
        refused = tuple(Refusal(site.name, f"no correction: {reason}") for site, reason in reasons.items() if reason)
        return Offer(self._offered, tokens, (), refused)

    def commit(self, model: Model, chosen: Mapping[str, QuantSpec]) -> None:
        """Put the two products behind each operation, and take them from its weight."""
        for site in [site for site in find_sites(model.ir) if site.name in chosen]:
            effect = self._offered[site.name]
            factors = effect.factors[chosen[site.name]]
            scaled = factors.left * _row_scales(site, effect.original)[:, None]
            with np.errstate(over="ignore"):
                stored = scaled.astype(np.float16), factors.right.astype(np.float16)
            if not np.isfinite(stored[0]).all():
                raise PassRefused("the correction overflows float16", site.name, "leave out the variant 'lowrank'")
            add_branch(model.ir, [site], [stored[0]], stored[1])


def _too_small(site: Site) -> str | None:
    return None if site.rows > rank_of(site) + 1 else "it has too few rows"


def rank_of(site: Site) -> int:
    """The rank that stores about an eighth of a bit per weight, at least 1."""
    return max(1, round(site.count / (_SHARE * BITS * (site.rows + site.columns))))


def _correction(site: Site, specs: Sequence[QuantSpec], gram: Gram) -> Correction:
    rank, matrix = rank_of(site), site.matrix()
    metric, nothing = Metric.inputs(gram.matrix[0]), Factors.zero(site.rows, site.columns, rank)
    assert site.weight.const_value is not None
    found = {spec: search(matrix, Rounding([(site.rows, spec)]), metric, rank, Search()) for spec in specs}
    factors = {spec: nothing if one is None else one[0] for spec, one in found.items()}
    return Correction(rank, factors, site.weight.const_value)


def _row_scales(site: Site, original: ir.TensorProtocol) -> Floats:
    """[rows]: by what scales of the value that the operation writes have multiplied its weight since the offer."""
    before = np.asarray(site.to_matrix(original.numpy()), np.float64)
    size = np.einsum("rc,rc->r", before, before)
    now = np.einsum("rc,rc->r", site.matrix(), before)
    scales: Floats = np.divide(now, size, out=np.ones_like(size), where=size > 0).astype(np.float32)
    return scales
