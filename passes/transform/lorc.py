"""LoRC: a low-rank branch in float16 for what rounding loses, with the saliences of its successors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcompiler.errors import PassRefused, Refusal
from qcompiler.graph.sites import find_sites
from qcompiler.measure.gram import gram_parts, grams
from qcompiler.measure.statistics import channel_statistics
from qcompiler.model import Model
from qcompiler.passes.transform.branching import Readers, check_factors, put_beside, readers
from qcompiler.passes.transform.factors import FactorBits, Factors, Metric, Search, approximate, search
from qcompiler.passes.transform.inputs import enough_samples
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.progress import Progress


@dataclass(frozen=True)
class LoRC(Pass):
    """Take from each weight the U V that its rounding loses most by, and put x V^T U^T beside its product.

    Behind a rounding pass the codes stay and U V are the best approximation of W - Q. Between plan and rounding they
    are made for rounding to nearest, of what is then left of the weight, and both are repeated. Sites that read one
    value share V.

    Source: Yao et al., LoRC in ZeroQuant-V2 (2303.08302), "plain"; Zhang et al., QERA (2410.06040), "input"; Mozaffari
    et al., SLiM (2410.09615), "slim" (of its parts only this one: there is no sparse format).

    Attributes:
        saliency: what an error of the weight costs: "plain" its square, "input" the square that it makes in the output,
            "slim" its square with columns weighed by the mean |x| of their input.
        rank: of a branch, at most.
        share: bits per weight that a branch stores, at most; lowers the rank of small matrices.
        common: whether sites that read one value share V.
        factor_bits: of a stored number of U and V: 16 (float16), or 8 (int8 with a step for each direction).
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    saliency: Literal["plain", "input", "slim"] = "input"
    rank: int = 16
    share: float = 0.25
    common: bool = True
    factor_bits: FactorBits = 16

    def __post_init__(self) -> None:
        check_numbers(self, ("rank",), ("share",))
        check_factors(self, self.factor_bits)

    def requires(self, model: Model) -> None:
        """A plan, a graph that is still float, data where the saliency needs it."""
        if model.lowered:
            raise PassRefused("the model is lowered already", model.name, "put 'lorc' before 'insert-qdq'")
        if not model.plan.sites:
            raise PassRefused("there is no plan that says what rounding loses", model.name, "put 'lorc' behind a plan")
        if self.saliency != "plain" and model.calibration is None:
            fix = 'give --calib, or use saliency = "plain"'
            raise PassRefused(f"saliency '{self.saliency}' needs calibration data", model.name, fix)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Add a branch wherever one is possible and helps."""
        plans = {s: p for s in find_sites(model.ir) if (p := model.plan.sites.get(s.name)) is not None and p.weight}
        corrected = [s for s in plans if model.bias_shift.keys() & {s.name, *(str(v.name) for v in s.activations)}]
        groups, refused = readers({s: p for s, p in plans.items() if s not in corrected}, share=self.common)
        refused += [Refusal(s.name, "no branch: its bias is corrected already: put it behind") for s in corrected]
        branches: dict[str, dict[str, float]] = {}
        for group, metric in self._metrics(model, groups, progress):
            rank = group.rank(self.rank, self.share, self.factor_bits)
            found = rank if isinstance(rank, Refusal) else _factors(model, group, metric, rank, self.factor_bits)
            if isinstance(found, Refusal):
                refused.append(found)
                continue
            factors, error = found
            for name, facts in put_beside(model, group, factors).items():
                branches[name] = {**facts, "error": error}
        metrics = {"branches": branches} if branches else {}
        return PassReport(self.registered_name(), len(branches), tuple(refused), metrics)

    def _metrics(self, model: Model, groups: Sequence[Readers], progress: Progress) -> Iterator[tuple[Readers, Metric]]:
        """What an error of each group's weights costs; measured on the graph as it is at the time."""
        if self.saliency == "input":
            for part in gram_parts(groups, lambda group: group.sites):
                known = grams(model, [group.sites[0] for group in part], enough_samples(model))
                with_input = [group for group in part if group.sites[0].name in known]
                for group in progress.track(with_input, "low-rank branches"):
                    yield group, Metric.inputs(known[group.sites[0].name].matrix[0])
            return
        names = [group.name for group in groups]
        reach = channel_statistics(model, names, -1, enough_samples(model)) if self.saliency == "slim" else {}
        for group in progress.track(groups, "low-rank branches"):
            known_reach = reach.get(group.name)
            yield group, Metric.plain(group.columns) if known_reach is None else Metric.slim(known_reach.magnitude)


def _factors(
    model: Model, group: Readers, metric: Metric, rank: int, bits: FactorBits
) -> tuple[Factors, float] | Refusal:
    """The factors for a group of sites, and the cost of rounding relative to that without them."""
    if not np.isfinite(metric.moments).all():
        return Refusal(group.name, "no branch: its input holds NaN or infinity")
    matrix, names = group.matrix(), [site.name for site in group.sites]
    if all(name in model.weights for name in names):
        lost = matrix - np.concatenate([model.weights[name].decode() for name in names])
        factors = approximate(lost, metric, rank, bits)
        after = np.inf if factors is None else metric.cost(lost - factors.product())
    else:
        lost = matrix - group.rounding.fitted(matrix)(matrix)
        found = search(matrix, group.rounding, metric, rank, Search(bits=bits))
        factors, after = (None, np.inf) if found is None else (found[0], min(found[1]))
    before = metric.cost(lost)
    if factors is None or not after < before:
        return Refusal(group.name, "no branch: it would not lower the cost of rounding")
    return factors, after / before
