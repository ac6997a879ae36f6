"""SmoothQuant: move the range of activation outliers into the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcompiler.errors import BadOption
from qcompiler.graph.folds import Fold
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import (
    Floats,
    after_norm,
    channel_reach,
    check_percentile,
    find_folds,
    layer_inputs,
    require_float,
    spread,
)
from qcompiler.pipeline import EXACT, Pass, PassReport
from qcompiler.progress import Progress

_SMALLEST = 1e-5


@dataclass(frozen=True)
class Smooth(Pass):
    """Divide channel j of a layer's input by s_j = A_j^strength / W_j^(1 - strength).

    A_j is the largest activation of the channel, W_j the largest weight that reads it, over all layers that
    share the input. What produces the input absorbs the division, so nothing is computed at run time. At
    strength 0.5 activations and weights end with equal ranges, and a second run changes nothing.

    Source: Xiao et al., SmoothQuant (2211.10438).

    Attributes:
        strength: 0 equalises the columns of the weights, 1 the channels of the activations.
        percentile: of |activation| in a channel that counts as its reach; below 100 a few tokens cannot decide.
        sites: "norms": inputs that a norm produces (the paper); "all": also attention values and gated MLPs.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    strength: float = 0.5
    percentile: float = 100.0
    sites: str = "norms"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise BadOption(f"a strength of {self.strength} is not between 0 and 1", "pass 'smooth'")
        if self.sites not in ("norms", "all"):
            raise BadOption(f"unknown sites '{self.sites}'", "pass 'smooth'", "use norms or all")
        check_percentile(self.percentile)

    def requires(self, model: Model) -> None:
        """Float weights, calibration data."""
        require_float(model, data=True)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Smooth every input that can be smoothed."""
        folds, refused = find_folds(model, layer_inputs(model), after_norm if self.sites == "norms" else _any)
        reach = channel_reach(model, {fold.value.name or "": fold.axis for fold in folds}, self.percentile)
        ranges: dict[str, list[float]] = {}
        # Later values first: what reads an earlier one is then as it stays, and a second run changes nothing.
        for fold in progress.track(folds[::-1], "smoothing"):
            name = fold.value.name or ""
            s = self._scales(fold, reach[name])
            fold.scale(s)
            ranges[name] = [spread(reach[name]), spread(reach[name] / s)]
        return PassReport(
            self.registered_name(), len(folds), tuple(refused), {"max_over_median": ranges} if ranges else {}
        )

    def _scales(self, fold: Fold, reach: Floats) -> Floats:
        activation = fold.tied(reach, lambda group: float(group.max()))
        weight = fold.absmax(fold.readers)
        alive = (activation > 0) & (weight > 0) & fold.free
        a, w = np.maximum(activation, _SMALLEST), np.maximum(weight, _SMALLEST)
        return np.where(alive, np.maximum(a**self.strength / w ** (1 - self.strength), _SMALLEST), 1.0)


def _any(_fold: Fold) -> None:
    """Every fold is welcome."""
