"""Cross-layer equalisation: give a channel the same weight range on both sides of an activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from qcompiler.graph.folds import Fold
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import Floats, find_folds, layer_inputs, require_float
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.progress import Progress

_CONVERGED = 1e-4


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale the channels between two layers so that the weights that make and read each have one range.

    With r1 the largest weight that makes channel c and r2 the largest that reads it, dividing the channel by
    sqrt(r1 / r2) leaves sqrt(r1 r2) on both sides. Pairs share layers, so all are swept until nothing moves.
    Helps formats with one scale a tensor; needs no data.

    Source: Nagel et al., Data-Free Quantization (1906.04721), section 4.1.

    Attributes:
        sweeps: at most this many.
        clips: turn Clip(0, 6) between layers into a bound for each channel, two cheap operations; otherwise
            such pairs are left alone.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    sweeps: int = 20
    clips: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, ("sweeps",))

    def requires(self, model: Model) -> None:
        """Float weights."""
        require_float(model, data=False)

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Sweep over all pairs of layers."""
        folds, refused = find_folds(model, layer_inputs(model), _between_layers, insert=self.clips)
        before = _worst(folds)
        moved: list[float] = []
        for _ in progress.track(range(self.sweeps if folds else 0), "equalising layers"):
            moved.append(max(_balance(fold) for fold in folds))
            if moved[-1] < _CONVERGED:
                break
        metrics = {"range_ratio_before": before, "range_ratio_after": _worst(folds), "scales_moved": moved}
        return PassReport(self.registered_name(), len(folds), tuple(refused), metrics)


def _between_layers(fold: Fold) -> str | None:
    if any(e.is_weight for e in fold.writers) and any(e.is_weight for e in fold.readers):
        return None
    return "it is not between two layers"


def _ranges(fold: Fold) -> tuple[Floats, Floats]:
    return fold.absmax(fold.writers), fold.absmax(fold.readers)


def _balance(fold: Fold) -> float:
    """Equalise one value; return how far the largest scale is from 1."""
    made, read = _ranges(fold)
    alive = (made > 0) & (read > 0) & fold.free
    s = np.where(alive, np.sqrt(np.where(alive, made, 1.0) / np.where(alive, read, 1.0)), 1.0)
    fold.scale(s)
    return float(np.abs(s - 1).max())


def _worst(folds: Sequence[Fold]) -> float:
    """The largest ratio of the two ranges of a channel."""
    worst = 1.0
    for fold in folds:
        made, read = _ranges(fold)
        alive = (made > 0) & (read > 0) & fold.free
        ratio = made[alive] / read[alive]
        worst = max(worst, float(np.maximum(ratio, 1 / ratio).max(initial=1.0)))
    return worst
