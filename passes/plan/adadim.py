"""AdaDim: along which axis of a weight its groups lie, site by site.

Heo et al., "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
Models", 2024. Groups of rows (one scale for neighbouring outputs of one input channel) keep an input channel of large
activations to itself; groups of columns do the same for an output channel. Both cost the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from qcompiler import registry
from qcompiler.errors import BadOption, PassRefused, Refusal
from qcompiler.formats import Int, PerGroup, PerRowGroup, QuantSpec, UInt
from qcompiler.formats.fit import Method, encode, fit
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.gram import Gram, gram_parts, grams
from qcompiler.measure.samples import samples_for_one
from qcompiler.measure.stream import calibration_of
from qcompiler.model import Model
from qcompiler.passes.round.gptq_core import factorize, gptq_round
from qcompiler.pipeline import Pass, PassReport
from qcompiler.plan import SitePlan
from qcompiler.progress import Progress
from qcompiler.target import Backend


@dataclass(frozen=True)
class AdaDim(Pass):
    """Turn the groups of planned weights where that lowers the error of the site's output.

    A plan in groups of columns gets groups of as many rows where these leave a smaller E||x (Q - W)^T||^2 on
    calibration data and take no more bytes, and the other way round. Every site is judged by itself, on the inputs
    that it has in the float model. Run it after 'allocate' or 'uniform' and before rounding.

    Attributes:
        rounding: how both forms are rounded to be judged: "nearest" as in the paper, or "gptq".
        clipping: of their scales: "mse", "minmax" or "hqq".
        damping: of the Hessian of "gptq".
        samples: of the calibration data, at most; of tables so many times 128 rows.
        target: who must be able to run it.
    """

    rounding: Literal["nearest", "gptq"] = "nearest"
    clipping: Method = "mse"
    damping: float = 0.05
    samples: int = 32
    target: str = "onnx"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise BadOption(f"{self.samples} samples say nothing", "adadim", "give 1 or more")
        if not self.damping >= 0:
            raise BadOption(f"damping {self.damping:g} is no share of the mean diagonal", "adadim", "0.05 is usual")

    def requires(self, model: Model) -> None:
        """Refuse a model without a plan or without calibration data, or one that is lowered."""
        if model.lowered:
            raise PassRefused("the model is lowered already", where=model.name)
        if not model.plan.sites:
            raise PassRefused("nothing is planned", model.name, "run 'allocate' or 'uniform' first")
        if model.calibration is None:
            raise PassRefused("adadim needs calibration data", model.name, "give data, or leave it out")

    def run(self, model: Model, progress: Progress) -> PassReport:
        """Change `model.plan`; metrics hold the relative error of both axes for every site."""
        backend: Backend = registry.find("backends", self.target)()
        options: dict[str, tuple[SitePlan, SitePlan]] = {}
        refused: list[Refusal] = []
        sites = {site.name: site for site in find_sites(model.ir)}
        for name, plan in model.plan.sites.items():
            other = None if plan.weight is None else _turned(plan.weight)
            if other is None or name not in sites:
                continue
            options[name] = plan, replace(plan, weight=other)
            reason = _refusal(sites[name], options[name], backend)
            if reason is not None:
                refused.append(Refusal(name, reason))
                del options[name]
        errors = self._errors(model, [sites[name] for name in options], options, progress)
        turned = {name: options[name][1] for name, (now, then) in errors.items() if then < now}
        model.plan = model.plan.with_sites(turned)
        metrics = {"relative_error": {name: _by_axis(options[name][0], e) for name, e in errors.items()}}
        return PassReport(self.registered_name(), len(turned), tuple(refused), metrics)

    def _errors(
        self,
        model: Model,
        sites: Sequence[Site],
        options: Mapping[str, tuple[SitePlan, SitePlan]],
        progress: Progress,
    ) -> dict[str, tuple[float, float]]:
        errors: dict[str, tuple[float, float]] = {}
        samples = self.samples * samples_for_one(model.ir, calibration_of(model))
        for part in gram_parts(progress.track(list(sites), "Trying both axes"), lambda site: [site]):
            found = grams(model, part, samples)
            for site in part:
                specs = [plan.weight for plan in options[site.name] if plan.weight is not None]
                now, then = (self._error(site, spec, found[site.name]) for spec in specs)
                errors[site.name] = now, then
        return errors

    def _error(self, site: Site, spec: QuantSpec, gram: Gram) -> float:
        """Error of the site's output relative to its power."""
        matrix = site.matrix()
        diagonal = np.einsum("bii->bi", gram.matrix)
        importance = np.repeat(diagonal, len(matrix) // len(diagonal), 0)
        tensor = encode(matrix, spec, *fit(matrix, spec, self.clipping, importance))
        if self.rounding == "gptq":
            (tensor,) = gptq_round(matrix, factorize(gram.matrix, self.damping), [tensor])
        return gram.error(tensor.decode() - matrix) / (gram.error(matrix) or 1.0)


def _turned(spec: QuantSpec) -> QuantSpec | None:
    """The same with groups along the other axis; None where there are no groups."""
    if isinstance(spec.granularity, PerGroup) and isinstance(spec.format, Int | UInt):
        return replace(spec, granularity=PerRowGroup(spec.granularity.size))
    if isinstance(spec.granularity, PerRowGroup):
        return replace(spec, granularity=PerGroup(spec.granularity.size))
    return None


def _refusal(site: Site, plans: tuple[SitePlan, SitePlan], backend: Backend) -> str | None:
    """Why a site keeps the axis that it has."""
    now, then = (0 if p.weight is None else p.weight.stored_bits(site.rows, site.columns) for p in plans)
    if then > now:
        return f"groups along the other axis take {then // 8} bytes, not {now // 8}"
    if all(user.op_type == "Gather" for user in site.users):
        return "a look-up reads single rows, and has no sum for an error to enter"
    return backend.supports(site, plans[1])


def _by_axis(plan: SitePlan, errors: tuple[float, float]) -> dict[str, float]:
    assert plan.weight is not None
    names = ("columns", "rows") if isinstance(plan.weight.granularity, PerGroup) else ("rows", "columns")
    return dict(zip(names, errors, strict=True))
