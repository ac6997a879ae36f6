"""SVDQuant: what is hard to round goes into a low-rank branch in float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from qcompiler.errors import BadOption, Refusal
from qcompiler.formats import parse_spec
from qcompiler.formats.base import Floats
from qcompiler.graph.sites import Site
from qcompiler.model import Model
from qcompiler.passes.transform.branching import Readers, check_factors, put_beside, readers
from qcompiler.passes.transform.factors import FactorBits, Metric, Search, search
from qcompiler.passes.transform.inputs import require_float, weight_specs
from qcompiler.passes.transform.row_error import RowError, with_rows
from qcompiler.passes.transform.svd_smoothing import smooth
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.plan import ActivationMode, SitePlan
from qcompiler.progress import Progress


@dataclass(frozen=True)
class SVDQuant(Pass):
    """W x = (W - U V) x + U V x: the weight's largest singular directions stay float16, the rest is easier to round.

    First the input of each layer is divided by scales that its producer absorbs (outliers of activations become large
    columns of the weight, which the branch then takes over), searched with the branch in the judged error. Then
    L = SVD_r(W - Q(W - L)) is repeated, beginning with L = SVD_r(W), until the error of the output grows; the best is
    kept. Sites that read one value share V. Dynamic activations are rounded for the product, not for the branch. What
    is left is rounded by the passes behind, in the formats of the plan. Put other transforms before.

    Source: Li et al., SVDQuant (2411.05007).

    Attributes:
        rank: of a branch, at most.
        share: bits per weight that a branch stores, at most; lowers the rank of small matrices.
        spec: format of all weights where there is no plan yet.
        activation_bits: of dynamic activations where there is no plan yet; 0: they stay float.
        smoothing: whether scales are searched.
        grid: of their exponents: 2 * grid - 1 pairs.
        sweeps: of L, at most.
        factor_bits: of a stored number of U and V: 16 (float16, as in the paper), or 8 (int8 with a step for each
            direction, so that the same bytes hold twice the rank).
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    rank: int = 32
    share: float = 0.5
    spec: str = ""
    activation_bits: int = 0
    smoothing: bool = True
    grid: int = 20
    sweeps: int = 100
    factor_bits: FactorBits = 16

    def __post_init__(self) -> None:
        check_numbers(self, ("rank", "grid", "sweeps"), ("share",))
        check_factors(self, self.factor_bits)
        if self.activation_bits and not self.spec:
            fix = "drop it, or give 'spec' too and put the pass before the plan"
            raise BadOption("the plan says how activations are rounded, not 'activation_bits'", "pass 'svdquant'", fix)
        if self.spec:
            parse_spec(self.spec)

    def requires(self, model: Model) -> None:
        """Float weights, calibration data."""
        require_float(model, data=True)
        self._plans(model)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Smooth, then add the branches."""
        groups, refused = self._groups(model)
        smoothing: dict[str, Any] = {}
        if self.smoothing:
            smoothing, stuck = smooth(model, groups, self.grid, progress)
            refused += stuck
        branches: dict[str, dict[str, float]] = {}
        for group, found in with_rows(model, list(groups), lambda group: [group], progress, "low-rank branches"):
            reason = self._add(model, group, groups[group], found[0][1], branches) if found else "it has no input"
            if reason is not None:
                refused.append(Refusal(group.name, f"no branch: {reason}"))
        metrics = {"branches": branches, "smoothing": smoothing} if branches else {}
        return PassReport(self.registered_name(), len(branches), tuple(refused), metrics)

    def _plans(self, model: Model) -> dict[Site, SitePlan]:
        """How each site will be rounded; those that stay float are left out."""
        specs = weight_specs(model, self.spec, "pass 'svdquant'")
        if not self.spec:
            return {site: model.plan.sites[site.name] for site in specs}
        mode: ActivationMode = "dynamic" if self.activation_bits else "float"
        return {site: SitePlan(spec, mode, "", self.activation_bits or 8) for site, spec in specs.items()}

    def _groups(self, model: Model) -> tuple[dict[Readers, int], list[Refusal]]:
        """The sites that get a branch, those that read one value together, with its rank; why others get none."""
        found, refused = readers(self._plans(model))
        ranks = {group: group.rank(self.rank, self.share, self.factor_bits) for group in found}
        small = [rank for rank in ranks.values() if isinstance(rank, Refusal)]
        return {group: rank for group, rank in ranks.items() if isinstance(rank, int)}, [*refused, *small]

    def _add(
        self, model: Model, group: Readers, rank: int, rows: Floats, branches: dict[str, dict[str, float]]
    ) -> str | None:
        """Put a branch beside the sites of a group; or why not."""
        if not np.isfinite(rows).all():
            return "its input holds NaN or infinity"
        matrix, judge = group.matrix(), RowError.of(rows, group.plans[0])
        how = Search(self.sweeps, 1, of_weight=True, bits=self.factor_bits)
        found = search(matrix, group.rounding, Metric.plain(group.columns), rank, how, judge)
        if found is None:
            return "float16 cannot hold it"
        factors, errors = found
        before = judge(matrix, group.rounding.fitted(matrix)(matrix))
        if not min(errors) < before:
            return "the error of the output is no smaller with it"
        for name, facts in put_beside(model, group, factors).items():
            branches[name] = {**facts, "error": min(errors) / before, "sweeps": len(errors)}
        return None
