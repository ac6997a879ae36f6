"""The error that rounding makes in the output of a site, by the second moments of its input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qcompiler.formats import QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.fit import quantize
from qcompiler.graph.folds import Fold
from qcompiler.graph.sites import Site
from qcompiler.measure.gram import Gram, gram_parts, grams
from qcompiler.model import Model
from qcompiler.passes.transform.columns import Columns, Doubles, centred, readers_of
from qcompiler.passes.transform.inputs import enough_samples
from qcompiler.progress import Progress

_ROWS = 128  # of a weight matrix, to judge a transform


Importance = Literal["none", "activations", "moments"]


@dataclass(frozen=True, eq=False)
class OutputError:
    """E||x (W' - W)^T||^2 over some rows of one site's weight, rounded to nearest in one format.

    Attributes:
        site, spec, gram: what, how, and by which inputs.
        matrix: float32 [chosen rows, columns]; every `step`-th row.
        power: mean square of the input, float32 [columns] or [chosen rows, columns].
        importance: how rounding weighs its errors, as `nearest` does it.
    """

    site: Site
    spec: QuantSpec
    gram: Gram
    matrix: Floats
    step: int
    power: Floats
    importance: Importance

    @staticmethod
    def of(site: Site, spec: QuantSpec, gram: Gram, rows: int = _ROWS, importance: Importance = "none") -> OutputError:
        """Of about so many rows; of all where they have different inputs (groups of a convolution)."""
        groups = len(gram.matrix)
        step = max(1, site.rows // rows) if groups == 1 else 1
        matrix = np.ascontiguousarray(site.matrix()[::step])
        own = np.einsum("gkk->gk", gram.matrix).clip(min=0)
        power = own[0] if groups == 1 else np.repeat(own, site.rows // groups, axis=0)
        return OutputError(site, spec, gram, matrix, step, power, importance)

    def rounded(self, effect: Columns | None) -> Floats:
        """The weight that takes part in the function, with scales of the columns or without."""
        if effect is None:
            return self._nearest(self.matrix, None)
        part = effect.part(self.step)
        changed, undo = part.change(self.matrix, self.spec)
        return undo(self._nearest(changed, part.factors))

    def error(self, effect: Columns | None) -> float:
        """Of the rounded weight."""
        return self.gram.error(self.rounded(effect) - self.matrix)

    def _nearest(self, matrix: Floats, factors: Doubles | None) -> Floats:
        return quantize(matrix, self.spec, "mse", self._weights(factors)).decode()

    def _weights(self, factors: Doubles | None) -> Floats | None:
        """Of the errors of a weight whose columns are multiplied by factors [rows or 1, columns]."""
        if self.importance == "none":
            return None
        moments = self.gram.matrix
        if self.importance == "moments" and (factors is None or len(factors) == 1 or len(moments) > 1):
            f = np.ones((1, moments.shape[2])) if factors is None else factors
            own = f if len(f) == 1 else f[:: len(f) // len(moments)]
            moments = (moments / (own[:, :, None] * own[:, None, :])).astype(np.float32)
            return moments / (np.einsum("gkk->gk", moments).max() or np.float32(1))
        power = self.power if factors is None else self.power / factors**2
        return np.broadcast_to(power / (power.max() or 1.0), self.matrix.shape)


def judged(
    model: Model,
    folds: Sequence[Fold],
    specs: Mapping[Site, QuantSpec],
    progress: Progress,
    rows: int = _ROWS,
    importance: Importance = "none",
) -> Iterator[tuple[Fold, list[OutputError]]]:
    """Each fold with what judges it: one for each reader whose input is known.

    The graph must stay as it is until the last one; Gram matrices are measured for some folds at a time.
    """
    readers = {fold: readers_of(fold, specs) for fold in folds}
    for chunk in gram_parts(folds, lambda fold: readers[fold]):
        known = grams(model, [site for fold in chunk for site in readers[fold]], enough_samples(model))
        for fold in progress.track(chunk, "searching scales"):
            own = [site for site in readers[fold] if site.name in known]
            yield fold, [OutputError.of(site, specs[site], known[site.name], rows, importance) for site in own]


def best_strength(
    fold: Fold, judges: Sequence[OutputError], reach: Doubles, strengths: Sequence[float], gain: float = 1.0
) -> tuple[Doubles, float, float] | None:
    """The centred powers of `reach` with the least error of all readers' outputs.

    Source: Lin et al., AWQ (2306.00978).

    Args:
        fold: whose scales.
        judges: of the readers.
        reach: float64 [channels]: what counts as the size of a channel.
        strengths: exponents to try.
        gain: share of the error without scales that must not be reached for scales to be worth it.

    Returns:
        Scales float64 [channels], their strength, and their error relative to that without scales; None: no gain.
    """
    plain = sum(judge.error(None) for judge in judges)
    best, least = None, plain * gain
    for strength in strengths:
        numbers = centred(fold, reach, strength)
        error = sum(judge.error(Columns.of(fold, judge.site, numbers)) for judge in judges)
        if error < least:
            best, least = (numbers, strength, error / plain), error
    return best
