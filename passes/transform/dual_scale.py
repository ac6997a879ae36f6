"""D2Quant's dual scale: a second scale for each column of a rounded weight, which the producer absorbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import BadOption, Refusal
from qcompiler.formats import parse_spec
from qcompiler.formats.base import Floats
from qcompiler.graph.folds import Fold
from qcompiler.model import Model
from qcompiler.passes.transform.columns import Columns, Doubles, factors_of, fold_all, stored_only
from qcompiler.passes.transform.inputs import find_folds, layer_inputs, require_float, weight_specs
from qcompiler.passes.transform.output_error import Importance, OutputError, judged
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.progress import Progress

_STEP = 2.0  # by which a scale changes at most in one round
_ALL_ROWS = 1 << 40


@dataclass(frozen=True)
class DualScale(Pass):
    """Divide the columns of a weight by c_j before rounding: what takes part is c_j Q(w_j / c_j).

    Found by turns: the weight is rounded anew for the scales, then each scale becomes the best one for the codes,
    c_j = sum_i w_ij d_ij / sum_i d_ij^2, where d are the rounded numbers. It starts with no scales and with the mean
    |w| of each column, and the best of all rounds by the error of the output is taken, or nothing. The producer of
    the input absorbs c (rows of an up or value projection, the gain of a norm), so that nothing more is stored.

    Source: Yan et al., D2Quant (2602.02546), the dual-scale quantizer, second hand: the code is not public. There it is
    for down projections and errors count alike; here they are weighed by the input.

    Attributes:
        spec: format of all weights where there is no plan yet.
        sites: "layers": inputs that another layer produces (down and output projections, convolutions); "all": also
            those that a norm produces.
        rounds: of either start.
        importance: what `nearest` behind it will be told.
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    spec: str = ""
    sites: Literal["layers", "all"] = "layers"
    rounds: int = 8
    importance: Importance = "activations"

    def __post_init__(self) -> None:
        check_numbers(self, ("rounds",))
        if self.sites not in ("layers", "all"):
            raise BadOption(f"unknown sites '{self.sites}'", "pass 'dual-scale'", "use layers or all")
        if self.spec:
            parse_spec(self.spec)

    def requires(self, model: Model) -> None:
        """Float weights, calibration data, a plan or a format."""
        require_float(model, data=True)
        weight_specs(model, self.spec, "pass 'dual-scale'")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Search all scales on the graph as it is, then fold them."""
        specs = weight_specs(model, self.spec, "pass 'dual-scale'")
        stored = stored_only({site: [spec] for site, spec in specs.items()})

        def accept(fold: Fold) -> str | None:
            if self.sites == "layers" and not any(edit.is_weight for edit in fold.writers):
                return "a norm produces it, not a layer"
            return stored(fold)

        folds, refused = find_folds(model, layer_inputs(model), accept)
        chosen: list[tuple[Fold, Doubles]] = []
        errors: dict[str, float] = {}
        for fold, judges in judged(model, folds, specs, progress, _ALL_ROWS, self.importance):
            name = fold.value.name or ""
            found = _search(fold, judges, self.rounds)
            if found is None:
                refused.append(Refusal(name, "no scales lower the error of what reads it"))
                continue
            chosen.append((fold, found[0]))
            errors[name] = found[1]
        failed = fold_all(chosen)
        return PassReport(
            self.registered_name(),
            len(chosen) - len(failed),
            (*refused, *failed),
            {"relative_error": errors} if errors else {},
        )


def _search(fold: Fold, judges: Sequence[OutputError], rounds: int) -> tuple[Doubles, float] | None:
    """Scales of the fold, float64 [channels], and their error relative to that of plain rounding; None: no gain."""
    plain = sum(judge.error(None) for judge in judges)
    best, least = None, plain
    entries = _Entries(fold, judges)
    for start in (np.ones(entries.count), entries.magnitudes()):
        c = start
        for _ in range(rounds):
            numbers = 1 / entries.channels(c)
            rounded = [judge.rounded(Columns.of(fold, judge.site, numbers)) for judge in judges]
            error = sum(j.gram.error(matrix - j.matrix) for j, matrix in zip(judges, rounded, strict=True))
            if error < least:
                best, least = (numbers, error / plain), error
            c = c * entries.best_factors(rounded)
    return best


class _Entries:
    """Which entries of the weights share a scale: those of a channel, or of channels that are tied."""

    def __init__(self, fold: Fold, judges: Sequence[OutputError]) -> None:
        ties = np.unique(fold.ties[fold.free])
        self.count = len(ties)
        self._place = np.where(fold.free, np.searchsorted(ties, fold.ties), self.count)
        self._judges = judges
        self._labels = [self._labels_of(factors_of(fold, judge.site, 2.0 + self._place)) for judge in judges]

    def channels(self, c: Doubles) -> Doubles:
        """[scales] -> [channels], 1 for what cannot be scaled."""
        return np.append(c, 1.0)[self._place]

    def magnitudes(self) -> Doubles:
        """Mean |w| of the entries of each scale, around 1."""
        sums = self._sums([np.abs(judge.matrix) for judge in self._judges])
        means = sums / np.maximum(self._sums([np.ones_like(judge.matrix) for judge in self._judges]), 1)
        alive = means > 0
        centre = np.exp(np.log(means[alive]).mean()) if alive.any() else 1.0
        return np.where(alive, means / centre, 1.0)

    def best_factors(self, rounded: Sequence[Floats]) -> Doubles:
        """[scales]: by what multiples of the rounded entries come nearest to the weights, errors weighed by inputs."""
        weighed = [judge.power * matrix for judge, matrix in zip(self._judges, rounded, strict=True)]
        products = self._sums([w * judge.matrix for w, judge in zip(weighed, self._judges, strict=True)])
        squares = self._sums([w * matrix for w, matrix in zip(weighed, rounded, strict=True)])
        usable = (squares > 0) & (products > 0)
        factors = np.divide(products, squares, out=np.ones_like(products), where=usable)
        return np.clip(factors, 1 / _STEP, _STEP)

    def _labels_of(self, factors: Doubles) -> npt.NDArray[np.int64]:
        """The scale of each entry of a weight [rows, columns], `count` where there is none."""
        labels = np.rint(factors).astype(np.int64) - 2
        known = (factors == labels + 2) & (labels >= 0) & (labels < self.count)
        return np.where(known, labels, self.count)

    def _sums(self, entries: Sequence[Floats]) -> Doubles:
        total = np.zeros(self.count + 1)
        for labels, numbers in zip(self._labels, entries, strict=True):
            total += np.bincount(labels.ravel(), numbers.ravel(), self.count + 1)
        return total[:-1]
