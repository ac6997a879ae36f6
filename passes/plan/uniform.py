"""One number format everywhere: the baseline, and what plain 8-bit deployment uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler import registry
from qcompiler.budget import bits_per_weight, bits_text, is_embedding, kept_sites, parse_budget, stored_bytes
from qcompiler.errors import BadOption, BudgetInfeasible, Refusal
from qcompiler.formats import QuantSpec, parse_spec
from qcompiler.graph.panels import is_high
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model
from qcompiler.overrun import overrun
from qcompiler.passes.plan.candidates import Rows, activation_for, passed_over, with_fitting_scales
from qcompiler.pipeline import Pass, PassReport
from qcompiler.plan import ActivationMode, Plan, SitePlan
from qcompiler.progress import Progress, Silent
from qcompiler.target import Backend

_MODES: dict[str, ActivationMode] = {"float": "float", "static": "static", "dynamic": "dynamic"}
_WIDTHS, _SHOWN = (8, 4), 4  # of the formats that a message names
_INSTEAD = "drop --budget, or use the pass 'allocate', which fits the formats to it"


@dataclass(frozen=True)
class Uniform(Pass):
    """Give every site the same format.

    Scales that float16 cannot hold become float32, which is reported.

    A site whose activations the target cannot quantize this way keeps float activations, one whose weight it
    cannot hold stays float; both are reported.

    Attributes:
        spec: of the weights, such as "int8-sym-channel-fp32".
        activation: float, static or dynamic, wherever a site has an input.
        embeddings: spec of lookup tables; empty: as `spec`; "float" leaves them alone.
        keep: sites to leave float: globs on their names, or "embeddings". Outside the average of bits.
        target: who must be able to run it.
        budget: what the result must stay within; the formats are fixed, so one that they exceed is refused.
        high: spec of panels that a transform has marked as those that need more precision (`pca-split`,
            `channel-order`), whose dynamic activations have 8 bits whatever `activation_bits` says; empty: as `spec`;
            "float" leaves them alone.
        activation_bits: of dynamic activations, 3 to 8.
        activation_clip: share of a row's largest magnitude beyond which dynamic activations are clipped, in (0, 1].
    """

    spec: str = "int8-sym-channel-fp32"
    activation: str = "float"
    embeddings: str = ""
    keep: tuple[str, ...] = ()
    target: str = "onnx"
    budget: tuple[str, ...] = ()
    high: str = ""
    activation_bits: int = 8
    activation_clip: float = 1.0

    def __post_init__(self) -> None:
        parse_spec(self.spec)
        if self.embeddings not in ("", "float"):
            parse_spec(self.embeddings)
        if self.high not in ("", "float"):
            parse_spec(self.high)
        if self.activation not in _MODES:
            raise BadOption(f"unknown activation mode '{self.activation}'", "uniform", f"use {', '.join(_MODES)}")
        self._rows()
        for text in self.budget:
            if not parse_budget(text).stored:
                raise BadOption(f"'uniform' fixes the formats and cannot aim at {text}", "--budget", _INSTEAD)

    def foresee(self, model: Model) -> None:
        """Refuse formats that the target can store nothing in, and a budget that they exceed."""
        if self.budget:
            self._plan(Model(model.ir, model.name), Silent())
        else:
            self._check_formats(find_sites(model.ir))

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Fill `model.plan`.

        Raises:
            BadOption: the target can store no weight in one of the formats, while it can in others.
            BudgetInfeasible: that takes more than the budget.
        """
        refused = self._plan(model, progress)
        bits, decided = bits_per_weight(model), len(model.plan.sites)
        metrics = {"bits_per_weight": bits, "stored_bytes": stored_bytes(model)}
        progress.note(f"uniform: {decided} of {len(find_sites(model.ir))} sites, {bits_text(bits)}")
        return PassReport("uniform", decided, tuple(refused), metrics)

    def _plan(self, model: Model, progress: Progress) -> list[Refusal]:
        """Fill `model.plan`; what could not be had."""
        backend: Backend = registry.find("backends", self.target)()
        sites = find_sites(model.ir)
        self._check_formats(sites)
        kept = kept_sites(sites, self.keep)
        decided: dict[str, SitePlan] = {}
        refused: list[Refusal] = []
        for site in sites:
            spec = None if site.name in kept else self._spec(site)
            if spec is None:
                continue
            wanted = self._rows().put(site, SitePlan(spec, activation_for(site, _MODES[self.activation])))
            fitting = with_fitting_scales(site, [wanted])[0]
            if fitting != wanted:
                refused.append(Refusal(site.name, "float32 scales: float16 cannot hold those of its weights"))
            plan, refusals = _decide(backend, site, fitting)
            refused += refusals
            if plan is not None:
                decided[site.name] = plan
        refused += passed_over(model, sites, progress)
        model.plan = Plan(decided, kept=kept)
        over = overrun(model, map(parse_budget, self.budget))
        if over is not None:
            raise BudgetInfeasible(*over.words(f"'uniform' fixes the formats, here {self.spec}", _INSTEAD))
        return refused

    def _check_formats(self, sites: Sequence[Site]) -> None:
        backend: Backend = registry.find("backends", self.target)()
        kept, asked = kept_sites(sites, self.keep), dict[QuantSpec, list[Site]]()
        for site in sites:
            spec = None if site.name in kept else self._spec(site)
            if spec is not None:
                asked.setdefault(spec, []).append(site)
        for spec, own in asked.items():
            reasons = [backend.supports(site, SitePlan(spec)) for site in own]
            offers = () if None in reasons else (p.weight for s in own for p in backend.candidates(s, _WIDTHS))
            possible = list(dict.fromkeys(str(offer) for offer in offers if offer is not None))
            if possible:
                what = f"target {self.target} stores no weight of this model as '{spec}': {reasons[0]}"
                raise BadOption(what, "pass 'uniform'", f"give a spec such as {', '.join(possible[:_SHOWN])}")

    def _rows(self) -> Rows:
        return Rows.of("uniform", self.activation, self.activation_bits, self.activation_clip)

    def _spec(self, site: Site) -> QuantSpec | None:
        text = self.embeddings if self.embeddings and is_embedding(site) else self.spec
        text = self.high if self.high and is_high(site) else text
        return None if text == "float" else parse_spec(text)


def _decide(backend: Backend, site: Site, wanted: SitePlan) -> tuple[SitePlan | None, list[Refusal]]:
    reason = backend.supports(site, wanted)
    if reason is None:
        return wanted, []
    if wanted.activation != "float":
        plan, further = _decide(backend, site, SitePlan(wanted.weight))
        return plan, [Refusal(site.name, f"activations stay float: {reason}"), *further]
    return None, [Refusal(site.name, f"stays float: {reason}")]
