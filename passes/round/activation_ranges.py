"""ActivationRanges: static uint8 grids for activations, chosen so that the whole graph can run on integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qcompiler.budget import bits_per_weight
from qcompiler.errors import BadOption, PassRefused
from qcompiler.graph.sites import find_sites
from qcompiler.measure.runner import Runner
from qcompiler.model import Model, StaticRange
from qcompiler.passes.round.histograms import Histogram
from qcompiler.passes.round.quantized_values import Target, choose_values
from qcompiler.passes.round.range_search import RangeSearch
from qcompiler.passes.round.streams import calibration_feeds
from qcompiler.pipeline import Pass, PassReport, check_numbers
from qcompiler.progress import Progress

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
        """Choose the values and their grids; metrics hold the ends of each."""
        static = {name for name, plan in model.plan.sites.items() if plan.activation == "static"}
        sites = [site for site in find_sites(model.ir) if site.name in static]
        products = {node for site in sites for node in site.users if node.op_type != "Gather"}
        targets = choose_values(model.graph, products, self.outputs)
        if targets:
            model.ranges.update(self._ranges(model, targets, progress))
        ends = {name: [found.low, found.high] for name, found in model.ranges.items()}
        return PassReport(self.registered_name(), len(targets), metrics={"ranges": ends})

    def _ranges(self, model: Model, targets: list[Target], progress: Progress) -> dict[str, StaticRange]:
        grids: dict[str, StaticRange] = {}
        histograms = self._histograms(model, targets, progress)
        if self.method == "search":
            narrow = bool(model.weights) and (bits_per_weight(model) or _NARROW) < _NARROW
            feeds = calibration_feeds(model, -(-self.judges // 2) if narrow else self.judges, _TOKENS)
            return RangeSearch(model, targets, histograms, feeds).run(progress)
        for target, histogram in zip(targets, histograms, strict=True):
            low, high = histogram.low, histogram.high
            if self.method == "percentile":
                low, high = histogram.percentile(self.percentile)
            elif self.method == "mse":
                low, high = histogram.least_error()
            own = target.grid(low, high)
            grids[str(target.value.name)] = own if target.like is None else grids[str(target.like.name)]
        return grids

    def _histograms(self, model: Model, targets: list[Target], progress: Progress) -> list[Histogram]:
        """Ends in a first pass over the data, counts in a second."""
        names = [str(target.value.name) for target in targets]
        runner = Runner(model.ir, outputs=names)
        feeds = calibration_feeds(model, self.samples, _TOKENS)
        ends = {name: [0.0, 0.0] for name in names}
        for feed in progress.track(feeds, "Ranges"):
            for name, x in runner(feed).items():
                ends[name] = [min(ends[name][0], float(x.min(initial=0))), max(ends[name][1], float(x.max(initial=0)))]
        bad = [name for name, pair in ends.items() if not np.isfinite(pair).all()]
        if bad:
            raise PassRefused("calibration makes it infinite or NaN", where=bad[0], fix="check data and model")
        histograms = {name: Histogram.between(*pair) for name, pair in ends.items()}
        if self.method != "minmax":
            for feed in progress.track(feeds, "Histograms"):
                for name, x in runner(feed).items():
                    histograms[name].add(x)
        return [histograms[name] for name in names]
