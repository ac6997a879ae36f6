"""Sites that share one decision: the options that all of them have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qcompiler.errors import Refusal
from qcompiler.passes.plan.candidates import Menu, site_bits
from qcompiler.plan import SitePlan


def tied(
    menus: list[Menu], groups: Sequence[tuple[str, ...]]
) -> tuple[list[Menu], list[tuple[int, ...]], list[Refusal]]:
    """Give tied sites the options that all of them have, in one order.

    Args:
        menus: of all sites; those without options stay as they are.
        groups: names of the sites that must take one option.

    Returns:
        The menus, the groups as indices of non-empty menus, and the groups that have no option in common.
    """
    by_name = {m.site.name: m for m in menus if m.plans}
    kept_groups: list[list[str]] = []
    refused: list[Refusal] = []
    for names in ([n for n in group if n in by_name] for group in groups):
        by_name |= _equally_wide([by_name[n] for n in names])
        shared = [p for p in by_name[names[0]].plans if all(p in by_name[n].plans for n in names)] if names else []
        if len(names) > 1 and shared:
            kept_groups.append(names)
            # Equal options, but each site's own: a transform of it is the same decision with other numbers.
            own = {n: by_name[n].plans for n in names}
            by_name |= {n: replace(by_name[n], plans=tuple(own[n][own[n].index(p)] for p in shared)) for n in names}
        elif len(names) > 1:
            refused.append(Refusal(", ".join(names), "not tied: they have no option in common"))
    index = {name: number for number, name in enumerate(by_name)}
    groups_by_index = [tuple(index[n] for n in names) for names in kept_groups]
    return [by_name.get(m.site.name, m) for m in menus], groups_by_index, refused


def _equally_wide(menus: Sequence[Menu]) -> dict[str, Menu]:
    """Float32 scales for all where one of them needs them: options that differ in nothing else stay common."""

    def wide(plan: SitePlan) -> SitePlan:
        assert plan.weight is not None
        return replace(plan, weight=replace(plan.weight, scale_dtype="float32"))

    needed = {p for m in menus for p in m.plans if p == wide(p)}
    found: dict[str, Menu] = {}
    for m in menus:
        plans = {wide(p) if wide(p) in needed else p for p in m.plans}  # a target may itself offer both: one option
        order = sorted(plans, key=lambda p, site=m.site: (site_bits(site, p), str(p.weight)))
        found[m.site.name] = replace(m, plans=tuple(order))
    return found
