"""Activation equalisation: give the channels of an activation the same range, so that one grid serves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.budget import parse_budget
from qcompiler.errors import BadOption
from qcompiler.graph.folds import Fold
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Activations, menu, target_for
from qcompiler.passes.transform.inputs import (
    Floats,
    channel_reach,
    check_percentile,
    find_folds,
    layer_inputs,
    require_float,
    spread,
)
from qcompiler.pipeline import LOSSY, Pass, PassReport
from qcompiler.progress import Progress

_SMALLEST = 1 / 64  # channels that calibration saw almost nothing of may do more on other data


@dataclass(frozen=True)
class EqualizeActivations(Pass):
    """Divide channel c of a value by s_c = (A_c / max A)^strength; what reads it multiplies.

    A_c is the largest activation of the channel. With one static grid a tensor, a channel that fills a tenth of the
    range is rounded ten times as coarsely as it need be; here it is stretched to fill it. The weights before take
    that without loss where they have a scale a row, so do depthwise weights behind (strength 1 is used there);
    the columns of other weights get further apart, which `strength` trades off.

    The largest activation is that of the calibration data; other data reaches farther, so no channel is stretched
    beyond 1 / `margin` of the range. A channel may be stretched up to the bound of a Relu6 (Clip), which stays where
    it is: on calibration data the function is the same, on other data such a channel is cut off where its grid would
    end anyway. Therefore lossy, and for static activations only.

    Source: one-sided equalisation of Meller et al., "Same, Same But Different" (1902.01917).

    Attributes:
        strength: 0 leaves all but the inputs of depthwise layers alone, 1 gives all channels one range. It holds
            for weights of 8 bits; columns that are further apart cost narrower ones more, so it is half of that from
            6 bits on, and 0 for fewer.
        margin: see above.
        percentile: of |activation| in a channel that counts as its range; 100 is the largest.
        clips: whether Clip is crossed in that way.
        target: says which layers want static activations; nothing else is touched.
        activations: "auto" (what the target does best), "float", "static" or "dynamic".
        budget: of the weights; 8 bits and more if none is given.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = LOSSY
    hints: ClassVar[tuple[str, ...]] = ("budget",)
    strength: float = 0.35
    margin: float = 2.0
    percentile: float = 100.0
    clips: bool = True
    target: str = "onnx"
    activations: Activations = "auto"
    budget: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.strength <= 1 and self.margin >= 1):
            raise BadOption(
                f"a strength of {self.strength} with a margin of {self.margin} does not exist",
                "pass 'equalize-activations'",
                "give a strength between 0 and 1 and a margin of 1 or more",
            )
        check_percentile(self.percentile)

    def requires(self, model: Model) -> None:
        """Float weights, calibration data."""
        require_float(model, data=True)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Equalise every static input of a layer that can be."""
        sites = find_sites(model.ir)
        static = self._static(sites)
        inputs = {value: axis for value, axis in layer_inputs(model).items() if value in static}
        depthwise, strength = _read_by_depthwise_only(sites), self.strength * _room(sites, self.budget)
        folds, refused = find_folds(model, inputs, lambda _fold: None, loose=self.clips)
        values = {value: axis for fold in folds for value, axis in _quantized(fold, inputs).items()}
        reach = channel_reach(model, {v.name or "": axis for v, axis in values.items()}, self.percentile)
        ranges: dict[str, list[float]] = {}
        for fold in progress.track(folds, "equalising activations"):
            inside = {value: reach[value.name or ""] for value in values if value in fold.region.marks}
            share = _share(fold, inside)
            free = depthwise.issuperset(inside.keys() & inputs.keys())
            s = np.minimum(share * self.margin, 1.0) ** (1.0 if free else strength)
            fold.scale(s)
            ranges[fold.value.name or ""] = [spread(share), spread(share / s)]
        metrics = {"max_over_median": ranges} if ranges else {}
        return PassReport(self.registered_name(), len(folds), tuple(refused), metrics)

    def _static(self, sites: Sequence[Site]) -> set[ir.Value]:
        """The inputs that the target wants to quantize by fixed ranges."""
        backend = target_for(self.target, self.activations)
        plans = {site: menu(backend, site, (8,), (), self.activations).plans for site in sites}
        return {v for site in sites if any(p.activation == "static" for p in plans[site]) for v in site.activations}


def _room(sites: Sequence[Site], budget: Sequence[str]) -> float:
    """1 where weights get 8 bits or more, 1/2 from 6 bits on, else 0: most other budgets find their losses measured."""
    count = max(1, sum(site.count for site in sites))
    amounts = [b for b in map(parse_budget, budget) if b.stored]
    bits = [float(b.amount if b.kind == "bits" else 8 * b.amount / count) for b in amounts]
    return float(np.clip((min(bits, default=8.0) - 4) // 2 / 2, 0, 1))


def _quantized(fold: Fold, inputs: Mapping[ir.Value, int]) -> dict[ir.Value, int]:
    """The values of a fold that will have a grid of their own, with their channel axes."""
    found = {value: axis for value, axis in inputs.items() if value in fold.region.marks}
    for node, mark in fold.region.loose_clips.items():
        axes = [k for k, size in enumerate(mark.labels.shape) if size > 1]
        found.setdefault(node.outputs[0], axes[0] if axes else fold.axis)
    return found


def _read_by_depthwise_only(sites: Sequence[Site]) -> set[ir.Value]:
    """Values that no layer sums over channels of."""
    mixed = {value for site in sites if site.groups != site.rows or site.op != "Conv" for value in site.activations}
    return {value for site in sites for value in site.activations} - mixed


def _share(fold: Fold, reach: Mapping[ir.Value, Floats]) -> Floats:
    """[channels of the fold]: the largest share of its tensor's range that a channel fills; 1 where fixed or dead."""
    classes, found = fold.region.classes, dict[int, float]()
    for value, channels in reach.items():
        roots = classes.roots(fold.region.marks[value].labels).reshape(-1)
        for root, part in zip(roots.tolist(), channels / max(float(channels.max()), 1e-30), strict=True):
            found[root] = max(found.get(root, 0.0), float(part))
    share = np.array([found.get(int(root), 1.0) for root in classes.roots(fold.start).reshape(-1)])
    share = fold.tied(np.maximum(share, 1e-30), lambda group: float(group.max()))
    return np.where(fold.free & (share > 1e-20), np.maximum(share, _SMALLEST), 1.0)
