"""ActivationRanges: static uint8 grids for activations, chosen so that the whole graph can run on integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qcompiler.budget import bits_per_weight
from qcompiler.errors import BadOption, PassRefused
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model, StaticRange
from qcompiler.passes.round.histograms import Histogram
from qcompiler.passes.round.quantized_values import Target, choose_values
from qcompiler.passes.round.range_search import RangeSearch
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.pipeline import Pass, PassReport, Refusal, check_numbers
from qcompiler.progress import Progress

Feed = dict[str, npt.NDArray[Any]]
_TOKENS = 1 << 13
_NARROW = 6  # bits


@dataclass(frozen=True)
class ActivationRanges(Pass):
    """Fill `model.ranges` for the sites whose plan says "static".

    Attributes:
        method: "minmax" covers all that calibration saw; "percentile" leaves out a share of the extremes; "mse"
            minimises the squared error of the value itself; "search" that of the model's output, and should run
            after the weights are rounded.
        percentile: for the method of that name: this share of the values stays inside.
        samples: of the calibration data, at most.
        judges: samples on whose outputs a search is judged; half of them where weights have fewer than 6 bits on
            average, whose errors are larger than those of any range.
        outputs: whether outputs of the graph get a grid too (a quantized output costs accuracy, and float
            results of a last Gemm or MatMul cost no time).
    """

    method: Literal["minmax", "percentile", "mse", "search"] = "search"
    percentile: float = 99.99
    samples: int = 64
    judges: int = 24
    outputs: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, ("samples", "judges"))
        if not 0 < self.percentile <= 100:
            what = f"a percentile of {self.percentile} does not exist"
            raise BadOption(what, "pass 'activation-ranges'", "give more than 0, at most 100")

    def requires(self, model: Model) -> None:
        """Refuse a lowered model, and static plans without calibration data."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        static = any(plan.activation == "static" for plan in model.plan.sites.values())
        if static and model.calibration is None:
            raise PassRefused("static activations need calibration data", where=model.name)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Choose the values and their grids; metrics hold the ends of each.

        What calibration makes infinite or NaN (scores that a mask takes away) has no grid: it stays float, and with it
        the activations of the sites that read it.
        """
        static = {name for name, plan in model.plan.sites.items() if plan.activation == "static"}
        sites = [site for site in find_sites(model.ir) if site.name in static]
        targets = self._targets(model, sites)
        feeds = calibration_feeds(model, self.samples, _TOKENS) if targets else []
        ends = _ends(model, targets, feeds, progress)
        bad = [name for name, pair in ends.items() if not np.isfinite(pair).all()]
        if bad:
            progress.note(f"activation-ranges: calibration makes '{bad[0]}' infinite or NaN: it stays float")
            apart = [site for site in sites if any(value.name in bad for value in site.activations)]
            plans = {site.name: replace(model.plan.sites[site.name], activation="float") for site in apart}
            model.plan = model.plan.with_sites(plans)
            targets = self._targets(model, [site for site in sites if site not in apart], bad)
        if targets:
            model.ranges.update(self._ranges(model, targets, ends, feeds, progress))
        found = {name: [grid.low, grid.high] for name, grid in model.ranges.items()}
        refused = tuple(Refusal(name, "calibration makes it infinite or NaN: it stays float") for name in bad)
        return PassReport(self.registered_name(), len(targets), refused, {"ranges": found})

    def _targets(self, model: Model, sites: Sequence[Site], bad: Sequence[str] = ()) -> list[Target]:
        products = {node for site in sites for node in site.users if node.op_type != "Gather"}
        return choose_values(model.graph, products, self.outputs, bad)

    def _ranges(
        self,
        model: Model,
        targets: list[Target],
        ends: Mapping[str, Sequence[float]],
        feeds: Sequence[Feed],
        progress: Progress,
    ) -> dict[str, StaticRange]:
        grids: dict[str, StaticRange] = {}
        histograms = self._histograms(model, targets, ends, feeds, progress)
        if self.method == "search":
            narrow = bool(model.weights) and (bits_per_weight(model) or _NARROW) < _NARROW
            judges = calibration_feeds(model, -(-self.judges // 2) if narrow else self.judges, _TOKENS)
            return RangeSearch(model, targets, histograms, judges).run(progress)
        for target, histogram in zip(targets, histograms, strict=True):
            low, high = histogram.low, histogram.high
            if self.method == "percentile":
                low, high = histogram.percentile(self.percentile)
            elif self.method == "mse":
                low, high = histogram.least_error()
            own = target.grid(low, high)
            grids[str(target.value.name)] = own if target.like is None else grids[str(target.like.name)]
        return grids

    def _histograms(
        self,
        model: Model,
        targets: Sequence[Target],
        ends: Mapping[str, Sequence[float]],
        feeds: Sequence[Feed],
        progress: Progress,
    ) -> list[Histogram]:
        """Counts between the ends, in a second pass over the data."""
        names = [str(target.value.name) for target in targets]
        histograms = {name: Histogram.between(*ends[name]) for name in names}
        if self.method != "minmax":
            runner = Runner(model.ir, outputs=names)
            for feed in progress.track(feeds, "Histograms"):
                for name, x in runner(feed).items():
                    histograms[name].add(x)
        return [histograms[name] for name in names]


def _ends(
    model: Model, targets: Sequence[Target], feeds: Sequence[Feed], progress: Progress
) -> dict[str, tuple[float, float]]:
    """Smallest and largest number of each value, zero among them; infinite or NaN where any of them is."""
    names = [str(target.value.name) for target in targets]
    ends = dict.fromkeys(names, (0.0, 0.0))
    if not names:
        return ends
    runner = Runner(model.ir, outputs=names)
    for feed in progress.track(feeds, "Ranges"):
        for name, x in runner(feed).items():
            pair = np.array([ends[name], (x.min(initial=0), x.max(initial=0))], np.float64)
            ends[name] = float(pair[:, 0].min()), float(pair[:, 1].max())  # of numpy: Python's forget NaN
    return ends
