"""Scales per input channel as an option of allocation (AWQ), where the producer of the value absorbs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcompiler.errors import ContractViolated, Refusal
from qcompiler.formats import PerTensor, QuantSpec
from qcompiler.formats.base import Floats
from qcompiler.formats.varied import Undo, VariedSpec, effective
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.sites import Site
from qcompiler.measure.cache import Cache
from qcompiler.measure.gram import Gram, gram_parts, grams
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import channel_reach, enough_samples, find_folds, layer_inputs
from qcompiler.progress import Progress
from qcompiler.variants import Offer

Doubles = npt.NDArray[np.float64]
STRENGTHS = (-0.5, -0.25, 0.25, 0.5, 0.75, 1.0)  # below 0: what an earlier transform overdid
_NAME = "scaled"
_SMALLEST = 1e-4
_GAIN = 0.98  # of the error without scales: less is not worth an option
_ROWS = 128  # of a weight matrix, to judge a strength
_SEARCHED = 3  # bits: the format whose error is searched is the one nearest to this


@dataclass(frozen=True, eq=False)
class Columns:
    """The effect on one site: its weight is multiplied by a matrix of factors, and divided after rounding.

    Attributes:
        factors: float64 [rows or 1, columns].
        dtype: in which the weight is stored.
    """

    factors: Doubles
    dtype: np.dtype[np.generic]

    def change(self, matrix: Floats, spec: QuantSpec) -> tuple[Floats, Undo]:
        """See `Effect`; the numbers are those that the fold stores."""
        del spec
        scaled = (matrix * self.factors).astype(self.dtype).astype(np.float32)
        return scaled, lambda rounded: (rounded / self.factors).astype(np.float32)

    def extra_bits(self, rows: int, columns: int) -> int:
        """Nothing: the producer's own constants hold the scales."""
        del rows, columns
        return 0

    def part(self, step: int) -> Columns:
        """The effect on every `step`-th row."""
        return Columns(self.factors if len(self.factors) == 1 else self.factors[::step], self.dtype)


@dataclass(frozen=True, eq=False)
class _Scales:
    """One value's scales, [channels], and the sites that read them."""

    value: str
    axis: int
    numbers: Doubles
    readers: tuple[str, ...]


@dataclass
class Scaled:
    """Channel j of a value is divided by s_j = reach_j^strength, and the weights that read it are multiplied.

    Channels that matter more are then rounded finer. The strength is searched, for each value, for the least squared
    error of the outputs of its readers in a narrow format. Nothing is computed at run time and nothing more is stored.
    All readers of a value share its scales: they have them all or none.

    Source: Lin et al., AWQ (2306.00978).
    """

    free: bool = True
    _offered: list[_Scales] = field(default_factory=list[_Scales])

    def offer(self, model: Model, formats: Mapping[Site, Sequence[QuantSpec]], progress: Progress) -> Offer:
        """See `Variant`. Refused: values whose producer absorbs no scale, or where no strength lowers the error."""
        folds, refused = find_folds(model, layer_inputs(model), _accept(formats))
        readers = {fold: _readers(fold, formats) for fold in folds}
        reach = channel_reach(model, {_label(fold): fold.axis for fold in folds}, 100.0)
        effects: dict[str, Columns] = {}
        tokens: dict[str, str] = {}
        for chunk in gram_parts(folds, lambda fold: readers[fold]):
            known = grams(model, [site for fold in chunk for site in readers[fold]], enough_samples(model))
            for fold in progress.track(chunk, "searching scales"):
                found = _search(fold, readers[fold], reach[_label(fold)], formats, known)
                if isinstance(found, Refusal):
                    refused.append(found)
                    continue
                token = Cache.key(found)[:12]
                own = {site.name: _columns(fold, site, found) for site in readers[fold]}
                effects |= own
                tokens |= dict.fromkeys(own, token)
                self._offered.append(_Scales(_label(fold), fold.axis, found, tuple(own)))
        return Offer(effects, tokens, [scales.readers for scales in self._offered], tuple(refused))

    def commit(self, model: Model, chosen: Mapping[str, QuantSpec]) -> None:
        """Fold the scales of every value of which a reader chose them."""
        values = {str(v.name): v for node in model.graph for v in (*node.inputs, *node.outputs) if v is not None}
        for scales in self._offered:
            if not set(scales.readers) & set(chosen):
                continue
            fold = find_fold(model.ir, values[scales.value], axis=scales.axis)
            if isinstance(fold, Refusal):
                raise ContractViolated(f"scales cannot be folded any more: {fold.reason}", scales.value)
            fold.scale(scales.numbers)


