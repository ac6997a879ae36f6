"""Which plans are worth measuring for a site: what the target offers, narrowed to what the user asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from qcompiler import registry
from qcompiler.errors import BadOption, Refusal
from qcompiler.formats import Int, PerChannel, PerGroup, Promoted, QuantSpec
from qcompiler.formats.fit import quantize
from qcompiler.formats.scales import with_scales_that_fit
from qcompiler.graph.panels import is_high
from qcompiler.graph.sites import Site
from qcompiler.graph.uncounted import uncounted_weights
from qcompiler.model import Model
from qcompiler.passes.plan.mixed import mixed_plans
from qcompiler.plan import ActivationMode, SitePlan
from qcompiler.progress import Progress
from qcompiler.target import Backend

Activations = Literal["auto", "float", "static", "dynamic"]
_MOST = 10  # options a site; each is a run over the samples
_SAMPLE = 1 << 16  # weights that the data-free shortlist looks at


@dataclass(frozen=True)
class Menu:
    """The options of one site, cheapest first, and what was asked for but cannot be had."""

    site: Site
    plans: tuple[SitePlan, ...]
    refused: tuple[Refusal, ...] = ()

    def bits(self) -> list[int]:
        """Stored bits of every option."""
        return [site_bits(self.site, plan) for plan in self.plans]


def passed_over(model: Model, sites: Sequence[Site], progress: Progress) -> list[Refusal]:
    """The weights that are no sites, with reasons; the user is told, as no budget in bits counts them."""
    skipped = uncounted_weights(model.ir)
    if skipped:
        first = f"'{skipped[0].where}': {skipped[0].reason}"
        more = f", and {len(skipped) - 1} more (see the report)" if len(skipped) > 1 else ""
        progress.note(f"cannot be quantized: {first}{more}")
    if not sites:
        progress.note("the model has no weights that can be quantized: it stays as it is")
    return [*skipped]


@dataclass(frozen=True)
class Rows:
    """How dynamic activations are rounded, wherever a plan has them; those of high panels keep 8 bits, not clipped.

    Attributes:
        bits: of the codes, 3 to 8.
        clip: share of a row's largest magnitude that the largest code stands for, in (0, 1].
    """

    bits: int = 8
    clip: float = 1.0

    @staticmethod
    def of(owner: str, activations: str, bits: int, clip: float) -> Rows:
        """Those of a pass's options; BadOption if they cannot be had, or the activations are not dynamic."""
        try:
            SitePlan(None, "dynamic", "", bits, clip)
        except BadOption as error:
            raise BadOption(error.what, owner, error.fix) from error
        if activations != "dynamic" and (bits, clip) != (8, 1):
            what = f"{activations} activations have no width and no clip of their own"
            raise BadOption(what, owner, "make activations dynamic, or drop activation_bits and activation_clip")
        return Rows(bits, clip)

    def put(self, site: Site, plan: SitePlan) -> SitePlan:
        """A site's plan with them, if its activations are dynamic."""
        if plan.activation != "dynamic" or is_high(site):
            return plan
        return replace(plan, activation_bits=self.bits, activation_clip=self.clip)


def target_for(name: str, activations: Activations) -> Backend:
    """The target by name; one that has a say in activations (a field of that name) is told what is wanted."""
    target: Callable[..., Backend] = registry.find("backends", name)
    if activations != "auto" and "activations" in getattr(target, "__dataclass_fields__", ()):
        return target(activations=activations)
    return target()


def menu(
    backend: Backend,
    site: Site,
    bits: Sequence[int],
    group_sizes: Sequence[int],
    activations: Activations,
    mixed: Sequence[Promoted] = (),
    rows: Rows | None = None,
) -> Menu:
    """The options of a site on a target.

    Args:
        backend: says what it can run.
        site: whose.
        bits: widths to consider.
        group_sizes: offered beside the target's own wherever the target takes groups.
        activations: "auto" takes, for every weight format, the activation that the target names first.
        mixed: formats of two widths to offer beside.
        rows: of dynamic activations; as the target names them if None.
    """
    offered = [plan for plan in backend.candidates(site, bits) if plan.weight is not None]
    widest = max((site_bits(site, plan) for plan in offered), default=0)  # tiny groups may take more than float weights
    regrouped = [p for plan in offered for p in _regrouped(plan, group_sizes) if backend.supports(site, p) is None]
    offered += [plan for plan in regrouped if site_bits(site, plan) <= widest]
    added, unmixed = mixed_plans(backend, site, offered, mixed)
    plans, refused = _with_activations(backend, site, with_fitting_scales(site, offered + added), activations)
    if rows is not None:
        plans, narrower = _with_rows(backend, site, plans, rows)
        refused = (*refused, *narrower)
    if not plans:
        plain = SitePlan(QuantSpec(Int(8), PerChannel(), True))
        reason = backend.supports(site, plain) or "the target offers no format for it"
        return Menu(site, (), (*refused, Refusal(site.name, f"stays float: {reason}")))
    first = {_storage(site, plan): plan for plan in reversed(plans)}  # the target names the fastest first
    ordered = sorted(first.values(), key=lambda plan: (site_bits(site, plan), str(plan.weight)))
    most = _MOST + len(mixed) + len(group_sizes) * len(bits)  # what was asked for is not left out
    return Menu(site, tuple(shortlist(site, ordered, most)), (*refused, *unmixed))


