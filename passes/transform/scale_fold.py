"""Scale folding: bring the channels behind a norm to one range before bits are allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcompiler.errors import BadOption
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

_LOW, _HIGH = 1e-2, 1e2


@dataclass(frozen=True)
class ScaleFold(Pass):
    """Divide channel j behind a norm by s_j = (A_j / median A)^power, kept within [0.01, 100].

    The weights are not asked (unlike `Smooth`), so the result does not depend on their rounding: it is a
    precondition of measuring sensitivities, and stays as it is after them.

    Source: reconstructed from the abstract of RAMP; the paper has no public code.

    Attributes:
        power: 0 changes nothing, 1 makes all channels alike.
        percentile: of |activation| in a channel that counts as its reach.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    power: float = 0.5
    percentile: float = 100.0

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise BadOption(f"a power of {self.power} is not between 0 and 1", "pass 'scale-fold'")
        check_percentile(self.percentile)

    def requires(self, model: Model) -> None:
        """Float weights, no plan yet, calibration data."""
        require_float(model, data=True)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fold behind every norm that allows it."""
        folds, refused = find_folds(model, layer_inputs(model), after_norm)
        reach = channel_reach(model, {fold.value.name or "": fold.axis for fold in folds}, self.percentile)
        ranges: dict[str, list[float]] = {}
        for fold in progress.track(folds, "folding scales"):
            own = reach[fold.value.name or ""]
            s = fold.tied(self._scales(own))
            fold.scale(s)
            ranges[fold.value.name or ""] = [spread(own), spread(own / s)]
        return PassReport(
            self.registered_name(), len(folds), tuple(refused), {"max_over_median": ranges} if ranges else {}
        )

    def _scales(self, reach: Floats) -> Floats:
        alive = reach > 0
        if not alive.any():
            return np.ones_like(reach)
        relative = np.where(alive, reach, 1.0) / np.median(reach[alive])
        return np.where(alive, np.clip(relative**self.power, _LOW, _HIGH), 1.0)
