"""Scales per input channel as an option of allocation (AWQ), where the producer of the value absorbs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler.errors import ContractViolated, Refusal
from qcompiler.formats import QuantSpec
from qcompiler.graph.folds import Fold, find_fold
from qcompiler.graph.sites import Site
from qcompiler.measure.cache import Cache
from qcompiler.model import Model
from qcompiler.passes.transform.columns import Columns, Doubles, readers_of, stored_only
from qcompiler.passes.transform.inputs import channel_reach, find_folds, layer_inputs
from qcompiler.passes.transform.output_error import best_strength, judged
from qcompiler.progress import Progress
from qcompiler.variants import Offer

STRENGTHS = (-0.5, -0.25, 0.25, 0.5, 0.75, 1.0)  # below 0: what an earlier transform overdid
_GAIN = 0.98  # of the error without scales: less is not worth an option
_SEARCHED = 3  # bits: the format whose error is searched is the one nearest to this


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
        folds, refused = find_folds(model, layer_inputs(model), stored_only(formats))
        reach = channel_reach(model, {_label(fold): fold.axis for fold in folds}, 100.0)
        effects: dict[str, Columns] = {}
        tokens: dict[str, str] = {}
        specs = {site: _narrow(site, own) for site, own in formats.items()}
        for fold, judges in judged(model, folds, specs, progress):
            found = best_strength(fold, judges, reach[_label(fold)], STRENGTHS, _GAIN)
            if found is None:
                refused.append(Refusal(_label(fold), "no scales lower the error of what reads it"))
                continue
            token = Cache.key(found[0])[:12]
            own = {site.name: Columns.of(fold, site, found[0]) for site in readers_of(fold, formats)}
            effects |= own
            tokens |= dict.fromkeys(own, token)
            self._offered.append(_Scales(_label(fold), fold.axis, found[0], tuple(own)))
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


def _narrow(site: Site, specs: Sequence[QuantSpec]) -> QuantSpec:
    """The format in which errors are searched."""
    return min(specs, key=lambda spec: (abs(spec.bits - _SEARCHED), spec.stored_bits(site.rows, site.columns)))
