"""A plan that needs no measurements: what trials of transforms are rounded with, before bits are allocated."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from qcompiler.budget import Budget, float_bits, kept_sites, other_bytes
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model
from qcompiler.passes.plan.candidates import Activations, menu, site_bits, target_for
from qcompiler.plan import Plan

_WIDTHS = (2, 3, 4, 5, 6, 8)
_USUAL = Fraction(4)  # bits, where no budget says how many


def stand_in(
    model: Model, budgets: Sequence[Budget], target: str, activations: Activations, keep: Sequence[str]
) -> Plan:
    """Every site in that format of the target whose bits per weight are nearest to what the budgets leave on average.

    Args:
        model: its graph float.
        budgets: those in bits and bytes count.
        target: name of a backend.
        activations: as `Allocate` takes them.
        keep: patterns of sites that stay float.
    """
    sites = find_sites(model.ir)
    kept = kept_sites(sites, keep)
    free = [site for site in sites if site.name not in kept]
    weights = sum(site.count for site in free) or 1
    rest = 8 * other_bytes(model, sites) + sum(float_bits(site) for site in sites if site.name in kept)
    wanted = [b.amount if b.kind == "bits" else (8 * b.amount - rest) / weights for b in budgets if b.stored]
    average = min(wanted, default=_USUAL)
    backend = target_for(target, activations)
    decided = {}
    for site in free:
        plans = menu(backend, site, _WIDTHS, (), activations).plans
        if plans:
            decided[site.name] = min(plans, key=lambda plan: abs(Fraction(site_bits(site, plan), site.count) - average))
    return Plan(decided, kept=kept)
