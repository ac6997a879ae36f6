"""The error that rounding makes in the output of a site, by the second moments of its input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.formats import QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.varied import VariedSpec, effective
from qcompiler.graph.folds import Fold
from qcompiler.graph.sites import Site
from qcompiler.measure.gram import Gram, gram_parts, grams
from qcompiler.model import Model
from qcompiler.passes.transform.columns import Columns, Doubles, centred, readers_of
from qcompiler.passes.transform.inputs import enough_samples
from qcompiler.progress import Progress

_ROWS = 128  # of a weight matrix, to judge a transform


@dataclass(frozen=True, eq=False)
class OutputError:
    """E||x (W' - W)^T||^2 over some rows of one site's weight, rounded to nearest in one format.

    Attributes:
        site, spec, gram: what, how, and by which inputs.
        matrix: float32 [chosen rows, columns]; every `step`-th row.
    """

    site: Site
    spec: QuantSpec
    gram: Gram
    matrix: Floats
    step: int

    @staticmethod
    def of(site: Site, spec: QuantSpec, gram: Gram, rows: int = _ROWS) -> OutputError:
        """Of about so many rows; of all where they have different inputs (groups of a convolution)."""
        step = max(1, site.rows // rows) if len(gram.matrix) == 1 else 1
        return OutputError(site, spec, gram, np.ascontiguousarray(site.matrix()[::step]), step)

    def error(self, effect: Columns | None) -> float:
        """With scales of the columns, or without."""
        spec = self.spec if effect is None else VariedSpec.of(self.spec, "scaled", "", effect.part(self.step))
        return self.gram.error(effective(self.matrix, spec).decode() - self.matrix)


def judged(
    model: Model, folds: Sequence[Fold], specs: Mapping[Site, QuantSpec], progress: Progress, rows: int = _ROWS
) -> Iterator[tuple[Fold, list[OutputError]]]:
    """Each fold with what judges it: one for each reader whose input is known.

    The graph must stay as it is until the last one; Gram matrices are measured for some folds at a time.
    """
    readers = {fold: readers_of(fold, specs) for fold in folds}
    for chunk in gram_parts(folds, lambda fold: readers[fold]):
        known = grams(model, [site for fold in chunk for site in readers[fold]], enough_samples(model))
        for fold in progress.track(chunk, "searching scales"):
            own = [site for site in readers[fold] if site.name in known]
            yield fold, [OutputError.of(site, specs[site], known[site.name], rows) for site in own]


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
