"""SmoothQuant+: smoothing with one strength, searched on the loss of the whole model with its weights rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from qcompiler.formats import QuantSpec, parse_spec
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.loss import Kind
from qcompiler.measure.true_loss import TrueLoss, held_back
from qcompiler.model import Model
from qcompiler.passes.transform.inputs import enough_samples, weight_specs
from qcompiler.passes.transform.smooth import Smooth
from qcompiler.pipeline import EXACT, Pass, PassReport, check_numbers
from qcompiler.progress import Progress, Silent

_COARSE = (0, 4, 8, 12, 16, 20)  # in steps of 0.05; the steps of 2 and 1 around the best follow
_STEPS = 20


@dataclass(frozen=True)
class SmoothPlus(Pass):
    """Smooth every input with the strength for which the whole model loses least when all its weights are rounded.

    Rounding is to nearest, behind rounded predecessors, so that errors add up as they will. The strengths are
    0, 0.05 ... 1, coarse to fine; leaving the model alone is one of the choices, so that what is measured never gets
    worse. The loss is taken on calibration samples that the reach of activations was not taken from, where there are
    enough.

    Source: Pan et al., SmoothQuant+ (2312.03788), from its abstract and second hand; the code is not public.

    Attributes:
        spec: format of all weights where there is no plan yet.
        sites: "norms" or "all", as `Smooth` has it.
        percentile: as `Smooth` has it.
        samples: that the loss is measured on; 0: as many as sensitivities take.
        loss: "auto": divergence of class scores, squared error of other outputs; "squared": squared error of all
            (what looks like class scores may be a hidden state).
    """

    contract: ClassVar[Literal["exact", "lossy"]] = EXACT
    spec: str = ""
    sites: str = "norms"
    percentile: float = 100.0
    samples: int = 8
    loss: Literal["auto", "squared"] = "auto"

    def __post_init__(self) -> None:
        check_numbers(self, (), ("samples",))
        if self.spec:
            parse_spec(self.spec)

    def requires(self, model: Model) -> None:
        """What `Smooth` needs, and a plan or a format."""
        self._smooth(0.5).requires(model)
        weight_specs(model, self.spec, "pass 'smooth-plus'")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Search the strength on copies, then smooth."""
        trial = self._smooth(0.5).run(model.clone(), Silent())
        if not trial.changed:
            return replace(trial, name=self.registered_name())
        names = {site.name: spec for site, spec in weight_specs(model, self.spec, "pass 'smooth-plus'").items()}
        losses: dict[str, float] = {"none": self._loss(model, names)}

        def loss(step: int) -> float:
            losses[f"{step / _STEPS:g}"] = self._smoothed(model, names, step)
            return losses[f"{step / _STEPS:g}"]

        strength = _descend(loss, progress) / _STEPS
        if losses[f"{strength:g}"] >= losses["none"]:
            metrics = {"losses": losses, "strength": None}
            return PassReport(self.registered_name(), 0, trial.refused, metrics)
        report = self._smooth(strength).run(model, Silent())
        metrics = {**report.metrics, "losses": losses, "strength": strength}
        return replace(report, name=self.registered_name(), metrics=metrics)

    def _smooth(self, strength: float) -> Smooth:
        return Smooth(strength, self.percentile, self.sites)

    def _smoothed(self, model: Model, specs: dict[str, QuantSpec], step: int) -> float:
        copy = model.clone()
        self._smooth(step / _STEPS).run(copy, Silent())
        return self._loss(copy, specs)

    def _loss(self, model: Model, specs: dict[str, QuantSpec]) -> float:
        """Of all weights rounded at once, on samples that smoothing did not use."""
        sites: list[Site] = [site for site in find_sites(model.ir) if site.name in specs]
        used = enough_samples(model)
        data = None if used is None else held_back(model, used)
        kinds: dict[str, Kind] = {}
        if self.loss == "squared":
            kinds = {str(value.name): "values" for value in model.graph.outputs}
        formats = [[specs[site.name]] for site in sites]
        truth = TrueLoss(model, sites, formats, samples=self.samples, data=data, kinds=kinds)
        return truth.loss([0] * len(sites))


def _descend(loss: Callable[[int], float], progress: Progress) -> int:
    """The step with the least loss, coarse to fine."""
    known = {step: loss(step) for step in progress.track(_COARSE, "searching the strength")}
    for width in (2, 1):
        centre = min(known, key=known.__getitem__)
        known |= {s: loss(s) for s in (centre - width, centre + width) if 0 <= s <= _STEPS and s not in known}
    return min(known, key=known.__getitem__)
