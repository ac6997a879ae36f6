"""Panels of columns: cut matrices into units of their own, sorted by what rounding their columns costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.budget import kept_sites
from qcompiler.errors import BadOption, Refusal
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.gram import gram_parts, grams
from qcompiler.measure.proxy import column_costs, inverse_squares, saliences
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import enough_samples, require_float
from qcompiler.passes.transform.panel_cutting import absorbed, by_value, cut_alike, uncut
from qcompiler.passes.transform.panel_sizes import Sizes, best_sizes, equal_sizes
from qcompiler.pipeline import EXACT, Pass, PassReport
from qcompiler.progress import Progress

Floats = npt.NDArray[np.float64]
_INDEX_BITS = 32  # of a Gather
_SIZE_BITS = 64  # of a Split, for each panel


@dataclass(frozen=True)
class SplitPanels(Pass):
    """Cut matrices of products into panels of columns, which allocation then gives formats of their own.

    All matrices that read one value are cut alike. Their columns are sorted, the most costly first, by the sum of what
    rounding them costs, each matrix's costs in shares of its own total. What produces the value absorbs the
    order where it can, elsewhere a Gather sorts the value. Kernels stay regular: a panel is a plain product
    of one format whose columns are a multiple of `align`.

    Source: BAQ (2506.05664) gives columns bits of their own; SliM-LLM (2405.14917) groups of columns. Panels of sorted
    columns are what remains of that when kernels are to stay regular.

    Attributes:
        panels: that a matrix is cut into at most.
        align: columns that all panels but the last are a multiple of.
        order: by "costs" (BAQ: the error that GPTQ leaves in a column), "salience" (SliM-LLM: the same of weights
            that are pruned, so that small weights count less), or "none" (columns stay where they are).
        cut: "costs": where BAQ's closed form loses least, and only if that is worth more than it takes to store;
            "equal": panels of one size.
        gain: bits a weight that each panel must be worth by the closed form, for the cut "costs".
        least: columns that a matrix must have to be cut.
        keep: sites that are to stay float, and whole: globs on their names, or "embeddings".
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    hints: ClassVar[tuple[str, ...]] = ("keep",)
    panels: int = 3
    align: int = 32
    order: Literal["costs", "salience", "none"] = "costs"
    cut: Literal["costs", "equal"] = "costs"
    gain: float = 0.02
    least: int = 128
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.order not in ("costs", "salience", "none") or self.cut not in ("costs", "equal"):
            what = f"order cannot be '{self.order}' with cut '{self.cut}'"
            raise BadOption(what, "pass 'split-panels'", "use costs, salience or none; and costs or equal")
        if self.panels < 2 or self.align < 1 or not self.gain >= 0:
            raise BadOption("panels must be 2 or more, align 1 or more, gain 0 or more", "pass 'split-panels'")

    def requires(self, model: Model) -> None:
        """Float weights, and calibration data unless nothing is asked of it."""
        require_float(model, data=self.order != "none" or self.cut != "equal")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Sort and cut; metrics hold the sizes and what they are worth, by the name of the value that is cut."""
        sites = find_sites(model.ir)
        kept = kept_sites(sites, self.keep)
        refused = [Refusal(s.name, why) for s in sites if (why := self._reason(s, kept)) is not None]
        taken = {refusal.where for refusal in refused}
        readers = by_value(site for site in sites if site.name not in taken)
        costs = self._costs(model, readers)
        changed, cuts = 0, dict[str, dict[str, object]]()
        for value, group in progress.track(list(readers.items()), "cutting panels"):
            sizes, how = self._sort_and_cut(model, group, costs.get(value))
            if len(sizes.columns) < 2:
                refused += [Refusal(site.name, "its columns cost too much alike to be worth a cut") for site in group]
                continue
            changed += len(group)
            cuts[value.name or "?"] = {"columns": list(sizes.columns), "bits_gained": sizes.gain, "order": how}
        return PassReport(self.registered_name(), changed, tuple(refused), {"panels": cuts})

    def _reason(self, site: Site, kept: Sequence[str]) -> str | None:
        """Why a site is not cut, or None."""
        if site.name in kept:
            return "it is to stay float"
        return uncut(site, max(self.least, 2 * self.align))

    def _costs(self, model: Model, readers: Mapping[ir.Value, Sequence[Site]]) -> dict[ir.Value, Floats]:
        """Shares of the cost of each column, summed over all that read a value; empty where nobody asks."""
        if self.order == "none" and self.cut == "equal":
            return {}
        costs: dict[ir.Value, Floats] = {}
        for chunk in gram_parts(readers, lambda value: readers[value][:1]):
            found = grams(model, [readers[value][0] for value in chunk], enough_samples(model))
            for value in chunk:
                curvature = _curvature(found[readers[value][0].name].matrix)
                costs[value] = np.sum([self._shares(site, curvature) for site in readers[value]], axis=0)
        return costs

    def _shares(self, site: Site, curvature: Floats) -> Floats:
        matrix = site.matrix()
        found = saliences(matrix, curvature, 1) if self.order == "salience" else column_costs(matrix, curvature)
        total = float(found.sum())
        return found / total if total > 0 else np.full(len(found), 1 / len(found))

    def _sort_and_cut(self, model: Model, group: Sequence[Site], costs: Floats | None) -> tuple[Sizes, str]:
        """Cut all readers of a value alike, if that is worth it; how the order was brought about."""
        order = np.arange(group[0].columns)
        if costs is not None and self.order != "none":
            order = np.argsort(-costs, kind="stable")
        sizes, how = self._sizes(group, costs, order), "natural"
        if len(sizes.columns) > 1:
            how = absorbed(model, order, group)
        if how == "gather":
            sizes = self._sizes(group, costs, order, len(order) * _INDEX_BITS)
        if len(sizes.columns) > 1:
            cut_alike(model, group, sizes.columns, order if how == "gather" else None)
        return sizes, how

    def _sizes(
        self, group: Sequence[Site], costs: Floats | None, order: npt.NDArray[np.intp], stored: int = 0
    ) -> Sizes:
        """Of the panels of sorted columns, where the order itself takes some bits to store."""
        if self.cut == "equal" or costs is None:
            return Sizes(equal_sizes(len(order), self.panels, self.align), 0.0)
        overhead = (stored + self.panels * _SIZE_BITS) / sum(site.count for site in group)
        return best_sizes(costs[order], self.panels, self.align, overhead, self.gain)


def _curvature(gram: npt.NDArray[np.float32]) -> Floats:
    """1 / d^2 of every column as GPTQ takes them: those of the largest inputs first, made up for by all others."""
    order = np.argsort(-np.diagonal(gram[0]), kind="stable")
    found = np.empty((1, len(order)))
    found[:, order] = inverse_squares(gram[:, order][:, :, order])
    return found