def _label(fold: Fold) -> str:
    return fold.value.name or "?"


def _accept(formats: Mapping[Site, Sequence[QuantSpec]]) -> Callable[[Fold], str | None]:
    """Which folds may be taken: those that change nothing but stored numbers, of sites that are in no other one."""
    by_weight = {site.weight: site for site in formats}
    taken: set[Site] = set()

    def accept(fold: Fold) -> str | None:
        if fold.region.clips or any(edit.constant.shared for edit in fold.region.edits.values()):
            return "constants that it changes are shared: copies would take room"
        readers = _readers(fold, formats)
        if not readers:
            return "no weight that is quantized reads it"
        if any(site in taken for site in readers):
            return "a weight that reads it has scales for another value"
        others = {by_weight[e.constant.value] for e in fold.region.edits.values() if e.constant.value in by_weight}
        if any(isinstance(s.granularity, PerTensor) for o in others.difference(readers) for s in formats[o]):
            return "a weight before it has one scale for all rows"
        taken.update(readers)
        return None

    return accept


def _readers(fold: Fold, formats: Mapping[Site, Sequence[QuantSpec]]) -> list[Site]:
    """The sites whose columns are scaled: those that are multiplied differently within a row."""
    weights = {edit.constant.value for edit in fold.region.edits.values()}
    probe = fold.tied(1.0 + np.arange(fold.size) / fold.size, lambda group: float(group[0]))
    found: list[Site] = []
    for site in formats:
        if site.weight in weights and site.columns > 1:
            factors = _factors(fold, site, probe)
            if (factors != factors[:, :1]).any():
                found.append(site)
    return found


def _factors(fold: Fold, site: Site, numbers: Doubles) -> Doubles:
    """What a site's matrix is multiplied by, float64 [rows, columns]."""
    tensor = np.broadcast_to(fold.factors(numbers, site.weight), site.shape)
    return np.asarray(site.to_matrix(tensor), np.float64)


def _columns(fold: Fold, site: Site, numbers: Doubles) -> Columns:
    factors = _factors(fold, site, numbers)
    assert site.weight.const_value is not None
    alike = (factors == factors[:1]).all()
    return Columns(factors[:1].copy() if alike else factors, site.weight.const_value.dtype.numpy())


def _search(
    fold: Fold,
    readers: Iterable[Site],
    reach: Doubles,
    formats: Mapping[Site, Sequence[QuantSpec]],
    known: Mapping[str, Gram],
) -> Doubles | Refusal:
    """The scales of least error of the readers' outputs."""
    judges = [_Judge.of(site, formats[site], known[site.name]) for site in readers if site.name in known]
    plain = sum(judge.error(None) for judge in judges)
    best, least = None, plain * _GAIN
    for strength in STRENGTHS:
        numbers = _scales(fold, reach, strength)
        error = sum(judge.error(_columns(fold, judge.site, numbers)) for judge in judges)
        if error < least:
            best, least = numbers, error
    return Refusal(_label(fold), "no scales lower the error of what reads it") if best is None else best


def _scales(fold: Fold, reach: Doubles, strength: float) -> Doubles:
    alive = (reach > 0) & fold.free
    raw = np.maximum(np.where(alive, reach, 1.0) ** strength, _SMALLEST)
    if alive.any():
        raw = np.where(alive, raw / np.sqrt(raw[alive].max() * raw[alive].min()), 1.0)
    return fold.tied(raw)


@dataclass(frozen=True, eq=False)
class _Judge:
    """Errors of one reader's output, on some of its rows, in the narrow format that is searched."""

    site: Site
    spec: QuantSpec
    gram: Gram
    matrix: Floats
    step: int

    @staticmethod
    def of(site: Site, specs: Sequence[QuantSpec], gram: Gram) -> _Judge:
        spec = min(specs, key=lambda s: (abs(s.bits - _SEARCHED), s.stored_bits(site.rows, site.columns)))
        step = max(1, site.rows // _ROWS) if len(gram.matrix) == 1 else 1
        return _Judge(site, spec, gram, np.ascontiguousarray(site.matrix()[::step]), step)

    def error(self, effect: Columns | None) -> float:
        spec = self.spec if effect is None else VariedSpec.of(self.spec, _NAME, "", effect.part(self.step))
        return self.gram.error(effective(self.matrix, spec).decode() - self.matrix)