def with_fitting_scales(site: Site, plans: Sequence[SitePlan]) -> list[SitePlan]:
    """The plans, with float32 scales wherever float16 cannot hold what the site's weights need."""
    specs = [plan.weight for plan in plans if plan.weight is not None]
    if all(spec.scale_dtype != "float16" for spec in specs):
        return list(plans)
    fitting = dict(zip(specs, with_scales_that_fit(site.matrix(), specs), strict=True))
    return [plan if plan.weight is None else replace(plan, weight=fitting[plan.weight]) for plan in plans]


def site_bits(site: Site, plan: SitePlan) -> int:
    """Stored bits of a site's weight under an option, with all that goes with it."""
    assert plan.weight is not None
    return plan.weight.stored_bits(site.rows, site.columns) + site.branch_bits


def _storage(site: Site, plan: SitePlan) -> tuple[object, ...]:
    """Equal for options that store the same numbers: groups wider than the matrix are one group."""
    spec = plan.weight
    assert spec is not None
    return spec.format, spec.symmetric, spec.scale_dtype, spec.granularity.grid(site.rows, site.columns)


def activation_for(site: Site, wanted: ActivationMode) -> ActivationMode:
    """The wanted mode, or float for a site that has no input to quantize (a lookup table)."""
    return "float" if site.activation is None else wanted


def _regrouped(plan: SitePlan, sizes: Sequence[int]) -> list[SitePlan]:
    spec = plan.weight
    if spec is None or not isinstance(spec.granularity, PerGroup):
        return []
    others = [size for size in sizes if size != spec.granularity.size]
    return [replace(plan, weight=replace(spec, granularity=PerGroup(size))) for size in others]


def _with_activations(
    backend: Backend, site: Site, offered: list[SitePlan], activations: Activations
) -> tuple[list[SitePlan], tuple[Refusal, ...]]:
    if activations == "auto":
        return offered, ()
    if getattr(backend, "activations", None) == activations:  # it was told, so this is its answer
        served = site.activation is None or any(plan.activation == activations for plan in offered)
        return offered, () if served else (Refusal(site.name, f"no {activations} activations on this target"),)
    wanted = [replace(plan, activation=activation_for(site, activations)) for plan in offered]
    reasons = [backend.supports(site, plan) for plan in wanted]
    usable = [plan for plan, reason in zip(wanted, reasons, strict=True) if reason is None]
    if usable or not offered:
        return usable, ()
    # Nothing can be had with these activations: the target's own are better than a float weight.
    return offered, (Refusal(site.name, f"no {activations} activations: {reasons[0]}"),)


def _with_rows(
    backend: Backend, site: Site, offered: list[SitePlan], rows: Rows
) -> tuple[list[SitePlan], tuple[Refusal, ...]]:
    wanted = [rows.put(site, plan) for plan in offered]
    reasons = [backend.supports(site, plan) for plan in wanted]
    usable = [plan for plan, reason in zip(wanted, reasons, strict=True) if reason is None]
    if usable or not offered:
        return usable, ()
    return offered, (Refusal(site.name, f"activations stay as the target has them: {reasons[0]}"),)


def shortlist(site: Site, plans: Sequence[SitePlan], most: int = _MOST) -> list[SitePlan]:
    """At most `most` options, by the squared error on a sample of rows (no data needed); cheapest first in and out.

    Options with more bits and more error than another go first, then those nearest in size to their
    neighbour. Lists that are short enough are returned as they are.
    """
    if len(plans) <= most:
        return list(plans)
    step = max(1, site.count // _SAMPLE)
    sample = np.ascontiguousarray(site.matrix()[::step])
    left: list[SitePlan] = []
    least = np.inf
    for plan in plans:
        error = _error(sample, plan.weight)
        if error < least:
            left.append(plan)
            least = error
    while len(left) > most:
        sizes = [site_bits(site, plan) for plan in left]
        growth = [sizes[i + 1] / sizes[i - 1] for i in range(1, len(left) - 1)]
        del left[1 + int(np.argmin(growth))]
    return left


def _error(matrix: np.ndarray, spec: QuantSpec | None) -> float:
    assert spec is not None
    unit = np.abs(matrix).max(initial=0) or np.float32(1)  # squares of tiny or huge weights would leave float32
    return float(np.square((quantize(matrix, spec, "minmax").decode() - matrix) / unit).sum())
