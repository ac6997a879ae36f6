"""Activation equalisation: give the channels of an activation the same range, so that one grid serves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompiler.budget import parse_budget
from qcompiler.errors import BadOption
from qcompiler.graph.folds import Fold
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Activations, menu, target_for
from qcompiler.passes.round.quantized_values import choose_values
from qcompiler.passes.transform.channel_noise import HALVES, channel_noise
from qcompiler.passes.transform.fold_error import FoldError
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

_STRENGTHS = (0.0, 0.2, 0.35, 0.5, 0.75, 1.0)
_MARGINS = (2.0, 1.4, 1.0, 4.0)
_SMALLEST = 1 / 64  # channels that calibration saw almost nothing of may do more on other data


@dataclass(frozen=True)
class EqualizeActivations(Pass):
    """Divide channel c of a value by s_c = (A_c / max A)^strength; what reads it multiplies.

    A_c is the largest activation of the channel. With one static grid a tensor, a channel that fills a tenth of the
    range is rounded ten times as coarsely as it need be; here it is stretched to fill it. The weights before take
    that without loss where they have a scale a row, so do depthwise weights behind (strength 1 is used there);
    the columns of other weights get further apart, which `strength` trades off.

    How far channels are stretched is chosen for each fold, by the error that is predicted for the layers behind it
    (`fold_error`): the scales are taken from one half of the calibration data and judged on the other, both ways. For
    channels that are silent in one half (features that few pictures have) reach far beyond in the other.

    The largest activation is that of the calibration data; other data reaches farther, so no channel is stretched
    beyond 1 / `margin` of the range. A channel may be stretched up to the bound of a Relu6 (Clip), which stays where
    it is: on calibration data the function is the same, on other data such a channel is cut off where its grid would
    end anyway. Therefore lossy, and for static activations only.

    Source: one-sided equalisation of Meller et al., "Same, Same But Different" (1902.01917).

    Attributes:
        strength: 0 leaves all alone, 1 gives all channels one range; None chooses for each fold. What is chosen holds
            for weights of 8 bits; columns that are further apart cost narrower ones more, so it is half of that from
            6 bits on, and 0 for fewer, but for folds that only depthwise layers read.
        margin: see above; None chooses.
        percentile: of |activation| in a channel that counts as its range; 100 is the largest.
        clips: whether Clip is crossed in that way.
        target: says which layers want static activations; nothing else is touched.
        activations: "auto" (what the target does best), "float", "static" or "dynamic".
        budget: of the weights; 8 bits and more if none is given.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = LOSSY
    hints: ClassVar[tuple[str, ...]] = ("budget",)
    strength: float | None = None
    margin: float | None = None
    percentile: float = 100.0
    clips: bool = True
    target: str = "onnx"
    activations: Activations = "auto"
    budget: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        strengths, margins = self._choices()
        if not (0 <= strengths[0] <= 1 and margins[0] >= 1):
            raise BadOption(
                f"a strength of {strengths[0]:g} with a margin of {margins[0]:g} does not exist",
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
        depthwise, room = _read_by_depthwise_only(sites), _room(sites, self.budget)
        folds, refused = find_folds(model, inputs, lambda _fold: None, loose=self.clips)
        products = {node for site in sites for node in site.users if static.intersection(site.activations)}
        quantized = [target.value for target in choose_values(model.graph, products, outputs=False)]
        values = {v.name or "": _axis(f, v) for f in folds for v in quantized if v in f.region.marks}
        noise = channel_noise(model, values) if None in (self.strength, self.margin) else {}
        reach = {name: found.reach.max(0) for name, found in noise.items()}
        if not noise or self.percentile < 100:
            reach = channel_reach(model, values, self.percentile)
        ranges: dict[str, list[float]] = {}
        chosen: dict[str, tuple[float, float]] = {}
        for fold in progress.track(folds, "equalising activations"):
            inside = {v: reach[v.name or ""] for v in quantized if v in fold.region.marks}
            name, share = fold.value.name or "", _share(fold, inside)
            error = FoldError(fold, {v: noise[v.name or ""] for v in inside}, sites) if noise else None
            strength, margin = chosen[name] = self._choose(fold, error)
            free = depthwise.issuperset(inside.keys() & inputs.keys())
            s = _scale(share, strength if free else strength * room, margin)
            fold.scale(s)
            ranges[name] = [spread(share), spread(share / s)]
        metrics = {"max_over_median": ranges, "strength_and_margin": chosen} if ranges else {}
        return PassReport(self.registered_name(), len(folds), tuple(refused), metrics)

    def _choices(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The strengths and margins to choose from."""
        strengths = _STRENGTHS if self.strength is None else (self.strength,)
        return strengths, _MARGINS if self.margin is None else (self.margin,)

    def _choose(self, fold: Fold, error: FoldError | None) -> tuple[float, float]:
        """The strength and margin of least predicted error; scales of either half are judged on the other."""
        strengths, margins = self._choices()
        if error is None:
            return strengths[0], margins[0]
        shares = [_share(fold, error.reach(half)) for half in range(HALVES)]

        def loss(choice: tuple[float, float]) -> float:
            return sum(error(HALVES - 1 - half, _scale(share, *choice)) for half, share in enumerate(shares))

        return min(product(strengths, margins), key=loss)

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


def _scale(share: Floats, strength: float, margin: float) -> Floats:
    return np.minimum(share * margin, 1.0) ** strength


def _axis(fold: Fold, value: ir.Value) -> int:
    """The channel axis of a value in a fold."""
    axes = [k for k, size in enumerate(fold.region.marks[value].labels.shape) if size > 1]
    return axes[0] if axes else fold.axis


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
